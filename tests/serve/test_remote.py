"""`minillm chat --url`: a real server on loopback, the real command, errors in two lines."""

import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.errors import ConfigError, InputError
from minillm.serve.chat import Session
from minillm.serve.remote import RemoteSpeaker, base_url
from minillm.settings import SamplingConfig

MODEL = "lab/scripted"


@pytest.fixture
def session(server: Any) -> Iterator[Session]:
    with contextlib.closing(RemoteSpeaker(server.url)) as speaker:
        yield Session(speaker, SamplingConfig(max_tokens=50))


def say(session: Session, text: str, kind: str = "text") -> str:
    return "".join(part.text for part in session.ask(text) if part.kind == kind)


def test_the_answer_is_the_servers_and_usage_makes_the_statistics(session: Session) -> None:
    assert isinstance(session.speaker, RemoteSpeaker)
    assert session.speaker.model == MODEL
    assert session.speaker.max_context == 400
    assert say(session, "chinese") == "你好，世界 🙂‍↔️\u2028\n"
    assert say(session, "hi") == "Hello!"
    assert session.stats is not None
    assert session.stats.num_tokens == 3
    prompt = "[user]chinese[assistant]你好，世界 🙂‍↔️\u2028\n[user]hi[assistant]"
    assert session.stats.context_tokens == len(prompt.encode()) + 3


def test_the_think_part_is_told_from_the_answer(session: Session) -> None:
    assert say(session, "think", "think") == "let me see"
    assert say(session, "think") == "42"
    session.think = True
    assert say(session, "hi", "think") == "Hello!", "the prompt opened the tag"


def test_settings_reach_the_server(session: Session, server: Any) -> None:
    session.settings = SamplingConfig(temperature=0.25, top_k=7, max_tokens=9, seed=3)
    say(session, "hi")
    seen = server.generator.seen[-1]
    assert (seen.temperature, seen.top_k, seen.max_tokens, seen.seed) == (0.25, 7, 9, 3)


def test_a_stopped_answer_is_kept_and_the_server_stops_too(session: Session, server: Any) -> None:
    session.settings = SamplingConfig(max_tokens=100_000)
    cancel = threading.Event()
    timer = threading.Timer(0.1, cancel.set)
    timer.start()
    said = "".join(part.text for part in session.ask("slow", cancel))
    server.wait_idle(1)
    assert said
    assert session.turns[-1] == {"role": "assistant", "content": said}


def test_the_oldest_turns_go_when_the_server_says_the_context_is_full(session: Session) -> None:
    for count in range(9):
        say(session, f"number {count} {'x' * 40}")
    assert session.turns[-2]["content"].startswith("number 8")
    assert not session.turns[0]["content"].startswith("number 0")
    before = list(session.turns)
    with pytest.raises(InputError, match="context"):
        say(session, "y" * 500)
    assert session.turns == before


def test_a_server_that_fails_in_mid_answer_is_an_error(session: Session) -> None:
    with pytest.raises(Exception, match="failed: "):
        say(session, "boom")
    assert say(session, "hi") == "Hello!"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:y"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="http address"):
        base_url(url)


def run(*arguments: str, given: str = "hi") -> Any:
    return CliRunner().invoke(app, ["chat", *arguments], input=given)


def check_error(result: Any, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert all(word in result.stderr for word in words), result.stderr


def test_errors_of_a_server_are_two_lines(server: Any, serve: Any, scripted: Any) -> None:
    check_error(run("--url", "http://127.0.0.1:9"), 5, "127.0.0.1:9", "minillm serve")
    check_error(run("--url", server.url, "--model", "no/such"), 2, "no/such", "curl")
    check_error(run("--url", f"{server.url}/health"), 2, "/health/models")
    with serve(scripted(), api_key="secret") as locked:
        check_error(run("--url", locked.url), 2, "--api-key")
        check_error(run("--url", locked.url, "--api-key", "wrong"), 2, "--api-key")
        assert run("--url", locked.url, "--api-key", "secret").stdout == "Hello!\n"


def test_piped_with_a_url_is_one_answer_and_neither_torch_nor_transformers(server: Any) -> None:
    code = (
        "import sys\nfrom minillm.__main__ import main\n"
        "try:\n main()\nfinally:\n"
        " print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", "--url", server.url],
        input="think",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("42\n", "[]\n")


@pytest.fixture
def child(server: Any, tmp_path: Path) -> Iterator[Any]:
    """The real command in a terminal of 80 columns, against the server."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody here answers where the cursor is
    arguments = ["-m", "minillm", "chat", "--url", server.url, "--max-tokens", "100000"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pexpect forks; Python 3.12 warns
        made = pexpect.spawn(
            sys.executable,
            arguments,
            env=environment,
            dimensions=(40, 80),
            encoding="utf-8",
            timeout=20,
        )
    made.expect("/help lists the commands")
    made.expect("›")
    yield made
    made.close(force=True)


def test_a_terminal_chat_with_a_server(child: Any, server: Any) -> None:
    child.send("chinese\r")
    child.expect("你好，世界 🙂‍↔️")
    child.expect("4 tokens")
    child.expect("›")
    child.send('"""hi\rhi"""\r')  # several lines
    child.expect("ok")
    child.send("never sent\x03")
    child.expect("›")
    child.send("think\r")
    child.expect("thinking …")
    child.expect(r"▸ thought for [0-9.]+ s")
    child.expect("42")
    child.send("slow\r")
    child.expect("xxxx")
    time.sleep(0.2)
    child.sendintr()
    child.expect("stopped · [0-9]+ tokens")
    server.wait_idle(5)
    child.send("/undo\r")
    child.expect("took back: slow")
    child.send("hi\r")
    child.expect("Hello!")
    child.expect("›")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
