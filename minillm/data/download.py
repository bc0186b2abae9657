"""Bring published sets to the disk: plan, fetch or copy what is missing, unpack, bind.

A second run asks for the listing and nothing more. A file that this command did not write is never
overwritten. Unfinished bytes wait in `OUT/.downloads`, where no other command looks.
"""

import shutil
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minillm.data.archive import unpack
from minillm.data.catalog import TOKENIZER, find_sets
from minillm.data.fetch import bring, fetch
from minillm.data.hub import auth_headers, inside
from minillm.data.meter import Meter
from minillm.data.offline import find_in, require_folder
from minillm.data.set_plan import STATE, FilePlan, SetPlan, plan_set, unpacked_key
from minillm.data.threads import run_all
from minillm.data.web import Web
from minillm.errors import InputError
from minillm.files import folder_lock, named_os_errors, require_free_space
from minillm.log import Progress, logger, task
from minillm.settings import DownloadConfig

SPARE = 1.1
"""Free space asked for, as a multiple of what is needed: the disk is not only ours."""


@dataclass(frozen=True, slots=True)
class SetReport:
    """What a run did for one set."""

    name: str
    num_files: int
    total_bytes: int
    fetched_bytes: int
    folder: Path
    next_step: str


def plan(config: DownloadConfig, progress: Progress) -> list[SetPlan]:
    """List the wanted sets and compare with the disk; writes and fetches nothing.

    Raises:
        ConfigError: Unknown set, or one that the chosen hub does not have.
        InputError: A file of the user's own stands where one of the set would go.
        RunError: No hub answers and the set is not complete here.
    """
    web = Web()
    sets = find_sets(config.sets)
    return [plan_set(item, config, web, progress, is_read_only=True) for item in sets]


def download(config: DownloadConfig, progress: Progress) -> list[SetReport]:
    """Fetch, verify and unpack the wanted sets below `config.out`.

    With `config.source`, files are copied from that folder instead, checked alike.

    Raises:
        ConfigError: Unknown set, or one that the chosen hub does not have.
        InputError: A file of the user's own stands where one of the set would go, or a file in
            `config.source` is missing or wrong.
        SetupError: The disk is too small or cannot be written.
        RunError: The hub does not answer or sends wrong bytes, or another process is at it.
    """
    if config.source is not None:
        require_folder(config.source)
    web = Web()
    with ExitStack() as stack:
        plans = []
        for wanted in find_sets(config.sets):
            lock = stack.enter_context(ExitStack())
            lock.enter_context(folder_lock(config.out / STATE / wanted.name))
            plans.append((plan_set(wanted, config, web, progress), lock))
        need_bytes = sum(item.disk_bytes for item, _ in plans)
        require_free_space(config.out, round(SPARE * need_bytes), "the download, a tenth to spare,")
        reports = []
        for item, lock in plans:
            reports.append(_finish(item, config, web, progress))
            lock.close()  # another process may want the tokenizer while we fetch what it is for
        return reports


def _finish(item: SetPlan, config: DownloadConfig, web: Web, progress: Progress) -> SetReport:
    fetched_bytes = item.fetch_bytes
    todo = [file for file in item.files if not file.is_done]
    if todo:
        _bring_all(item, todo, config, web, progress)
    if not item.is_unpacked:
        _unpack(item, progress)
    shutil.rmtree(item.state / "parts", ignore_errors=True)
    if item.published.is_archive:
        item.files[0].target.unlink(missing_ok=True)
    if item.published.is_tokenized:
        from minillm.data.bind import bind  # loads transformers: only where it is needed

        known = {name: item.ledger.find(name) for name in item.placed}
        digests = {name: entry.digest for name, entry in known.items() if entry}
        bind(item.folder, digests, config.out / TOKENIZER.folder, progress)
    return SetReport(
        item.published.name,
        len(item.placed),
        item.total_bytes,
        fetched_bytes,
        item.folder,
        item.next_step,
    )


def _bring_all(
    item: SetPlan, todo: list[FilePlan], config: DownloadConfig, web: Web, progress: Progress
) -> None:
    """Fetch or copy several files at a time; the first failure, or Ctrl-C, stops them all."""
    given: dict[str, Path] = {}
    ready, verb = todo, "download"
    if config.source is not None:
        paths = [file.remote.path for file in todo]
        found = {path: find_in(config.source, item.published, path) for path in paths}
        given = {path: source for path, source in found.items() if source is not None}
        ready, verb = [file for file in todo if file.remote.path in given], "copy"
    headers = auth_headers(item.place.hub)
    writing = threading.Lock()
    size_bytes = sum(file.fetch_bytes for file in ready)
    with task(progress, f"{verb} {item.published.name}", size_bytes, "bytes"):
        meter = Meter(progress)

        def take(file: FilePlan) -> None:
            _move_aside(file, item)
            remote, target = file.remote, file.target
            if item.published.is_tokenized:  # must not vouch for the new file
                target.with_name(f"{target.name}.json").unlink(missing_ok=True)
            with meter.file(remote.path, remote.size_bytes) as counter:
                if remote.path in given:
                    bring(given[remote.path], remote, file.part, target, web.stop, counter)
                else:
                    fetch(web, remote, file.part, target, headers, counter)
            with writing:
                item.ledger.add(remote.path, target, remote.digest)

        run_all([partial(take, file) for file in ready], config.workers, web.halt)
    if len(ready) < len(todo):
        first = next(file.remote.path for file in todo if file.remote.path not in given)
        raise InputError(
            f"{len(todo) - len(ready)} of {len(item.files)} files of `{item.published.name}` are "
            f"not in `{config.source}`, the first is `{first}`",
            hint="what is there was taken; the same command without `--from` fetches the rest",
        )


def _move_aside(file: FilePlan, item: SetPlan) -> None:
    """Keep a file that we put there once and that has changed since: it may be the user's now."""
    if file.target.exists():
        kept = inside(item.state / "replaced", file.remote.path)
        with named_os_errors(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            file.target.replace(kept)
        logger.warning("`%s` was not as downloaded; it is now `%s`", file.target, kept)


def _unpack(item: SetPlan, progress: Progress) -> None:
    archive = item.files[0]
    own = {name.split("/")[0] for name in item.placed}
    own |= {f"{name}.json" for name in own}  # from `bind`

    def record(digests: dict[str, str], fresh: Path) -> None:
        """Write down what is about to be put in place: a kill just after must find it ours."""
        for name, digest in digests.items():
            item.ledger.add(name, fresh / name, digest)
        key = unpacked_key(archive.remote)
        item.ledger.add(key, archive.target, archive.remote.digest, tuple(digests))

    unpack(archive.target, item.folder, progress, ours=lambda path: path.name in own, record=record)
