"""Unpack a zip so that all of it is there or nothing, and nothing lands outside the folder.

A member that climbs with `..`, a link, a name that appears twice or a wrong CRC refuses the whole
archive. The price is disk: zip and unpacked files lie side by side until the last CRC was right.
"""

import lzma
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from minillm.data.fetch import Hasher
from minillm.data.hub import inside
from minillm.errors import RunError
from minillm.files import atomic_folder, human_bytes, require_free_space
from minillm.log import Progress, task

_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError),
    *(FileExistsError, NotADirectoryError, IsADirectoryError),  # `a` and `a/b`, or `A` and `a`
)
_CHUNK_BYTES = 1 << 20


def unpack(
    archive: Path,
    folder: Path,
    progress: Progress,
    *,
    ours: Callable[[Path], bool],
    record: Callable[[dict[str, str], Path], None] = lambda _digests, _fresh: None,
) -> dict[str, str]:
    """Make `folder` hold the files of a zip.

    Args:
        archive: A zip file.
        folder: Replaced whole.
        progress: Told of unpacked bytes.
        ours: Tells whether an entry of an earlier `folder` may be replaced.
        record: Told of all digests, and of the folder where the files are still, just before they
            are put in place.

    Returns:
        `sha256:HEX` of each file by its path inside the zip.

    Raises:
        RunError: The zip is broken, or a member would not be a plain file inside `folder`.
        InputError: `folder` holds files that are not ours.
        SetupError: The disk cannot hold the unpacked files.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = _check_members(bundle, archive)
            size_bytes = sum(member.file_size for member in members)
            require_free_space(folder, size_bytes, f"unpacking `{archive.name}`")
            with (
                atomic_folder(folder, ours=ours) as fresh,
                task(progress, f"unpack {archive.name}", size_bytes, "bytes"),
            ):
                digests = {
                    member.filename: _extract(bundle, member, fresh, progress) for member in members
                }
                record(digests, fresh)
        return digests
    except _BROKEN as err:
        raise RunError(
            f"`{archive}` cannot be unpacked: {err}",
            hint=f"its checksum was right, so the published file is broken; `rm {archive}` "
            f"frees its {human_bytes(archive.stat().st_size)}",
        ) from err


def _check_members(bundle: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    members = [member for member in bundle.infolist() if not member.is_dir()]
    names = {member.filename for member in members}
    for member in members:
        inside(archive.parent, member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise RunError(
                f"`{archive}` holds `{member.filename}`, which is a link or a device",
                hint="nothing was unpacked; do not trust this archive",
            )
    if len(names) < len(members):
        raise RunError(
            f"`{archive}` holds a file name twice", hint="nothing was unpacked; it is broken"
        )
    return members


def _extract(
    bundle: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, progress: Progress
) -> str:
    target = inside(folder, member.filename)
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher = Hasher("sha256:", member.file_size)
    with bundle.open(member) as source, target.open("xb") as stream:
        while chunk := source.read(_CHUNK_BYTES):  # a wrong CRC raises at the last one
            stream.write(chunk)
            hasher.update(chunk)
            progress.advance(len(chunk))
    return hasher.digest()
