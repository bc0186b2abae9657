"""Documents to token files: many processes, the same bytes whatever their number, resumable.

The main process reads the documents in order and deals them out in shards of about 4 MB of text.
A worker encodes a shard and writes it, whole or not at all, to `NAME.bin.work/`. When all shards
of a token file are there, they are merged in order and the work folder goes. A run that was killed
finds its shards again, as long as the inputs' contents and the tokenizer are the same. Text that
spells a control token, such as `<|im_end|>`, is encoded as the characters it is.

The price: one process reads everything (hundreds of MB/s, enough for dozens of workers), inputs
are hashed first, and the disk holds a token file twice for a moment.
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from minillm import paths
from minillm.data.binfile import BinWriter, Manifest, TokenFile, TokenizerFacts, manifest_path
from minillm.data.documents import find_files, read_file, stem_of, total_bytes
from minillm.data.merge import merge_files
from minillm.data.tokenizer import load_tokenizer, plain_encoder, resolve_tokenizer
from minillm.errors import InputError, RunError
from minillm.files import folder_lock, sha256_file, write_text
from minillm.log import Progress, Silent, logger, task
from minillm.settings import TokenizeConfig

_SHARD_CHARS = 2_000_000  # about 4 MB of mixed text, a second or two of work
_BATCH_DOCUMENTS = 256
_QUEUE_PER_WORKER = 2
_WORKER_BYTES = 4_000_000  # a worker takes seconds to start: not for less input than this


@dataclass(frozen=True, slots=True)
class Job:
    """One token file to make of some input files."""

    out: Path
    files: tuple[Path, ...]
    sources: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Where the shards wait."""
        return self.out.with_name(self.out.name + ".work")


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """One token file; `is_new` is false if it was there and up to date."""

    path: Path
    manifest: Manifest
    is_new: bool


def tokenize(cfg: TokenizeConfig, progress: Progress | None = None) -> list[TokenizeReport]:
    """Make the token files that `cfg` asks for; those that are up to date are left alone.

    Raises:
        InputError: Inputs or tokenizer are missing or broken, or hold no text.
        RunError: A worker died, or another process makes the same file.
    """
    progress = progress or Silent()
    jobs = plan_jobs(cfg)
    folder = resolve_tokenizer(cfg.tokenizer)
    maker = _Maker(cfg, folder, TokenizerFacts.of(load_tokenizer(folder)), progress)
    reports = maker.run(jobs)
    if not reports:
        raise InputError(
            f"no document with any text in `{cfg.data}`",
            hint="use other files, or the text in the package: `--data bundled`",
        )
    return reports


def plan_jobs(cfg: TokenizeConfig) -> list[Job]:
    """Decide which token files to make of what.

    All input goes to one file if it is the bundled corpus or a name is given; else each input file
    gets its own, called after its stem, or after its whole path where two stems are the same.
    """
    if cfg.data == paths.RAW and not cfg.data.exists():
        raise InputError(
            f"no documents: `{cfg.data}` does not exist",
            hint="tokenize the text in the package with `minillm tokenize --data bundled`, or name "
            "your own: `--data FOLDER`",
        )
    place = paths.resolve(cfg.data, paths.BUNDLED_CORPUS)
    files = find_files(place)
    root = place.parent if place.is_file() else place
    sources = [file.relative_to(root).as_posix() for file in files]
    name = cfg.name.removesuffix(".bin")
    name = name or (paths.BUNDLED if cfg.data.as_posix() == paths.BUNDLED else "")
    if name:
        return [Job(cfg.out / f"{name}.bin", tuple(files), tuple(sources))]
    stems = [stem_of(file) for file in files]
    names = [
        stem if stems.count(stem) == 1 else source.replace("/", "-")
        for stem, source in zip(stems, sources, strict=True)
    ]
    if len(set(names)) < len(names):
        raise InputError(
            f"two files below `{place}` would both become `{max(names, key=names.count)}.bin`",
            hint=f"make one token file of them all: `--name {place.name or 'corpus'}`",
        )
    return [
        Job(cfg.out / f"{name}.bin", (file,), (source,))
        for name, file, source in zip(names, files, sources, strict=True)
    ]


class _Maker:
    """Runs the jobs one after the other, with shards of several of them under way."""

    def __init__(
        self, cfg: TokenizeConfig, tokenizer: Path, facts: TokenizerFacts, progress: Progress
    ) -> None:
        self._cfg, self._tokenizer, self._facts = cfg, tokenizer, facts
        self._progress = progress
        self._reports: list[TokenizeReport] = []

    def run(self, jobs: list[Job]) -> list[TokenizeReport]:
        todo: list[tuple[Job, str]] = []
        for job in jobs:
            made_from = self._fingerprint(job)
            found = _up_to_date(job, made_from)
            if found is None:
                todo.append((job, made_from))
            else:
                self._reports.append(TokenizeReport(job.out, found, is_new=False))
        if todo:
            self._make(todo)
        return self._reports

    def _make(self, todo: list[tuple[Job, str]]) -> None:
        files = [file for job, _ in todo for file in job.files]
        workers = self._cfg.workers or _count_workers(total_bytes(files))
        with (
            contextlib.ExitStack() as locks,
            _pool(workers) as pool,
            task(self._progress, "tokenize", total_bytes(files), "bytes"),
        ):
            waiting: deque[_Pending] = deque()
            for job, made_from in todo:
                lock = locks.enter_context(contextlib.ExitStack())
                lock.enter_context(_folder_if_used(job.work))
                lock.enter_context(folder_lock(job.work))
                _prepare_work(job, made_from)
                last = _Pending(job, made_from, lock=lock)
                for index, (texts, read_bytes) in enumerate(_shards(job, self._cfg.text_column)):
                    shard = job.work / f"shard-{index:06d}.bin"
                    last.shards.append(shard)
                    future = self._submit(pool, texts, shard)
                    waiting.append(_Pending(job, made_from, future=future, read_bytes=read_bytes))
                    while len(waiting) > workers * _QUEUE_PER_WORKER:
                        self._settle(waiting.popleft())
                waiting.append(last)
            while waiting:
                self._settle(waiting.popleft())

    def _submit(
        self, pool: ProcessPoolExecutor | None, texts: list[str], shard: Path
    ) -> "Future[None] | None":
        if _is_whole(shard):
            return None
        if pool is None:
            encode_shard(self._tokenizer, self._facts, texts, shard)
            return None
        try:
            return pool.submit(encode_shard, self._tokenizer, self._facts, texts, shard)
        except (BrokenProcessPool, OSError) as err:  # OSError: it died while another was started
            raise _worker_died() from err

    def _settle(self, pending: "_Pending") -> None:
        """Wait for a shard; after the last one of a job, put its token file together."""
        if pending.future is not None:
            try:
                pending.future.result()
            except BrokenProcessPool as err:
                raise _worker_died() from err
        self._progress.advance(pending.read_bytes)
        if pending.lock is None:
            return
        job = pending.job
        if not pending.shards:
            logger.warning("`%s` holds no document with any text: skipped", job.files[0])
        else:
            parts = [TokenFile.open(shard) for shard in pending.shards]
            manifest = merge_files(parts, job.out, sources=job.sources, made_from=pending.made_from)
            self._reports.append(TokenizeReport(job.out, manifest, is_new=True))
        shutil.rmtree(job.work)
        pending.lock.close()

    def _fingerprint(self, job: Job) -> str:
        tree = {
            "shard_chars": _SHARD_CHARS,
            "text_column": self._cfg.text_column,
            "tokenizer": [self._facts.sha256, self._facts.separator_id],
            "files": [
                [source, sha256_file(file)]
                for source, file in zip(job.sources, job.files, strict=True)
            ],
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class _Pending:
    """A shard under way; or, with the job's lock and all its shards, the end of a job."""

    job: Job
    made_from: str
    shards: list[Path] = field(default_factory=list)
    future: "Future[None] | None" = None
    read_bytes: float = 0.0
    lock: contextlib.ExitStack | None = None


@contextlib.contextmanager
def _folder_if_used(work: Path) -> Iterator[None]:
    """Remove a job's folder after the block unless it holds a shard to go on with."""
    try:
        yield
    finally:
        if not any(_is_whole(shard) for shard in work.glob("shard-*.bin")):
            shutil.rmtree(work, ignore_errors=True)


def encode_shard(folder: Path, facts: TokenizerFacts, texts: list[str], out: Path) -> None:
    """Encode texts to a token file; runs in a worker.

    Args:
        folder: The tokenizer's folder.
        facts: What it was when the run began.
        texts: Documents.
        out: The shard.

    Raises:
        RunError: The tokenizer was replaced in the meantime.
    """
    encoder, found = _load_encoder(folder)
    if found != facts:
        raise RunError(
            f"the tokenizer in `{folder}` changed during the run", hint="run the same command again"
        )
    with BinWriter(out, facts) as writer:
        for begin in range(0, len(texts), _BATCH_DOCUMENTS):
            batch = texts[begin : begin + _BATCH_DOCUMENTS]
            for text, encoding in zip(batch, encoder.encode_batch_fast(batch), strict=True):
                writer.append(encoding.ids, len(text.encode()))


@functools.lru_cache(maxsize=1)
def _load_encoder(folder: Path) -> tuple[Tokenizer, TokenizerFacts]:
    tokenizer = load_tokenizer(folder)
    return plain_encoder(tokenizer), TokenizerFacts.of(tokenizer)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes; none for one worker, whose work is done in this process."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and their locks
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    # all workers start with the first task. One that starts later may not be watched, or be left
    # behind when the pool breaks, and then the pool waits for it for ever
    pool._safe_to_dynamically_spawn_children = False  # type: ignore[attr-defined]
    try:
        yield pool
    finally:
        if getattr(pool, "_broken", False) and sys.version_info < (3, 11, 5):
            # there the pool of a dead worker waits for ever for a thread that is writing to a full
            # pipe which nobody reads any more (CPython issue 94777)
            pool._call_queue._reader.close()  # type: ignore[attr-defined]
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they watch it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _count_workers(size_bytes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, math.ceil(size_bytes / _WORKER_BYTES)))


def _worker_died() -> RunError:
    return RunError(
        "a worker process died; the system may have killed it for lack of memory",
        hint="run the same command again with `--workers 1`: what is finished is kept",
    )


def _shards(job: Job, column: str) -> Iterator[tuple[list[str], float]]:
    """Yield documents in groups of bounded size, with the bytes of input that were read."""
    texts: list[str] = []
    num_chars, read_bytes = 0, 0.0
    for file in job.files:
        for batch in read_file(file, column):
            read_bytes += batch.read_bytes
            for text in batch.texts:
                texts.append(text)
                num_chars += len(text)
                if num_chars >= _SHARD_CHARS:
                    yield texts, read_bytes
                    texts, num_chars, read_bytes = [], 0, 0.0
    if texts:
        yield texts, read_bytes


def _prepare_work(job: Job, made_from: str) -> None:
    """Keep the shards of an earlier run of the same job; drop any others."""
    plan = job.work / "made_from"
    if not plan.is_file() or plan.read_text(encoding="utf-8") != made_from:
        for leftover in job.work.iterdir():
            leftover.unlink()
        write_text(plan, made_from)
    kept = sum(1 for shard in job.work.glob("shard-*.bin") if manifest_path(shard).is_file())
    if kept:
        logger.info("`%s`: going on after %d finished shards", job.out, kept)


def _is_whole(shard: Path) -> bool:
    """Tell whether an earlier run finished this shard; every byte of it is checked."""
    if not manifest_path(shard).is_file():
        return False
    try:
        TokenFile.open(shard, verify=True)
    except InputError:
        return False
    return True


def _up_to_date(job: Job, made_from: str) -> Manifest | None:
    try:
        if not manifest_path(job.out).is_file():
            return None
        manifest = TokenFile.open(job.out, verify=True).manifest
    except InputError:
        return None
    return manifest if manifest.made_from == made_from else None
