"""The faults of hubs and networks that every download has to survive, one row each.

`tests/cli/test_download_faults.py` drives `minillm download` through them,
`benchmarks/hub_faults.py` the hubs' own clients as well.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.data.loopback_hub import SLOW_CHUNK, Fault, LoopbackHub

REPO = "opencsg/Fineweb-Edu-Chinese-V2.1"
PATH = "4_5/0000.parquet"
DATA = random.Random(1).randbytes(12 * SLOW_CHUNK)
OTHER = {f"4_5/{i:04d}.parquet": random.Random(i).randbytes(2000 + i) for i in range(1, 4)}
EVIL = "4_5/../../evil.parquet"
HALF = len(DATA) // 2


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        arm: Makes the hub misbehave.
        is_lasting: The fault does not go away: the right end is an error with nothing accepted.
    """

    name: str
    arm: Callable[[LoopbackHub], None]
    is_lasting: bool = False


def fill(hub: LoopbackHub) -> None:
    """Put the set on the hub."""
    hub.repos[REPO] = {PATH: DATA, **OTHER, "README.md": b"#"}


def _on(path: str, *faults: tuple[str, dict[str, object]]) -> Callable[[LoopbackHub], None]:
    def arm(hub: LoopbackHub) -> None:
        hub.faults[path] = [Fault(kind, **knobs) for kind, knobs in faults]  # type: ignore[arg-type]

    return arm


def _status(
    path: str, status: int, times: int = 2, wait: str = ""
) -> Callable[[LoopbackHub], None]:
    headers = {"Retry-After": wait} if wait else {}
    return _on(path, ("status", {"status": status, "times": times, "headers": headers}))


def _climb(hub: LoopbackHub) -> None:
    hub.repos[REPO][EVIL] = b"evil"


def _mirror(hub: LoopbackHub) -> None:
    hub.links_to = "http://mirrored.invalid"


ALWAYS = 10_000
ROWS = (
    Row("body cut", _on(PATH, ("cut", {"at": HALF}))),
    Row("one flipped byte, once", _on(PATH, ("flip", {"at": 70_000}))),
    Row("one flipped byte, always", _on(PATH, ("flip", {"at": 70_000, "times": ALWAYS})), True),
    Row("right size, other content", _on(PATH, ("other", {"times": ALWAYS})), True),
    Row("429 with Retry-After, file", _status(PATH, 429, times=1, wait="1")),
    Row("429 with Retry-After, listing", _status("listing", 429, times=1, wait="1")),
    Row("500 twice, file", _status(PATH, 500)),
    Row("503 twice, file", _status(PATH, 503)),
    Row("500 twice, listing", _status("listing", 500)),
    Row("503 twice, listing", _status("listing", 503)),
    Row(
        "server ignores Range",
        _on(PATH, ("cut", {"at": HALF}), ("ignore_range", {"times": ALWAYS})),
    ),
    Row("object shorter than listed", _on(PATH, ("short", {"at": HALF, "times": ALWAYS})), True),
    Row("log-in page instead of the file", _on(PATH, ("html", {"times": ALWAYS})), True),
    Row("mirror links to its original", _mirror),
    Row("`../` in the listing", _climb, True),
)
