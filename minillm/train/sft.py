"""`minillm sft`: build the pieces of a fine-tuning run and call the loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from minillm import paths
from minillm.data.sft_rows import SftRow, SftRows
from minillm.data.tokenizer import fingerprint, load_tokenizer, token_byte_lengths
from minillm.data.windows import IGNORE, Rows, permute
from minillm.device import pick_dtype
from minillm.errors import InputError
from minillm.log import Progress
from minillm.models.load import load_model
from minillm.settings import SftConfig
from minillm.train.distributed import World
from minillm.train.job import Job
from minillm.train.loop import Outcome
from minillm.train.lora import add_lora
from minillm.train.run import run_job
from minillm.train.run_folder import begin_run

_VAL_SHARE = 0.02
_NUM_PROMPTS = 3


class SftSource:
    """Rows of an SFT parquet, padded per micro-batch; documents in a row stay isolated.

    Args:
        rows: The parquet.
        pad_id: Token that fills short rows; it has no label.
        max_length: Rows longer than this are refused.
        seed: Seed of the order.
        max_val_tokens: About this many tokens are held out, at most 2 % of the rows.
    """

    def __init__(
        self, rows: SftRows, *, pad_id: int, max_length: int, seed: int, max_val_tokens: int
    ) -> None:
        self._rows, self._pad_id, self._seed = rows, pad_id, seed
        self._length = max_length
        if len(rows) < 2:
            raise InputError(
                f"`{rows.path}` holds {len(rows)} rows, training needs at least 2",
                hint="prepare more dialogues with `minillm prepare-sft`",
            )
        wanted = min(max(1, round(_VAL_SHARE * len(rows))), max(1, max_val_tokens // max_length))
        self._num_val = wanted

    def __len__(self) -> int:
        """Training rows in one epoch."""
        return len(self._rows) - self._num_val

    @property
    def num_val(self) -> int:
        """Validation rows: the last ones of the file, which is shuffled."""
        return self._num_val

    def rows(self, first: int, count: int) -> Rows:
        """Return training samples `first` to `first + count` of the run."""
        picks = (divmod(first + i, len(self)) for i in range(count))
        return self._gather([permute(i, len(self), self._seed, epoch) for epoch, i in picks])

    def val_rows(self, first: int, count: int) -> Rows:
        """Return validation rows `first` to `first + count`."""
        return self._gather([len(self) + first + i for i in range(count)])

    def prompts(self) -> Sequence[Sequence[int]]:
        """Return the questions that open the first validation rows."""
        found = []
        for index in range(len(self), min(len(self) + _NUM_PROMPTS, len(self._rows))):
            row = self._rows.row(index)
            answers = np.flatnonzero(row.labels != IGNORE)
            if answers.size:
                found.append(row.token_ids[: answers[0]].tolist())
        return found

    def _gather(self, places: Sequence[int]) -> Rows:
        rows = [self._rows.row(place) for place in places]
        width = max(len(row.token_ids) for row in rows)
        if width > self._length:
            raise InputError(
                f"`{self._rows.path}` has a row of {width} tokens, `--sequence-length` is "
                f"{self._length}",
                hint=f"`minillm sft --sequence-length {width}`",
            )
        ids = np.full((len(rows), width), self._pad_id, np.int64)
        labels = np.full((len(rows), width), IGNORE, np.int64)
        positions = np.zeros((len(rows), width), np.int64)  # padding: documents of one token
        for at, row in enumerate(rows):
            _fill(row, ids[at], labels[at], positions[at])
        return Rows(ids, labels, positions)


def _fill(row: SftRow, ids: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> None:
    """Copy a row; its labels move one place left, so each stands where it is predicted."""
    size = len(row.token_ids)
    ids[:size], positions[:size] = row.token_ids, row.position_ids
    labels[: size - 1] = row.labels[1:]
    # the last token of a document must not be asked for the first of the next
    ends = np.flatnonzero(row.position_ids == 0)[1:] - 1
    labels[ends] = IGNORE


def sft(
    cfg: SftConfig, progress: Progress, *, out: Path | None = None, resume: bool = False
) -> tuple[Path, Outcome]:
    """Fine-tune a pretrained model on dialogues.

    Args:
        cfg: The run's settings.
        progress: Where to report.
        out: Run folder; None makes a new one below `runs/`.
        resume: Continue the run in `out`, from its newest complete checkpoint.

    Returns:
        The run folder and how the run ended.

    Raises:
        InputError: Model or data are missing, malformed, or made with different tokenizers.
    """
    return run_job(
        cfg,
        progress,
        out,
        resume,
        lambda world, device, run: _build_job(cfg, world, device, run, resume),
    )


def _build_job(
    cfg: SftConfig, world: World, device: torch.device, out: Path | None, resume: bool
) -> Job:
    folder = _find_model(cfg)
    data = _find_data(cfg)
    tokenizer = load_tokenizer(folder)
    rows = SftRows.open(data, len(tokenizer))
    if rows.tokenizer_sha256 not in ("", fingerprint(folder)):
        raise InputError(
            f"`{data}` was made with tokenizer {rows.tokenizer_sha256[:12]}…, "
            f"`{folder}` uses {fingerprint(folder)[:12]}…",
            hint=f"`minillm prepare-sft --tokenizer {folder} --out {data}` makes it anew",
        )
    facts = {"data_sha256": rows.sha256, "tokenizer_sha256": fingerprint(folder)}
    name = _model_name(folder)
    run = begin_run(cfg, "sft", name, out, facts, resume, world)
    torch.manual_seed(cfg.seed)
    model, _ = load_model(folder, device=device)
    if cfg.lora.lora_rank:
        add_lora(model, cfg.lora)
    if cfg.neftune_alpha:
        table: Any = model.get_input_embeddings()
        table.neftune_noise_alpha = cfg.neftune_alpha
        table.register_forward_hook(neftune_post_forward_hook)
    source = SftSource(
        rows,
        pad_id=int(tokenizer.pad_token_id),
        max_length=cfg.batch.sequence_length,
        seed=cfg.seed,
        max_val_tokens=cfg.report.eval_tokens,
    )
    step_rows = max(1, cfg.batch.batch_tokens // cfg.batch.sequence_length)
    return Job(
        stage="sft",
        run=run,
        model=model,
        tokenizer=tokenizer,
        tokenizer_folder=folder,
        byte_lengths=token_byte_lengths(tokenizer),
        source=source,
        optim=cfg.optim,
        batch=cfg.batch,
        report=cfg.report,
        total_steps=cfg.steps or max(1, round(cfg.epochs * len(source) / step_rows)),
        device=device,
        dtype=pick_dtype(cfg.batch.precision, device),
        world=world,
        facts=facts,
        parallel=cfg.several.parallel,
        lora=cfg.lora if cfg.lora.lora_rank else None,
    )


def _find_model(cfg: SftConfig) -> Path:
    if cfg.model.as_posix() == "auto":
        run = paths.latest_run(paths.RUNS, "pretrain", finished=True)
        if run is None:
            raise InputError(
                f"no finished pretrain run below `{paths.RUNS}/`",
                hint="`minillm demo` makes one from nothing; or `minillm sft --model FOLDER`",
            )
        return run / "final"
    if not cfg.model.exists():
        raise InputError(
            f"no model at `{cfg.model}`", hint="`--model auto` takes the newest pretrain run"
        )
    return cfg.model / "final" if paths.is_complete(cfg.model / "final") else cfg.model


def _find_data(cfg: SftConfig) -> Path:
    if not cfg.data.exists():
        raise InputError(
            f"no dialogues: `{cfg.data}` does not exist",
            hint="`minillm prepare-sft` makes it from the dialogues in the package",
        )
    return cfg.data


def _model_name(folder: Path) -> str:
    """Name the run after the pretrain run, else after the model's folder."""
    parent = folder.parent.name if folder.name == "final" else folder.name
    name = parent.removeprefix("pretrain-").removeprefix("sft-")
    stem, _, number = name.rpartition("-")
    return stem if stem and number.isdigit() else name
