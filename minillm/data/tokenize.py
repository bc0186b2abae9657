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
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from minillm import paths
from minillm.data.binfile import TokenFile
from minillm.data.documents import find_files, read_file, stem_of, total_bytes
from minillm.data.encoder import Encoder, EncoderPlan, Mismatch, plan_encoder
from minillm.data.manifest import Manifest, TokenizerFacts, manifest_path
from minillm.data.merge import merge_files
from minillm.data.recipes import Recipe, find_recipe
from minillm.data.tokenizer import load_tokenizer, plain_json, resolve_tokenizer
from minillm.data.worker_pool import count_workers, worker_died
from minillm.data.workers import WORKER_BYTES, encode_shard, encode_shard_in_worker, worker_pool
from minillm.errors import InputError
from minillm.files import folder_lock, sha256_file, write_text
from minillm.log import Progress, Silent, logger, task
from minillm.settings import TokenizeConfig

_SHARD_CHARS = 2_000_000  # about 4 MB of mixed text, a second or two of work
_QUEUE_PER_WORKER = 2


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
    recipe = find_recipe(cfg)
    jobs = plan_jobs(cfg)
    tokenizer = load_tokenizer(resolve_tokenizer(cfg.tokenizer))
    facts, tree = TokenizerFacts.of(tokenizer), plain_json(tokenizer)
    maker = _Maker(recipe, facts, tree, cfg, progress or Silent())
    try:
        reports = maker.run(jobs, cfg.backend)
    except Mismatch as err:
        logger.warning("beginning anew with tokenizers, for gigatoken will not do: %s", err)
        maker.forget()
        reports = maker.run(jobs, "tokenizers")
    if not reports:
        raise InputError(
            f"no document with any text in `{cfg.data}`",
            hint="use other files, or the text in the package: `--data bundled`",
        )
    return reports


def plan_jobs(cfg: TokenizeConfig) -> list[Job]:
    """Decide which token files to make of what.

    All input goes to one file if it is the bundled corpus, or a name is given or the recipe has
    one; else each input file gets its own, called after its stem, or after its whole path where
    two stems are the same.
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
    name = cfg.name.removesuffix(".bin") or find_recipe(cfg).name
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
        self,
        recipe: Recipe,
        facts: TokenizerFacts,
        tree: str,
        cfg: TokenizeConfig,
        progress: Progress,
    ) -> None:
        self._recipe, self._facts, self._tree = recipe, facts, tree
        self._cfg, self._progress = cfg, progress
        self._begun: list[Job] = []
        self._reports: list[TokenizeReport] = []

    def run(self, jobs: list[Job], backend: str) -> list[TokenizeReport]:
        """Do what is not done yet.

        Raises:
            Mismatch: gigatoken differs from tokenizers; `forget` what it made.
        """
        todo: list[tuple[Job, str]] = []
        for job in jobs:
            made_from = self._fingerprint(job)
            found = _up_to_date(job, made_from)
            if found is None:
                todo.append((job, made_from))
            else:
                self._reports.append(TokenizeReport(job.out, found, is_new=False))
        if todo:
            size_bytes = total_bytes([file for job, _ in todo for file in job.files])
            workers = count_workers(self._cfg.workers, size_bytes, WORKER_BYTES)
            plan = plan_encoder(self._tree, backend, size_bytes, self._progress, apart=workers > 1)
            self._make(todo, plan, workers, size_bytes)
        return self._reports

    def forget(self) -> None:
        """Remove everything that the run has made so far, and shards that it went on from."""
        for job in self._begun:
            shutil.rmtree(job.work, ignore_errors=True)
        for report in self._reports:
            if report.is_new:
                manifest_path(report.path).unlink()
                report.path.unlink()
        self._begun, self._reports = [], []

    def _make(
        self, todo: list[tuple[Job, str]], plan: EncoderPlan, workers: int, size_bytes: int
    ) -> None:
        self._encoder = Encoder(plan) if workers == 1 else None
        with (
            contextlib.ExitStack() as locks,
            worker_pool(workers, plan) as pool,
            task(self._progress, "tokenize", size_bytes, "bytes"),
        ):
            waiting: deque[_Pending] = deque()
            for job, made_from in todo:
                lock = locks.enter_context(contextlib.ExitStack())
                lock.enter_context(_folder_if_used(job.work))
                lock.enter_context(folder_lock(job.work))
                self._begun.append(job)
                kept = _prepare_work(job, made_from)
                if kept:
                    self._progress.line(f"`{job.out}`: going on after {kept} finished shards")
                last = _Pending(job, made_from, lock=lock)
                for index, (texts, read_bytes) in enumerate(_shards(job, self._recipe)):
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
            assert self._encoder is not None
            encode_shard(self._encoder, self._facts, texts, shard)
            return None
        try:
            return pool.submit(encode_shard_in_worker, self._facts, texts, shard)
        except (BrokenProcessPool, OSError) as err:  # OSError: it died while another was started
            raise worker_died() from err

    def _settle(self, pending: "_Pending") -> None:
        """Wait for a shard; after the last one of a job, put its token file together."""
        if pending.future is not None:
            try:
                pending.future.result()
            except BrokenProcessPool as err:
                raise worker_died() from err
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
            "recipe": self._recipe.describe(),
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


def _shards(job: Job, recipe: Recipe) -> Iterator[tuple[list[str], float]]:
    """Yield documents in groups of bounded size, with the bytes of input that were read."""
    texts: list[str] = []
    num_chars, read_bytes = 0, 0.0
    for file in job.files:
        for batch in read_file(file, recipe):
            read_bytes += batch.read_bytes
            for text in batch.texts:
                texts.append(text)
                num_chars += len(text)
                if num_chars >= _SHARD_CHARS:
                    yield texts, read_bytes
                    texts, num_chars, read_bytes = [], 0, 0.0
    if texts:
        yield texts, read_bytes


def _prepare_work(job: Job, made_from: str) -> int:
    """Keep the shards of an earlier run of the same job, drop any others; return how many stay."""
    plan = job.work / "made_from"
    if not plan.is_file() or plan.read_text(encoding="utf-8") != made_from:
        for leftover in job.work.iterdir():
            leftover.unlink()
        write_text(plan, made_from)
    return sum(1 for shard in job.work.glob("shard-*.bin") if manifest_path(shard).is_file())


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
