"""`minillm pretrain`: build the pieces of a pretraining run and call the loop."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data.binfile import TokenFile
from minillm.data.tokenizer import (
    find_tokenizer,
    fingerprint,
    load_tokenizer,
    resolve_tokenizer,
    token_byte_lengths,
)
from minillm.data.windows import Rows, Windows
from minillm.device import pick_dtype
from minillm.errors import InputError
from minillm.files import sample_sha256
from minillm.log import Progress
from minillm.models import registry
from minillm.settings import PretrainConfig
from minillm.train.distributed import World
from minillm.train.job import Job
from minillm.train.loop import Outcome
from minillm.train.run import run_job
from minillm.train.run_folder import begin_run

_PROMPT_TOKENS = 16


class PretrainSource:
    """Windows of a token file, with validation windows from the same or another file."""

    def __init__(self, training: Windows, validation: Windows) -> None:
        self._training, self._validation = training, validation

    def __len__(self) -> int:
        """Training windows in one epoch."""
        return len(self._training)

    @property
    def num_val(self) -> int:
        """Validation windows."""
        return self._validation.num_val

    def rows(self, first: int, count: int) -> Rows:
        """Return training samples `first` to `first + count` of the run."""
        return self._training.rows(first, count)

    def val_rows(self, first: int, count: int) -> Rows:
        """Return validation windows `first` to `first + count`."""
        return self._validation.val_rows(first, count)

    def prompts(self) -> Sequence[Sequence[int]]:
        """Return the beginnings of two validation windows."""
        rows = self.val_rows(0, min(2, self.num_val))
        return [row[:_PROMPT_TOKENS].tolist() for row in rows.input_ids]


def pretrain(
    cfg: PretrainConfig, progress: Progress, *, out: Path | None = None, resume: bool = False
) -> tuple[Path, Outcome]:
    """Train a model from scratch.

    Args:
        cfg: The run's settings.
        progress: Where to report.
        out: Run folder; None makes a new one below `runs/`.
        resume: Continue the run in `out`, from its newest complete checkpoint.

    Returns:
        The run folder and how the run ended.

    Raises:
        ConfigError: Unknown model, or settings that cannot work together.
        InputError: Data or tokenizer are missing, malformed, or do not belong together.
    """
    return run_job(
        cfg,
        progress,
        out,
        resume,
        lambda world, device, run: _build_job(cfg, world, device, run, resume),
    )


def _build_job(
    cfg: PretrainConfig, world: World, device: torch.device, out: Path | None, resume: bool
) -> Job:
    data = _find_data(cfg)
    folder = _find_tokenizer_folder(cfg, data)
    tokenizer = load_tokenizer(folder)
    file = TokenFile.open(data, tokenizer=tokenizer)
    source = _build_source(cfg, file, tokenizer)

    config = registry.build_config(
        cfg.model,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    facts = {
        "data_sha256": file.manifest.content_id,
        "data_sample": sample_sha256(data),  # the manifest does not change with the data
        "tokenizer_sha256": fingerprint(folder),
    }
    run = begin_run(cfg, "pretrain", cfg.model, out, facts, resume, world)
    torch.manual_seed(cfg.seed)
    model = registry.build_model(config)
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides the argument's type
    step_rows = max(1, cfg.batch.batch_tokens // cfg.batch.sequence_length)
    return Job(
        stage="pretrain",
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
    )


def _find_data(cfg: PretrainConfig) -> Path:
    if not cfg.data.exists():
        if cfg.data != paths.PRETRAIN_BIN:
            hint = "name a token file that is there with `--data`"
            raise InputError(f"no training data: `{cfg.data}` does not exist", hint=hint)
        raise InputError(
            f"no training data: `{cfg.data}` does not exist",
            hint="`minillm tokenize --data bundled && minillm merge-bin` makes it from the text "
            "in the package; `minillm download --set 4` fetches 5 billion tokens",
        )
    return cfg.data


def _find_tokenizer_folder(cfg: PretrainConfig, data: Path) -> Path:
    if cfg.tokenizer.as_posix() != "auto":
        return resolve_tokenizer(cfg.tokenizer)
    wanted = TokenFile.read_fingerprint(data)
    return (
        find_tokenizer(wanted, near=[data.parent]) if wanted else resolve_tokenizer(cfg.tokenizer)
    )


def _build_source(
    cfg: PretrainConfig, file: TokenFile, tokenizer: PreTrainedTokenizerFast
) -> PretrainSource:
    length = cfg.batch.sequence_length
    val_windows = max(1, cfg.report.eval_tokens // length)
    own = Windows(
        file,
        length,
        seed=cfg.seed,
        val_windows=0 if cfg.val_data else val_windows,
        doc_mask=cfg.doc_mask,
    )
    if cfg.val_data is None:
        return PretrainSource(own, own)
    other = TokenFile.open(cfg.val_data, tokenizer=tokenizer)
    held = Windows(other, length, seed=0, val_windows=val_windows, doc_mask=cfg.doc_mask)
    return PretrainSource(own, held)
