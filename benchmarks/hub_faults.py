"""What `minillm download` and the hubs' own clients do at each fault of a hub: a Markdown table.

    python benchmarks/hub_faults.py --clients VENV/bin/python

VENV holds `modelscope` and `huggingface_hub` (`pip install modelscope huggingface_hub`). Every cell
is one or two real processes against the loopback hub of the tests, which is at the same time the
proof that it speaks both protocols: its first row has no fault.
"""

import argparse
import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.data.hub_faults import DATA, OTHER, PATH, REPO, ROWS, fill
from tests.data.loopback_hub import Fault, LoopbackHub, running_hub

LIMIT_S = 240
HF_CLIENT = (
    "import sys; from huggingface_hub import snapshot_download as get\n"
    f"get({REPO!r}, repo_type='dataset', allow_patterns='4_5/*', local_dir=sys.argv[1])"
)
MS_CLIENT = (
    "import sys; from modelscope import dataset_snapshot_download as get\n"
    f"get({REPO!r}, allow_patterns='4_5/*', local_dir=sys.argv[1])"
)


@dataclass(frozen=True)
class Client:
    """A program that downloads the set into a folder."""

    title: str
    command: list[str]
    root: str

    def start(self, out: Path, hub: LoopbackHub) -> "subprocess.Popen[str]":
        """Run it against the hub."""
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "MODELSCOPE_ENDPOINT": hub.url,
            "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(out.parent / "home"),
            "MODELSCOPE_CACHE": str(out.parent / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        pipe = subprocess.PIPE
        command = [word.replace("OUT", str(out)) for word in self.command]
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


Cell = Callable[[Client, LoopbackHub, Path], str]


def judge(client: Client, process: "subprocess.Popen[str]", out: Path) -> str:
    """Say in a few words how a run ended."""
    try:
        said = process.communicate(timeout=LIMIT_S)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"**no end** in {LIMIT_S} s"
    if list(out.parent.parent.rglob("evil*")):
        return "**writes outside the folder**"
    path = out / client.root / PATH
    wrong = path.is_file() and path.read_bytes() != DATA
    if process.returncode == 0:
        if wrong:
            return "**wrong bytes, taken as right**"
        files = {p.name: p.read_bytes() for p in (out / client.root).rglob("*.parquet")}
        wanted = {Path(name).name: data for name, data in {PATH: DATA, **OTHER}.items()}
        return "right bytes" if files == wanted else "**files missing, taken as right**"
    names = re.findall(r"\b[A-Z]\w*(?:Error|Exception|NotFound)\b", said)
    how = f"exit code {process.returncode}" if "error: " in said else names[-1] if names else "?"
    return f"error ({how})" + (", **wrong file left**" if wrong else "")


def plain(arm: Callable[[LoopbackHub], None]) -> Cell:
    """One run with the fault in place."""

    def run(client: Client, hub: LoopbackHub, out: Path) -> str:
        arm(hub)
        return judge(client, client.start(out, hub), out)

    return run


def killed(client: Client, hub: LoopbackHub, out: Path) -> str:
    """SIGKILL when half the body has been sent, then run again."""
    hub.faults[PATH] = [Fault("slow", times=99)]
    process = client.start(out, hub)
    deadline = time.monotonic() + 60
    while not hub.is_sending and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.35)  # some seven chunks of twelve
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.faults.clear()
    hub.forget()
    ended = judge(client, client.start(out, hub), out)
    again = sum(r.sent_bytes for r in hub.bodies() if PATH.split("/")[1] in r.path)
    return f"{ended}, {again / len(DATA):.0%} fetched"


def damaged(client: Client, hub: LoopbackHub, out: Path) -> str:
    """A good run, then one byte of the file changes on the disk, then run again."""
    first = judge(client, client.start(out, hub), out)
    if first != "right bytes":
        return first
    path = out / client.root / PATH
    path.write_bytes(b"\0" + DATA[1:])
    return judge(client, client.start(out, hub), out)


def hub_down(client: Client, hub: LoopbackHub, out: Path) -> str:
    """A good run, then the hub goes away, then run again."""
    first = judge(client, client.start(out, hub), out)
    if first != "right bytes":
        return first
    url, hub.url = hub.url, "http://127.0.0.1:9"
    try:
        return judge(client, client.start(out, hub), out)
    finally:
        hub.url = url


def full_disk(client: Client, hub: LoopbackHub, out: Path) -> str:
    """The disk, a tmpfs, fills up in mid-file; then there is room again, and run again."""
    out.mkdir(parents=True)
    size = f"size={len(DATA) * 6 // 5}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", out], check=True)
    try:
        hub.faults[PATH] = [Fault("slow")]
        process = client.start(out, hub)
        deadline = time.monotonic() + 60
        while not hub.is_sending and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.suppress(OSError), (out / "filler").open("wb", buffering=0) as other:
            other.write(bytes(len(DATA) * 3 // 5))
        first = judge(client, process, out)
        (out / "filler").unlink()
        hub.faults.clear()
        second = judge(client, client.start(out, hub), out)
        return f"{first}; with room: {second}"
    finally:
        subprocess.run(["umount", "-l", out], check=True)


def cells() -> Iterator[tuple[str, Cell]]:
    """Yield the rows of the table."""
    yield "no fault", plain(lambda _: None)
    for row in ROWS:
        yield row.name, plain(row.arm)
    yield "killed at 7/12, run again", killed
    yield "file damaged later, run again", damaged
    yield "disk full in mid-file", full_disk
    yield "hub down, complete copy here", hub_down


def versions(python: str) -> list[str]:
    """Return the versions of the two clients."""
    code = (
        "from importlib.metadata import version as v\nprint(v('modelscope'), v('huggingface_hub'))"
    )
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", required=True, help="Python with both clients installed.")
    parser.add_argument("--only", default="", help="Rows whose name holds this.")
    options = parser.parse_args()
    ours = [sys.executable, "-m", "minillm", "download", "--set", "2", "--out", "OUT", "--hub"]
    modelscope, huggingface = versions(options.clients)
    clients = [
        Client("minillm, ModelScope", [*ours, "modelscope"], "raw/fineweb-edu-zh"),
        Client("minillm, Hugging Face", [*ours, "huggingface"], "raw/fineweb-edu-zh"),
        Client(f"modelscope {modelscope}", [options.clients, "-c", MS_CLIENT, "OUT"], ""),
        Client(f"huggingface_hub {huggingface}", [options.clients, "-c", HF_CLIENT, "OUT"], ""),
    ]
    print("| fault |", " | ".join(client.title for client in clients), "|")
    print("|---" * (len(clients) + 1) + "|")
    for name, cell in cells():
        if options.only not in name:
            continue
        found = []
        for client in clients:
            with running_hub() as hub:
                fill(hub)
                base = Path(tempfile.mkdtemp(prefix="hub"))
                try:
                    found.append(cell(client, hub, base / "a" / "out"))
                finally:
                    shutil.rmtree(base, ignore_errors=True)
        print(f"| {name} |", " | ".join(found), "|", flush=True)
    print(f"\nPython {sys.version.split()[0]}, {datetime.date.today()}")


if __name__ == "__main__":
    main()
