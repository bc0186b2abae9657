"""Bring published sets to the disk: list, compare with what is there, fetch the rest, unpack.

A file is in place when its checksum is the hub's; the ledger remembers that, so a second run asks
for the listing and nothing more, and a complete set is still found when the hub is down. A file
that this command did not write is never overwritten. Unfinished bytes wait in `OUT/.downloads`,
where no other command looks.
"""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.data.archive import unpack
from minillm.data.catalog import Place, PublishedSet, find_sets
from minillm.data.fetch import RemoteFile, UnreachableError, Web, digest_file, fetch
from minillm.data.hub import TITLES, auth_headers, inside, list_files
from minillm.data.ledger import Ledger
from minillm.errors import ConfigError, InputError
from minillm.files import folder_lock, named_os_errors, require_free_space, write_text
from minillm.log import Progress, logger, task
from minillm.settings import DownloadConfig

STATE = ".downloads"


@dataclass(slots=True)
class FilePlan:
    """One file: where it comes from, where it goes, and how much of it is here."""

    remote: RemoteFile
    target: Path
    part: Path
    is_done: bool = False

    @property
    def fetch_bytes(self) -> int:
        """Bytes still to come."""
        size = self.remote.size_bytes
        if self.is_done:
            return 0
        have = self.part.stat().st_size if self.part.is_file() else 0
        return size - have if have <= size else size


@dataclass(slots=True)
class SetPlan:
    """One set: its files, where they go, and what a run has to do for it."""

    published: PublishedSet
    place: Place
    folder: Path
    state: Path
    ledger: Ledger
    files: list[FilePlan]
    is_unpacked: bool = True

    @property
    def total_bytes(self) -> int:
        """Size of the files on the hub."""
        return sum(file.remote.size_bytes for file in self.files)

    @property
    def fetch_bytes(self) -> int:
        """Bytes still to come."""
        return sum(file.fetch_bytes for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """Free bytes that finishing needs: a zip is at most as large as what it holds."""
        return self.fetch_bytes + (0 if self.is_unpacked else self.total_bytes)

    @property
    def placed(self) -> tuple[str, ...]:
        """The files below `folder`: those of the hub, or what was unpacked from them."""
        if not self.published.is_archive:
            return tuple(file.remote.path for file in self.files)
        entry = self.ledger.find(_unpacked(self.files[0].remote))
        return entry.members if entry else ()

    @property
    def next_step(self) -> str:
        """The command that takes the set from here."""
        first = self.folder / self.placed[0]
        return self.published.next_step.format(folder=self.folder, file=first)


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
    return [_plan_set(item, config, web, progress, is_read_only=True) for item in sets]


def download(config: DownloadConfig, progress: Progress) -> list[SetReport]:
    """Fetch, verify and unpack the wanted sets below `config.out`.

    Raises:
        ConfigError: Unknown set, or one that the chosen hub does not have.
        InputError: A file of the user's own stands where one of the set would go.
        SetupError: The disk is too small or cannot be written.
        RunError: The hub does not answer or sends wrong bytes, or another process is at it.
    """
    web = Web()
    with ExitStack() as locks:
        plans = []
        for item in find_sets(config.sets):
            locks.enter_context(folder_lock(config.out / STATE / item.name))
            plans.append(_plan_set(item, config, web, progress))
        need_bytes = sum(item.disk_bytes for item in plans)
        require_free_space(config.out, need_bytes, "the download")
        return [_finish(item, web, progress, config.workers) for item in plans]


def _plan_set(
    published: PublishedSet,
    config: DownloadConfig,
    web: Web,
    progress: Progress,
    *,
    is_read_only: bool = False,
) -> SetPlan:
    state = config.out / STATE / published.name
    folder = config.out / published.folder
    ledger = Ledger(state / "verified.jsonl", is_read_only=is_read_only)
    saved = state / "listing.json"
    offline: UnreachableError | None = None
    try:
        place, remotes = _list_anywhere(published, config.hub, web, progress)
    except UnreachableError as err:
        if not saved.is_file():
            raise
        offline = err
        place, remotes = _read_listing(saved, published)
    else:
        if not is_read_only:
            _write_listing(saved, place, remotes)

    files = []
    for remote in remotes:
        root = state if published.is_archive else folder
        part = inside(state / "parts", f"{remote.path}.part")
        files.append(FilePlan(remote, inside(root, remote.path), part))
    result = SetPlan(published, place, folder, state, ledger, files)
    _find_done(result, config.verify, progress)
    if offline is not None:
        if result.fetch_bytes or not result.is_unpacked:
            raise offline
        logger.warning("%s; the copy in `%s` is complete and verified", offline, folder)
    return result


def _list_anywhere(
    published: PublishedSet, hub: str, web: Web, progress: Progress
) -> tuple[Place, list[RemoteFile]]:
    places = [place for place in published.places if hub in ("auto", place.hub)]
    if not places:
        there = published.places[0].hub
        raise ConfigError(
            f"`{published.name}` is not on {TITLES[hub]}",
            hint=f"it is on {TITLES[there]}: `--hub {there}` or `--hub auto`",
        )
    for place in places[:-1]:
        try:
            return place, list_files(place, web, progress)
        except UnreachableError as err:
            logger.warning("%s; trying the next hub", err)
    return places[-1], list_files(places[-1], web, progress)


def _write_listing(path: Path, place: Place, remotes: list[RemoteFile]) -> None:
    tree = {"hub": place.hub, "files": [asdict(remote) for remote in remotes]}
    write_text(path, json.dumps(tree, ensure_ascii=False))


def _read_listing(path: Path, published: PublishedSet) -> tuple[Place, list[RemoteFile]]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    place = next(place for place in published.places if place.hub == tree["hub"])
    return place, [RemoteFile(**fields) for fields in tree["files"]]


def _find_done(item: SetPlan, verify: bool, progress: Progress) -> None:
    """Mark the files that are in place, hashing those that the ledger does not vouch for."""
    if item.published.is_archive:
        archive = item.files[0]
        item.is_unpacked = _is_unpacked(item, archive.remote, verify, progress)
        archive.is_done = item.is_unpacked or _is_right(
            item.ledger,
            archive.remote.path,
            archive.target,
            archive.remote.digest,
            verify,
            progress,
        )
        return
    for file in item.files:
        path, size_bytes = file.remote.path, file.remote.size_bytes
        file.is_done = (
            file.target.is_file()
            and file.target.stat().st_size == size_bytes
            and _is_right(item.ledger, path, file.target, file.remote.digest, verify, progress)
        )
        if not file.is_done and file.target.exists() and item.ledger.find(path) is None:
            raise InputError(
                f"`{file.target}` is there, but is not the file of set `{item.published.name}`",
                hint=f"move it away, or choose another folder: `--out {item.state.parents[1]}-2`",
            )


def _is_unpacked(item: SetPlan, remote: RemoteFile, verify: bool, progress: Progress) -> bool:
    entry = item.ledger.find(_unpacked(remote))
    if entry is None or entry.digest != remote.digest:
        return False
    for name in entry.members:
        member = item.ledger.find(name)
        target = inside(item.folder, name)
        if member is None or not _is_right(
            item.ledger, name, target, member.digest, verify, progress
        ):
            return False
    return True


def _is_right(
    ledger: Ledger, path: str, file: Path, digest: str, verify: bool, progress: Progress
) -> bool:
    """Tell whether `file` has a digest, by the ledger if that knows it, else by hashing it."""
    entry = ledger.find(path)
    if not verify and ledger.is_unchanged(path, file) and entry and entry.digest == digest:
        return True
    if not file.is_file() or not digest:
        return False
    with task(progress, f"verify {file.name}", file.stat().st_size, "bytes"):
        found = digest_file(file, digest, progress.advance)
    if found == digest:
        ledger.add(path, file, digest)
    return found == digest


def _finish(item: SetPlan, web: Web, progress: Progress, workers: int) -> SetReport:
    fetched_bytes = item.fetch_bytes
    todo = [file for file in item.files if not file.is_done]
    if todo:
        with task(progress, f"download {item.published.name}", fetched_bytes, "bytes"):
            _fetch_all(item, todo, web, progress, workers)
    if not item.is_unpacked:
        _unpack(item, progress)
    shutil.rmtree(item.state / "parts", ignore_errors=True)
    return SetReport(
        item.published.name,
        len(item.placed),
        item.total_bytes,
        fetched_bytes,
        item.folder,
        item.next_step,
    )


def _fetch_all(
    item: SetPlan, todo: list[FilePlan], web: Web, progress: Progress, workers: int
) -> None:
    """Fetch several files at a time; the first failure, or Ctrl-C, stops them all."""
    one_at_a_time = threading.Lock()
    headers = auth_headers(item.place.hub)

    def advance(amount: int) -> None:
        with one_at_a_time:
            progress.advance(amount)

    def fetch_one(file: FilePlan) -> None:
        _move_aside(file, item)
        fetch(web, file.remote, file.part, file.target, headers, advance)
        with one_at_a_time:
            item.ledger.add(file.remote.path, file.target, file.remote.digest)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(fetch_one, file) for file in todo]):
                future.result()
        except BaseException:  # Ctrl-C too: the threads must leave before the error goes on
            web.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    digests = unpack(archive.target, item.folder, progress, ours=lambda path: path.name in own)
    for name, digest in digests.items():
        item.ledger.add(name, item.folder / name, digest)
    key = _unpacked(archive.remote)
    item.ledger.add(key, archive.target, archive.remote.digest, tuple(digests))
    archive.target.unlink()


def _unpacked(archive: RemoteFile) -> str:
    """Name the ledger's line about what came out of a zip; the zip's own line is its path."""
    return f"{archive.path}/"
