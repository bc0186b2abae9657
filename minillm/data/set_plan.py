"""What a set is made of, and how much of it is on the disk: the plan that a download carries out.

A file is in place when its checksum is the listed one; the ledger remembers that. The last listing
of a hub is kept, so a complete set is found, and a new copy can be checked, without a hub.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.data.catalog import Place, PublishedSet
from minillm.data.fetch import RemoteFile, digest_file
from minillm.data.hub import TITLES, inside, list_files
from minillm.data.ledger import Ledger
from minillm.data.offline import listing_of_sums
from minillm.data.web import UnreachableError, Web
from minillm.errors import ConfigError, InputError
from minillm.files import write_text
from minillm.log import Progress, logger, task
from minillm.settings import DownloadConfig

STATE = ".downloads"
_LISTING = "listing.json"
_LEDGER = "verified.jsonl"


@dataclass(slots=True)
class FilePlan:
    """One file: where it comes from, where it goes, and how much of it is here."""

    remote: RemoteFile
    target: Path
    part: Path
    is_done: bool = False

    @property
    def have_bytes(self) -> int:
        """Bytes that need not come."""
        size = self.remote.size_bytes
        if self.is_done:
            return size
        have = self.part.stat().st_size if self.part.is_file() else 0
        return have if have <= size else 0

    @property
    def fetch_bytes(self) -> int:
        """Bytes still to come."""
        return self.remote.size_bytes - self.have_bytes


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
        entry = self.ledger.find(unpacked_key(self.files[0].remote))
        return entry.members if entry else ()

    @property
    def next_step(self) -> str:
        """The command that takes the set from here; of several files a packed one is best."""
        if not self.placed:
            return ""
        first = min(self.placed, key=lambda name: "pack" not in name.lower())
        return self.published.next_step.format(folder=self.folder, file=self.folder / first)


def plan_set(
    published: PublishedSet,
    config: DownloadConfig,
    web: Web,
    progress: Progress,
    *,
    is_read_only: bool = False,
) -> SetPlan:
    """List a set and compare with the disk.

    Raises:
        ConfigError: The chosen hub does not have it.
        InputError: A file of the user's own stands where one of the set would go.
        RunError: No hub answers, and there is no listing that vouches for a copy.
    """
    state = config.out / STATE / published.name
    folder = config.out / published.folder
    ledger = Ledger(state / _LEDGER, is_read_only=is_read_only)
    offline: UnreachableError | None = None
    try:
        place, remotes = _list_anywhere(published, config.hub, web, progress)
    except UnreachableError as err:
        offline = err
        place, remotes = _list_offline(published, state, config.source, err)
    else:
        if not is_read_only:
            _write_listing(state / _LISTING, place, remotes)

    files = []
    for remote in remotes:
        root = state if published.is_archive else folder
        part = inside(state / "parts", f"{remote.path}.part")
        files.append(FilePlan(remote, inside(root, remote.path), part))
    result = SetPlan(published, place, folder, state, ledger, files)
    _find_done(result, config.verify, progress)
    if offline is not None:
        is_complete = result.is_unpacked and result.fetch_bytes == 0
        if is_complete:
            logger.warning("%s; the copy in `%s` is complete and verified", offline, folder)
        elif config.source is None:
            raise offline
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


def _list_offline(
    published: PublishedSet, state: Path, source: Path | None, err: UnreachableError
) -> tuple[Place, list[RemoteFile]]:
    """Take the listing of an earlier run, here or in `source`, or the SHA256SUMS in `source`."""
    listings = [state / _LISTING]
    if source is not None:
        listings.append(source / STATE / published.name / _LISTING)
    for path in listings:
        if path.is_file():
            return _read_listing(path, published)
    remotes = [] if source is None else listing_of_sums(source, published)
    if remotes:
        return published.places[0], remotes
    if source is not None:
        err.hint = (
            f"offline, the checksums must come along: `{source}/SHA256SUMS` in the format of "
            "`sha256sum`, or the folder `.downloads` of a machine that has the set"
        )
    raise err


def _write_listing(path: Path, place: Place, remotes: list[RemoteFile]) -> None:
    tree = {"hub": place.hub, "files": [asdict(remote) for remote in remotes]}
    write_text(path, json.dumps(tree, ensure_ascii=False))


def _read_listing(path: Path, published: PublishedSet) -> tuple[Place, list[RemoteFile]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        place = next(place for place in published.places if place.hub == tree["hub"])
        return place, [RemoteFile(**fields) for fields in tree["files"]]
    except (ValueError, KeyError, TypeError, StopIteration) as err:
        raise InputError(
            f"`{path}` is not a listing of `{published.name}`: {err!r}",
            hint=f"remove it: `rm {path}`; the next run with a hub writes it again",
        ) from err


@dataclass(frozen=True, slots=True)
class _Check:
    """A file, its line in the ledger, and the digest that it should have."""

    path: str
    file: Path
    digest: str


def _find_done(item: SetPlan, verify: bool, progress: Progress) -> None:
    """Mark the files that are in place, hashing those that the ledger does not vouch for."""
    if item.published.is_archive:
        archive = item.files[0]
        item.is_unpacked = _is_unpacked(item, archive.remote, verify, progress)
        check = _Check(archive.remote.path, archive.target, archive.remote.digest)
        archive.is_done = item.is_unpacked or bool(_find_right(item, [check], verify, progress))
        return
    checks = [
        _Check(file.remote.path, file.target, file.remote.digest)
        for file in item.files
        if file.target.is_file() and file.target.stat().st_size == file.remote.size_bytes
    ]
    right = _find_right(item, checks, verify, progress)
    for file in item.files:
        file.is_done = file.remote.path in right
        if not file.is_done and file.target.exists() and item.ledger.find(file.remote.path) is None:
            raise InputError(
                f"`{file.target}` is there, but is not the file of set `{item.published.name}`",
                hint=f"move it away, or choose another folder: `--out {item.state.parents[1]}-2`",
            )


def _is_unpacked(item: SetPlan, remote: RemoteFile, verify: bool, progress: Progress) -> bool:
    entry = item.ledger.find(unpacked_key(remote))
    if entry is None or entry.digest != remote.digest:
        return False
    known = [(name, item.ledger.find(name)) for name in entry.members]
    checks = [_Check(name, inside(item.folder, name), line.digest) for name, line in known if line]
    return len(_find_right(item, checks, verify, progress)) == len(entry.members)


def _find_right(item: SetPlan, checks: list[_Check], verify: bool, progress: Progress) -> set[str]:
    """Return the paths of right files, by the ledger if that knows them, else by hashing."""
    right, doubtful = set(), []
    for check in checks:
        entry = item.ledger.find(check.path)
        is_known = item.ledger.is_unchanged(check.path, check.file)
        if not verify and is_known and entry and entry.digest == check.digest:
            right.add(check.path)
        elif check.file.is_file() and check.digest:
            doubtful.append(check)
    if doubtful:
        size_bytes = sum(check.file.stat().st_size for check in doubtful)
        with task(progress, f"verify {item.published.name}", size_bytes, "bytes"):
            for check in doubtful:
                if digest_file(check.file, check.digest, progress.advance) == check.digest:
                    item.ledger.add(check.path, check.file, check.digest)
                    right.add(check.path)
    return right


def unpacked_key(archive: RemoteFile) -> str:
    """Name the ledger's line about what came out of a zip; the zip's own line is its path."""
    return f"{archive.path}/"


@dataclass(frozen=True, slots=True)
class LocalState:
    """How much of a set is here, as far as can be told without a hub."""

    have_bytes: int
    total_bytes: int
    is_complete: bool


def look_at(published: PublishedSet, out: Path) -> LocalState:
    """Tell what an earlier run left of a set, by its listing and ledger; hashes nothing."""
    state, folder = out / STATE / published.name, out / published.folder
    if not (state / _LISTING).is_file():
        return LocalState(0, published.size_bytes, is_complete=False)
    _, remotes = _read_listing(state / _LISTING, published)
    ledger = Ledger(state / _LEDGER, is_read_only=True)
    have = total = 0
    is_complete = True
    for remote in remotes:
        total += remote.size_bytes
        if _looks_done(published, remote, ledger, state, folder):
            have += remote.size_bytes
        else:
            is_complete = False
            part = state / "parts" / f"{remote.path}.part"
            have += part.stat().st_size if part.is_file() else 0
    return LocalState(have, total, is_complete)


def _looks_done(
    published: PublishedSet, remote: RemoteFile, ledger: Ledger, state: Path, folder: Path
) -> bool:
    if not published.is_archive:
        return ledger.is_unchanged(remote.path, folder / remote.path)
    entry = ledger.find(unpacked_key(remote))
    return entry is not None and all(
        ledger.is_unchanged(name, folder / name) for name in entry.members
    )
