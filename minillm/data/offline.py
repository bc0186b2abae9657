"""Files that were fetched by other means: find them in a folder, and the checksums beside them."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from minillm.data.catalog import PublishedSet
from minillm.data.fetch import RemoteFile
from minillm.errors import InputError
from minillm.log import logger

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")


def find_in(source: Path, published: PublishedSet, path: str) -> Path | None:
    """Return the file that stands for a listed path.

    It is looked for at that path below `source`, where a download into `source` would have put it,
    and by its bare name.
    """
    name = path.rpartition("/")[2]
    places = (source / path, source / published.folder / path, source / name)
    return next((file for file in places if file.is_file()), None)


def require_folder(source: Path) -> None:
    """Refuse a `--from` that is not a folder.

    Raises:
        InputError: It is a file, or not there.
    """
    if not source.is_dir():
        raise InputError(
            f"`--from {source}` is not a folder",
            hint="name the folder that holds the files, not the files themselves",
        )


def listing_of_sums(source: Path, published: PublishedSet) -> list[RemoteFile]:
    """Make a listing from `SHA256SUMS` in `source`, as `sha256sum` writes it.

    Returns:
        The files of the set that it names and that are in `source`; none if there is no such file.
    """
    sums = source / SUMS
    if not sums.is_file():
        return []
    place = published.places[0]
    found = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None:
            continue
        name = match[2].rpartition("/")[2]
        path = f"{place.folder}/{name}" if place.folder else name
        file = find_in(source, published, path)
        if file is not None and any(fnmatchcase(path, pattern) for pattern in place.pattern):
            digest = f"sha256:{match[1].lower()}"
            found[path] = RemoteFile(path, file.stat().st_size, digest, f"{sums}")
    if found:
        logger.warning("no hub: %d files are checked against `%s` alone", len(found), sums)
    return [found[path] for path in sorted(found)]
