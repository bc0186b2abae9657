"""`minillm prepare-sft`: dialogues to a parquet of token rows, packed or one dialogue a row.

Two passes: the first notes where each dialogue lies and of what kind it is, the second encodes
those that are wanted into a log on disk, from which the rows are gathered. Memory holds some 200
bytes a dialogue and never its text or tokens, so ten million fit into a few GB.

A dialogue longer than a row is dropped, counted and reported, never cut: half an answer would
teach the model to stop in mid-sentence.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data.encoder import Mismatch, plan_encoder
from minillm.data.foreign_chat import make_encoder
from minillm.data.identity import identity_dialogues, pick_identity
from minillm.data.packing import Packed, pack
from minillm.data.sft_choose import choose, shuffled
from minillm.data.sft_encode import Rule, TokenLog, TokenReader
from minillm.data.sft_inputs import find_dialogue_files, unpack, write_identity
from minillm.data.sft_report import SftReport, draw_charts
from minillm.data.sft_rows import SftRow, SftRows
from minillm.data.sft_scan import Candidates, scan
from minillm.data.sft_write import Layout, write_rows
from minillm.data.tokenizer import fingerprint, load_tokenizer, plain_json, resolve_tokenizer
from minillm.data.worker_pool import Workers, count_workers, start_workers
from minillm.errors import InputError
from minillm.files import folder_lock
from minillm.log import Progress, logger, task
from minillm.settings import PrepareSftConfig

__all__ = ["SftReport", "SftRow", "SftRows", "prepare_sft"]

_IDENTITY_COUNT = 200
_WORKER_BYTES = 8_000_000  # a worker takes seconds to start: not for less input than this

Ints = npt.NDArray[np.int64]


def prepare_sft(cfg: PrepareSftConfig, progress: Progress) -> SftReport:
    """Write the SFT parquet of some dialogues and a persona.

    The result depends on data, settings and tokenizer alone: same input, same bytes, with any
    number of processes and however often it was interrupted.

    Args:
        cfg: The settings.
        progress: Where to report.

    Raises:
        InputError: Data or tokenizer are missing or malformed, or no dialogue is short enough.
        RunError: A worker died, or another process makes the same file.
    """
    started = time.monotonic()
    try:
        report = _prepare(cfg, cfg.backend, progress)
    except Mismatch as err:
        logger.warning("beginning anew with tokenizers, for gigatoken will not do: %s", err)
        report = _prepare(cfg, "tokenizers", progress)
    if cfg.charts:
        report.charts = draw_charts(report)
    report.seconds = time.monotonic() - started
    return report


def _prepare(cfg: PrepareSftConfig, backend: str, progress: Progress) -> SftReport:
    folder = resolve_tokenizer(cfg.tokenizer)
    tokenizer = load_tokenizer(folder)
    make_encoder(tokenizer)
    files = find_dialogue_files(paths.resolve(cfg.data, paths.BUNDLED_DIALOGUES), without=cfg.out)
    size_bytes = sum(file.stat().st_size for file in files)
    num_workers = count_workers(cfg.workers, size_bytes, _WORKER_BYTES)
    plan = plan_encoder(plain_json(tokenizer), backend, size_bytes, apart=num_workers > 1)
    rule = Rule(
        tokenizer=folder,
        fingerprint=fingerprint(folder),
        is_fast=plan.is_fast,
        odd=plan.odd,
        wide=len(tokenizer) > 1 << 16,
        min_tokens=cfg.min_tokens,
        max_tokens=cfg.sequence_length,
    )
    with _work_folder(cfg.out) as work, start_workers(num_workers) as workers:
        plain = unpack(files, work, rule.fingerprint, len(tokenizer), progress)
        plain += write_identity(_identity(cfg), work)
        found = scan(plain, workers, progress, skip_bad=cfg.skip_bad)
        with TokenLog(work, rule, _made_from(cfg, rule, found)) as log:
            wanted = _choose(cfg, found, log, workers, progress)
            report = _finish(cfg, found, wanted, log.finish(), tokenizer, progress)
        (work / "done").touch()
    return report


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Yield `OUT.work`; it goes in the end, but stays after an interruption worth going on from."""
    work = out.with_name(out.name + ".work")
    with folder_lock(work):
        is_over = False
        try:
            yield work
            is_over = True
        except (InputError, Mismatch):  # the next run will not go on from here
            is_over = True
            raise
        finally:
            if is_over or not (work / "log.json").is_file():
                shutil.rmtree(work, ignore_errors=True)


def _identity(cfg: PrepareSftConfig) -> list[dict[str, object]]:
    dialogues = identity_dialogues(cfg.persona, cfg.seed)
    count = cfg.persona.identity_count
    if not count:
        count = len(dialogues) if cfg.data.as_posix() == paths.BUNDLED else _IDENTITY_COUNT
    return pick_identity(dialogues, count)


def _made_from(cfg: PrepareSftConfig, rule: Rule, found: Candidates) -> str:
    """Return what identifies the order and the result of encoding."""
    tree = {
        "format": 1,
        "data": found.sha256,
        "identity": [file.is_identity for file in found.files],
        "rule": [rule.fingerprint, rule.is_fast, rule.min_tokens, rule.max_tokens],
        "sample": [cfg.max_dialogues, cfg.multi_turn_ratio, cfg.balance, cfg.skip_bad, cfg.seed],
    }
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _choose(
    cfg: PrepareSftConfig, found: Candidates, log: TokenLog, workers: Workers, progress: Progress
) -> Ints:
    """Encode what is wanted, or may be; return the dialogues to write, all of which fit."""
    persona = np.flatnonzero(found.is_identity)
    pool = np.flatnonzero(~found.is_identity)

    def encode(picks: Ints) -> npt.NDArray[np.bool_]:
        size = float(found.size[picks].sum())
        with task(progress, f"encode {len(picks):,} dialogues", size, "bytes"):
            lengths = log.encode(picks, found, workers, progress)
        fits: npt.NDArray[np.bool_] = lengths > 0
        return fits

    persona = persona[encode(persona)] if len(persona) else persona
    if cfg.max_dialogues and len(pool) > cfg.max_dialogues:
        if cfg.balance:
            is_multi = found.is_multi[pool]
            group_of = found.kind[pool].astype(np.int64) * 2 + is_multi
        else:
            is_multi, group_of = np.zeros(len(pool), bool), np.zeros(len(pool), np.int64)
        ratio = cfg.multi_turn_ratio
        chosen = choose(pool, group_of, is_multi, cfg.max_dialogues, ratio, cfg.seed, encode)
    else:
        chosen = pool[encode(pool)] if len(pool) else pool
    return np.sort(np.concatenate([chosen, persona]))


def _finish(
    cfg: PrepareSftConfig,
    found: Candidates,
    wanted: Ints,
    reader: TokenReader,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
) -> SftReport:
    """Pack and write the dialogues that are wanted."""
    too_long = reader.lengths < -cfg.sequence_length
    longest = int(np.abs(reader.lengths).max(initial=0))
    if found.is_identity[wanted].all():
        _refuse_empty(cfg, found, reader)
    place_of = np.full(len(found), -1, np.int64)
    place_of[reader.indices] = np.arange(len(reader.indices))
    places = place_of[wanted][shuffled(len(wanted), cfg.seed, 2)]
    lengths = reader.lengths[places].astype(np.int64)
    if cfg.pack:
        packed = pack(lengths, cfg.sequence_length)
        rows = Packed(places[packed.indices], packed.starts)
    else:
        rows = Packed(places, np.arange(len(places) + 1))
    order = shuffled(len(rows), cfg.seed, 3)
    facts = {
        "format_version": 1,
        "tokenizer_sha256": reader.rule.fingerprint,
        "vocab_size": len(tokenizer),
        "sequence_length": cfg.sequence_length,
        "packed": cfg.pack,
        "seed": cfg.seed,
        "num_dialogues": len(wanted),
        "num_tokens": int(lengths.sum()),
    }
    layout = Layout(
        packed=cfg.pack,
        padded_to=cfg.sequence_length if cfg.padded else 0,
        pad_id=int(tokenizer.pad_token_id or 0),
        types=found.types,
        kind=found.kind[reader.indices],
    )
    num_learned = write_rows(cfg.out, reader, rows, order, layout, facts, progress)
    kinds = np.bincount(found.kind[wanted], minlength=len(found.types)).tolist()
    by_type = Counter(dict(zip(found.types, kinds, strict=True)))
    num_identity = int(found.is_identity.sum())
    return SftReport(
        path=cfg.out,
        num_read=found.num_lines - num_identity,
        num_identity=num_identity,
        num_sampled_out=len(found) - len(wanted) - int((reader.lengths <= 0).sum()),
        num_never_encoded=len(found) - len(reader.indices),
        num_too_long=int(too_long.sum()),
        num_too_short=int(((reader.lengths <= 0) & ~too_long).sum()),
        rejected=found.rejected,
        longest=longest,
        num_dialogues=len(wanted),
        num_multi_turn=int(found.is_multi[wanted].sum()),
        num_rows=len(rows),
        sequence_length=cfg.sequence_length,
        packed=cfg.pack,
        num_tokens=int(lengths.sum()),
        num_label_tokens=num_learned,
        lengths=np.bincount(lengths, minlength=cfg.sequence_length + 1),
        row_lengths=np.bincount(
            np.add.reduceat(reader.lengths[rows.indices].astype(np.int64), rows.starts[:-1]),
            minlength=cfg.sequence_length + 1,
        ),
        by_type={name or "unnamed": n for name, n in by_type.most_common() if n},
    )


def _refuse_empty(cfg: PrepareSftConfig, found: Candidates, reader: TokenReader) -> None:
    """Say why none of the user's dialogues can be taken."""
    lengths = reader.lengths[~found.is_identity[reader.indices]]
    if not len(lengths):
        count = found.rejected.counts.total()
        what = f", {count} lines are none" if count else ""
        raise InputError(
            f"no dialogue in `{cfg.data}`{what}",
            hint="use the ones in the package: `--data bundled`",
        )
    num_too_long = int((lengths < -cfg.sequence_length).sum())
    longest = int(np.abs(lengths).max())
    if num_too_long:
        raise InputError(
            f"all {num_too_long} dialogues are longer than `--sequence-length "
            f"{cfg.sequence_length}`",
            hint=f"the longest has {longest} tokens: `--sequence-length {longest}`",
        )
    raise InputError(
        f"all {len(lengths)} dialogues are shorter than `--min-tokens {cfg.min_tokens}`",
        hint=f"the longest has {longest} tokens: `--min-tokens 0` keeps all",
    )
