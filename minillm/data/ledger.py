"""What `minillm download` has put in place, so that a second run need not hash it again.

One JSON line per verified file, only ever appended: a crash can spoil the last line, which is then
ignored, and the file it spoke of is hashed once more. A file counts as unchanged while its size and
its times of modification and of change are those of its line: no program can write to it and set
the latter back. What a disk loses by itself is seen by `--verify` only.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.files import named_os_errors


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was whole and right when this line was written.

    Attributes:
        path: Below the set's folder; of an archive: its name in the repository.
        members: Of an archive: the files that were unpacked from it.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    digest: str
    members: tuple[str, ...] = ()


class Ledger:
    """The lines of one set.

    Args:
        path: The file; need not exist.
        is_read_only: Remember new entries, but do not write them (a dry run).
    """

    def __init__(self, path: Path, *, is_read_only: bool = False) -> None:
        self._path, self._is_read_only = path, is_read_only
        self._entries: dict[str, Entry] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            fields = json.loads(line)
            entry = Entry(**{**fields, "members": tuple(fields["members"])})
        except (ValueError, TypeError, KeyError):
            return
        self._entries[entry.path] = entry

    def find(self, path: str) -> Entry | None:
        """Return the last line about a path."""
        return self._entries.get(path)

    def is_unchanged(self, path: str, file: Path) -> bool:
        """Tell whether `file` still has the size and times of its line."""
        entry = self.find(path)
        if entry is None or not file.is_file():
            return False
        stat = file.stat()
        found = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return found == (entry.size_bytes, entry.mtime_ns, entry.ctime_ns)

    def add(self, path: str, file: Path, digest: str, members: tuple[str, ...] = ()) -> None:
        """Write down that `file` was verified just now."""
        stat = file.stat()
        entry = Entry(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest, members)
        self._entries[path] = entry
        if not self._is_read_only:
            with named_os_errors(self._path), self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
