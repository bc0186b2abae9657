"""The terminal chat: turns and trimming, commands, line breaks, keys, and the piped form."""

import base64
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.utils import get_cwidth

from minillm.errors import ConfigError, InputError
from minillm.serve.chat import Session, Stats
from minillm.serve.commands import HELP, Commands
from minillm.serve.source import find_source, short_name
from minillm.serve.speaker import LocalSpeaker
from minillm.serve.terminal import Terminal, is_open_block, read_message, unquote, write_answer
from minillm.serve.think import ThinkSplitter
from minillm.serve.wrap import Wrapper
from minillm.settings import SamplingConfig


@pytest.fixture
def session(scripted: Any) -> Session:
    return Session(LocalSpeaker(scripted(delay_s=0.002)), SamplingConfig(max_tokens=50))


def say(session: Session, text: str) -> str:
    return "".join(part.text for part in session.ask(text) if part.kind == "text")


# ------------------------------------------------------------------------------------- think


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("answer", "think", "text"),
    [
        ("<think>\na b\n</think>\n\nc", "a b", "c"),
        (" \n<think>a</think>", "a", ""),
        ("<think>never closed ", "never closed", ""),
        ("<think>a</thin</think>b </think>", "a</thin", "b </think>"),
        ("no <think>tag</think> here", "", "no <think>tag</think> here"),
        ("<thinner", "", "<thinner"),
        ("<th", "", "<th"),
        (" x ", "", " x "),
    ],
)
def test_the_think_part_is_split_however_the_text_arrives(
    size: int, answer: str, think: str, text: str
) -> None:
    splitter = ThinkSplitter()
    parts = [
        part for at in range(0, len(answer), size) for part in splitter.feed(answer[at : at + size])
    ]
    parts += splitter.flush()
    assert "".join(p.text for p in parts if p.kind == "think") == think
    assert "".join(p.text for p in parts if p.kind == "text") == text


# ------------------------------------------------------------------------------------- turns


def test_the_history_is_in_the_next_prompt_without_the_think_part(session: Session) -> None:
    session.system = "S"
    assert say(session, "think") == "42"
    say(session, "hi")
    expected = "[system]S[user]think[assistant]42[user]hi[assistant]"
    assert session.speaker.source.prompts[-1] == expected  # type: ignore[attr-defined]


def test_stats_count_tokens_and_context(session: Session) -> None:
    say(session, "hi")
    assert session.stats is not None
    assert session.stats.num_tokens == 3
    assert session.stats.context_tokens == len("[user]hi[assistant]") + 3


def test_the_line_of_statistics() -> None:
    line = str(Stats(42, 0.0351, 41 / 118, 310, 2048))
    assert line == "42 tokens · 118 tok/s · first 35 ms · context 310/2048"


def test_a_stopped_answer_is_kept_as_far_as_it_went(session: Session) -> None:
    cancel = threading.Event()
    for count, _ in enumerate(session.ask("slow", cancel)):
        if count == 3:
            cancel.set()
    assert session.turns[-1] == {"role": "assistant", "content": "xxxx"}


def test_a_question_without_any_answer_is_not_kept(session: Session) -> None:
    assert say(session, "empty") == ""
    assert session.turns == []


def test_a_failed_question_is_not_kept(session: Session) -> None:
    say(session, "hi")
    with pytest.raises(InputError, match="context holds 400"):
        say(session, "x" * 500)
    assert [turn["content"] for turn in session.turns] == ["hi", "Hello!"]


def test_the_oldest_turns_go_with_a_notice_before_the_context_is_full(session: Session) -> None:
    notices = []
    for count in range(20):
        word = f"number {count:02}"
        notices += [part.text for part in session.ask(word) if part.kind == "notice"]
        assert session.turns[-2]["content"] == word
        assert session.context_tokens() + 50 <= 400 + len("ok[assistant]")
    assert notices
    assert "oldest" in notices[0]
    assert session.turns[0]["role"] == "user"


def test_an_answer_never_outgrows_the_context(session: Session) -> None:
    session.settings = SamplingConfig(max_tokens=10_000)
    say(session, "hi")
    room = 400 - len("[user]hi[assistant]")
    assert session.speaker.source.seen[-1].max_tokens == room  # type: ignore[attr-defined]


def test_undo_takes_back_one_question_and_answer(session: Session) -> None:
    say(session, "hi")
    say(session, "other")
    assert session.undo() == "other"
    assert [turn["content"] for turn in session.turns] == ["hi", "Hello!"]


# ---------------------------------------------------------------------------------- commands


def test_every_listed_command_exists(session: Session) -> None:
    commands = Commands(session)
    for usage, _ in HELP:
        name, *argument = usage.split()
        assert name in commands.run("/help").text
        if name == "/think":
            commands.run("/think off")
        elif "FILE" in argument:
            with pytest.raises(ConfigError, match="needs a file"):
                commands.run(name)
        else:
            commands.run(name)


def test_set_changes_a_setting_and_lists_them(session: Session) -> None:
    commands = Commands(session)
    commands.run("/set temperature 0.2")
    commands.run("/set max_tokens 7")
    commands.run("/set seed 3")
    commands.run("/set think on")
    assert session.settings == SamplingConfig(temperature=0.2, max_tokens=7, seed=3)
    assert session.think
    listed = commands.run("/set").text
    assert "temperature          0.2" in listed
    assert "think                on" in listed
    commands.run("/set seed none")
    assert session.settings.seed is None


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/st", "/set"),
        ("/set temprature 1", "temperature"),
        ("/set temperature hot", "temperature"),
        ("/set temperature -1", "temperature"),
        ("/set think maybe", "think on"),
        ("/save", "chat.json"),
        ("/xyzzy", "/help"),
    ],
)
def test_a_wrong_command_says_what_would_work(session: Session, line: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Commands(session).run(line)
    assert hint in str(caught.value.hint)


def test_regenerate_asks_the_last_question_again(session: Session) -> None:
    say(session, "hi")
    outcome = Commands(session).run("/regenerate")
    assert (outcome.action, outcome.question, session.turns) == ("ask", "hi", [])


def test_a_saved_conversation_loads_as_it_was(
    session: Session, tmp_path: Path, scripted: Any
) -> None:
    session.system, session.think = "你是助手", True
    session.settings = SamplingConfig(temperature=0.1, seed=5)
    say(session, "chinese")
    path = tmp_path / "chat.json"
    Commands(session).run(f"/save {path}")
    other = Session(LocalSpeaker(scripted()))
    Commands(other).run(f"/load {path}")
    for name in ("system", "think", "settings", "turns"):
        assert getattr(other, name) == getattr(session, name)
    assert "你是助手" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"messages": [{"role": "x", "content": "y"}]}', '{"messages": [1]}', "\x00"],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    session: Session, tmp_path: Path, text: str
) -> None:
    say(session, "hi")
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not a saved conversation"):
        session.load(path)
    with pytest.raises(InputError, match="cannot read"):
        session.load(tmp_path / "none.json")
    assert len(session.turns) == 2


# ------------------------------------------------------------------------------- line breaks


def wrapped(text: str, width: int, size: int) -> str:
    wrapper = Wrapper(width)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return "".join(wrapper.feed(piece) for piece in pieces) + wrapper.flush()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_no_line_is_wider_than_the_screen_and_nothing_is_lost(size: int) -> None:
    text = "你好，世界。This is a sentence (with words) 和中文混排，emoji 🙂🙂，" * 5 + "w" * 100
    shown = wrapped(text, 24, size)
    assert max(get_cwidth(line) for line in shown.split("\n")) <= 24
    assert shown.replace("\n", "").replace(" ", "") == text.replace(" ", "")


def test_words_are_not_cut_and_punctuation_begins_no_line() -> None:
    assert wrapped("one two three", 8, 1) == "one two\nthree"
    assert wrapped("你好世界，好", 8, 1) == "你好世\n界，好"
    assert wrapped("    code\n\nx", 8, 1) == "    code\n\nx"


# -------------------------------------------------------------------------------- the terminal


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PipeInput]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def typed(session: Session, keyboard: PipeInput, keys: str) -> str:
    screen = io.StringIO()
    keyboard.send_text(keys)
    Terminal(session, screen).run()
    return screen.getvalue()


def test_an_answer_is_followed_by_one_dim_line(session: Session, keyboard: PipeInput) -> None:
    screen = typed(session, keyboard, "hi\r\x04")
    assert screen.startswith("Hello!\n\x1b[2m3 tokens · ")
    assert "context" in screen


def test_the_think_part_is_dim(session: Session, keyboard: PipeInput) -> None:
    session.thoughts = "on"
    screen = typed(session, keyboard, "think\r/quit\r")
    assert screen.startswith("\x1b[2mlet\x1b[0m\x1b[2m me\x1b[0m\x1b[2m see\n\n\x1b[0m42\n")


def test_thoughts_are_folded_or_hidden(session: Session, keyboard: PipeInput) -> None:
    screen = typed(session, keyboard, "think\r/think off\rthink\r\x04")
    assert "let" not in screen
    assert screen.count("▸ thought for 0.0 s") == 1
    assert screen.count("42\n") == 2


def test_copy_puts_the_answer_on_the_clipboard_and_tab_completes(
    session: Session, keyboard: PipeInput
) -> None:
    screen = typed(session, keyboard, "chinese\r/cop\t\r\x04")
    payload = screen.split("\x1b]52;c;")[1].split("\x07")[0]
    assert base64.b64decode(payload).decode() == session.turns[-1]["content"]


def test_without_colour_there_is_no_escape(
    session: Session, keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in typed(session, keyboard, "think\r\x04")


def test_alt_enter_and_triple_quotes_write_several_lines(
    session: Session, keyboard: PipeInput
) -> None:
    typed(session, keyboard, 'a\x1b\rb\r"""c\rd"""\r\x04')
    asked = [turn["content"] for turn in session.turns if turn["role"] == "user"]
    assert asked == ["a\nb", "c\nd"]


def test_an_error_does_not_end_the_chat(session: Session, keyboard: PipeInput) -> None:
    screen = typed(session, keyboard, "/nope\rhi\r\x04")
    assert "error: no command `/nope`" in screen
    assert "Hello!" in screen


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(
    session: Session, keyboard: PipeInput
) -> None:
    screen = typed(session, keyboard, "never sent\x03hi\r\x03\x03never read\r")
    assert [turn["content"] for turn in session.turns] == ["hi", "Hello!"]
    assert screen.count("Ctrl-C again") == 1


def test_ctrl_c_while_answering_stops_the_answer_only(
    session: Session, keyboard: PipeInput
) -> None:
    def pieces() -> Iterator[str]:
        for count in range(300):
            if count == 20:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.002)
            yield "x"

    session.settings = SamplingConfig(max_tokens=300)
    source: Any = session.speaker.source
    source.script = {**source.script, "slow down": pieces()}
    screen = typed(session, keyboard, "slow down\rhi\r\x04")
    assert "stopped · " in screen
    said = [turn["content"] for turn in session.turns]
    assert said[0] == "slow down"
    assert 0 < len(said[1]) < 300
    assert said[2:] == ["hi", "Hello!"]


def test_what_was_typed_is_remembered_in_a_private_file(
    session: Session, keyboard: PipeInput, tmp_path: Path
) -> None:
    typed(session, keyboard, "hi\r\x04")
    history = tmp_path / "minillm" / "chat_history"
    assert "+hi" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_a_state_folder_that_cannot_be_made_is_no_obstacle(
    session: Session, keyboard: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert "Hello!" in typed(session, keyboard, "hi\r\x04")


@pytest.mark.parametrize(
    ("text", "is_open", "message"),
    [
        ('"""', True, ""),
        ('"""a', True, "a"),
        ('"""a\nb"""', False, "a\nb"),
        ('""""""', False, ""),
        ("  plain ", False, "plain"),
        ('say """', False, 'say """'),
    ],
)
def test_a_block_of_lines_is_open_until_its_quotes_close(
    text: str, is_open: bool, message: str
) -> None:
    assert is_open_block(text) is is_open
    assert unquote(text) == message


# ----------------------------------------------------------------------------------- piped


def piped(raw: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(raw))


def test_piped_text_is_one_message() -> None:
    assert read_message(piped("第一行\n第二行\n".encode())) == "第一行\n第二行"


@pytest.mark.parametrize("raw", [b"", b" \n", b"\xff\xfe"])
def test_a_piped_message_that_is_none_is_an_input_error(raw: bytes) -> None:
    with pytest.raises(InputError):
        read_message(piped(raw))


def test_a_piped_answer_is_the_text_and_nothing_else(session: Session) -> None:
    out = io.StringIO()
    write_answer(session.ask("think"), out)
    assert out.getvalue() == "42\n"


# ---------------------------------------------------------------------------- which model


def make_run(folder: Path, *, finished: bool = True, age_s: float = 0) -> None:
    (folder / "final").mkdir(parents=True)
    (folder / "run.toml").write_text("")
    stamp = time.time() - age_s
    os.utime(folder / "run.toml", (stamp, stamp))
    if finished:
        (folder / "final" / "COMPLETE").write_text("")


def test_auto_prefers_sft_then_pretrain_then_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find_source("auto")
    assert "minillm demo" in str(caught.value.hint)
    expected = [
        ("demo/runs/sft-m-1", True, 0),
        ("runs/pretrain-m-1", True, 0),
        ("runs/sft-m-1", True, 90),
        ("runs/sft-m-2", True, 10),
    ]
    for name, finished, age_s in expected:
        make_run(Path(name), finished=finished, age_s=age_s)
        assert find_source("auto") == name
    make_run(Path("runs/sft-m-3"), finished=False)
    assert find_source("auto") == "runs/sft-m-2"
    assert find_source("some/where") == "some/where"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("runs/sft-m-1", "sft-m-1"),
        ("runs/sft-m-1/", "sft-m-1"),
        ("runs/sft-m-1/final", "sft-m-1"),
        ("demo/runs/sft-m-1/checkpoints/step-0000010", "sft-m-1/step-0000010"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ],
)
def test_a_model_is_named_after_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if not source.startswith("Qwen"):
        Path(source).mkdir(parents=True)
    assert short_name(source) == name
