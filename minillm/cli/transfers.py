"""The display of a download: one bar for everything, and one for each file that is on its way."""

from rich.progress import TaskID

from minillm.cli.console import Bar
from minillm.files import human_bytes

MIN_BYTES = 1_000_000  # smaller files come and go too fast for a bar
NAME_WIDTH = 32


class Transfers(Bar):
    """A `Bar` with a row per file; where stderr is piped, files are counted beside the total."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[int, tuple[TaskID | None, int]] = {}
        self._moved: dict[int, int] = {}
        self._keys = self._num_ended = 0

    def start(self, what: str, total: float | None, unit: str) -> None:
        """Begin a task."""
        self._num_ended = 0
        super().start(what, total, unit)

    def begin_file(self, name: str, size_bytes: int) -> int:
        """Open a row."""
        self._keys += 1
        row = None
        if self._live is not None and size_bytes >= MIN_BYTES:
            short = name if len(name) <= NAME_WIDTH else f"…{name[-NAME_WIDTH + 1 :]}"
            row = self._live.add_task(f"  {short}", total=size_bytes, state="")
        self._files[self._keys] = (row, size_bytes)
        self._moved[self._keys] = 0
        return self._keys

    def advance_file(self, key: int, amount: int) -> None:
        """Move a row."""
        row, size_bytes = self._files[key]
        self._moved[key] += amount
        if self._live is not None and row is not None:
            state = f"{human_bytes(self._moved[key])}/{human_bytes(size_bytes)}"
            self._live.update(row, completed=self._moved[key], state=state)

    def end_file(self, key: int) -> None:
        """Close a row."""
        row, _ = self._files.pop(key)
        del self._moved[key]
        self._num_ended += 1
        self.note(f"{self._num_ended:,} files")
        if self._live is not None and row is not None:
            self._live.remove_task(row)
