"""`minillm download` as its own process: killed, stopped, out of disk, two at once, and asked."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pexpect
import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.data.fetch import CHUNK_BYTES
from tests.data.loopback_hub import Fault, LoopbackHub, running_hub

FINEWEB = "opencsg/Fineweb-Edu-Chinese-V2.1"
NAME = "4_5/0000.parquet"
DATA = random.Random(1).randbytes(24 * CHUNK_BYTES)
HUBS = ["modelscope", "huggingface"]
each_hub = pytest.mark.parametrize("name", HUBS)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        hub.repos[FINEWEB][NAME] = DATA
        yield hub


# a script's background job ignores SIGINT, and so would the command
HEED = partial(signal.signal, signal.SIGINT, signal.default_int_handler)


def start(out: Path, *more: str, before: Callable[[], object] = HEED) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "minillm", "download", "--set", "2", "--out", str(out), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=before)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said
    return process.returncode, said


def go_on(out: Path, name: str) -> None:
    """Run the same command again, in this process: it begins no sooner than the other has ended."""
    result = CliRunner().invoke(app, ["download", "2", "--hub", name, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "OK 1 files, checksums verified" in result.stderr
    assert target(out).read_bytes() == DATA


def target(out: Path) -> Path:
    return out / "raw/fineweb-edu-zh" / NAME


def part(out: Path) -> Path:
    return out / ".downloads/fineweb-edu-zh/parts" / f"{NAME}.part"


def wait_for_bytes(out: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while not (part(out).exists() and part(out).stat().st_size >= count):
        assert time.monotonic() < deadline, "no bytes arrived"
        time.sleep(0.005)


@each_hub
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download_goes_on_where_it_was(
    hub: LoopbackHub, tmp_path: Path, name: str, how: signal.Signals
) -> None:
    hub.faults[NAME] = [Fault("stall", at=5 * CHUNK_BYTES)]
    process = start(tmp_path, "--hub", name)
    wait_for_bytes(tmp_path, 5 * CHUNK_BYTES)
    process.send_signal(how)
    code, said = finish(process)
    kept = part(tmp_path).stat().st_size
    assert kept == 5 * CHUNK_BYTES
    assert not target(tmp_path).exists()
    if how == signal.SIGINT:
        assert code == 130
        assert "the same command continues" in said

    hub.forget()
    go_on(tmp_path, name)
    assert [request.range for request in hub.bodies()] == [f"bytes={kept}-"]
    assert hub.sent_bytes == len(DATA) - kept


def test_ctrl_c_does_not_wait_for_a_silent_server(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults[NAME] = [Fault("stall", at=CHUNK_BYTES)]
    process = start(tmp_path)
    wait_for_bytes(tmp_path, CHUNK_BYTES)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert finish(process)[0] == 130
    assert time.monotonic() - begin < 10  # the server is silent for a minute
    assert part(tmp_path).stat().st_size == CHUNK_BYTES


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a file system of its own; an ordinary user does so in a name space."""
    folder.mkdir()
    options = f"size={size_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@each_hub
def test_a_disk_that_fills_up_meanwhile_loses_nothing(
    hub: LoopbackHub, tmp_path: Path, name: str
) -> None:
    with small_disk(tmp_path / "disk", len(DATA) * 6 // 5) as out:
        hub.faults[NAME] = [Fault("stall", at=CHUNK_BYTES)]
        process = start(out, "--hub", name)
        wait_for_bytes(out, CHUNK_BYTES)
        with (out / "other").open("wb") as other:  # somebody else's file
            other.write(bytes(len(DATA) * 3 // 5))
        hub.released.set()
        code, said = finish(process)
        assert code == 4, said
        assert "the disk is full while writing" in said
        assert not target(out).exists()
        kept = part(out).stat().st_size
        assert CHUNK_BYTES < kept < len(DATA)

        (out / "other").unlink()
        hub.forget()
        go_on(out, name)
        assert hub.sent_bytes == len(DATA) - kept


def test_a_limit_on_the_size_of_files_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3 * CHUNK_BYTES + 5,) * 2)
    code, said = finish(start(tmp_path, before=limit))
    assert code == 4, said
    assert "takes no larger" in said
    assert not target(tmp_path).exists()
    assert part(tmp_path).stat().st_size == 3 * CHUNK_BYTES + 5
    go_on(tmp_path, "auto")


def test_two_processes_on_one_target_do_not_mix(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults[NAME] = [Fault("stall", at=CHUNK_BYTES)]
    first = start(tmp_path)
    wait_for_bytes(tmp_path, CHUNK_BYTES)
    code, said = finish(start(tmp_path))
    hub.released.set()
    assert code == 5
    assert "another process is writing" in said
    assert finish(first)[0] == 0
    assert target(tmp_path).read_bytes() == DATA
    assert len(hub.bodies()) == 1


def test_a_bare_command_on_a_terminal_asks(hub: LoopbackHub, tmp_path: Path) -> None:
    arguments = ["-m", "minillm", "download", "--out", str(tmp_path)]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "50", "NO_COLOR": "1"}
    shell = pexpect.spawn(sys.executable, arguments, env=env, encoding="utf-8", timeout=30)
    shell.setwinsize(50, 100)
    shell.expect("fineweb-edu-zh.*sets to download")
    shell.send("fineweb-edu\r")
    shell.expect("did you mean `fineweb-edu-zh`")
    shell.send("-zh\r")
    shell.expect(r"to fetch: 6\.3 MB")
    shell.expect("fetch this now")
    shell.send("\r")
    shell.expect("OK 1 files")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0
    assert target(tmp_path).read_bytes() == DATA

    listed = CliRunner().invoke(app, ["download", "--out", str(tmp_path)]).stdout
    assert re.search(r"fineweb-edu-zh +70\.0 GB +all", listed)
