"""The terminal chat: input line, streamed answers, Ctrl-C. What is said is `chat.Session`'s.

Piped, it is a filter: one message in, one answer out, and nothing else on stdout.
"""

import base64
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from minillm.errors import InputError, MinillmError
from minillm.serve.answer_view import AnswerView
from minillm.serve.chat import Session, Speaker
from minillm.serve.commands import HELP, Commands
from minillm.serve.remote import RemoteSpeaker
from minillm.serve.think import Part
from minillm.serve.wrap import Wrapper
from minillm.settings import ChatConfig

BLOCK = '"""'


def run_chat(config: ChatConfig, prompt: str, announce: Callable[[str], None]) -> None:
    """Chat in the terminal; or answer `prompt` or what is piped in, once.

    Raises:
        InputError: There is no model, or nothing to answer.
        SetupError: The device is not there.
        RunError: The server of `--url` does not answer.
    """
    is_filter = bool(prompt) or not (sys.stdin.isatty() and sys.stdout.isatty())
    if is_filter and not prompt:
        prompt = read_message(sys.stdin)
    speaker, name = open_speaker(config, (lambda _: None) if is_filter else announce)
    with contextlib.closing(speaker):
        session = Session(speaker, config.sampling, config.system)
        if is_filter:
            write_answer(session.ask(prompt), sys.stdout)
            return
        limit = f" · context {speaker.max_context} tokens" if speaker.max_context else ""
        announce(f"{name}{limit} · /help lists the commands")
        Terminal(session, sys.stdout).run()


def open_speaker(config: ChatConfig, announce: Callable[[str], None]) -> tuple[Speaker, str]:
    """Return who answers, and its name; a server's model needs no torch here."""
    if config.url:
        model = "" if config.model == "auto" else config.model
        remote = RemoteSpeaker(config.url, api_key=config.api_key, model=model)
        return remote, f"{remote.model} at {remote.url}"
    from minillm.serve.source import find_source, short_name

    place = find_source(config.model)
    announce(f"loading `{place}`")
    from minillm.serve.speaker import load_speaker

    return load_speaker(config, place), short_name(place)


def read_message(stream: TextIO) -> str:
    """Return all that is piped in as one message.

    Raises:
        InputError: It is empty or not UTF-8.
    """
    try:
        text = stream.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise InputError("the piped message is not UTF-8") from None
    if not text:
        hint = "`minillm chat` in a terminal, or `echo 你好 | minillm chat`"
        raise InputError("the piped message is empty", hint=hint)
    return text


def write_answer(parts: Iterable[Part], out: TextIO) -> None:
    """Write the text of one answer and nothing else."""
    for part in parts:
        if part.kind == "text":
            out.write(part.text)
            out.flush()
    out.write("\n")


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C sets; the second one interrupts."""
    cancel = threading.Event()

    def handle(_signal: int, _frame: Any) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        with unechoed():
            yield cancel
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """Keep keys that are pressed meanwhile, `^C` above all, from being shown; where possible.

    And keep the terminal from dropping what it has not shown yet at Ctrl-C, which cuts characters.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        handle = sys.stdin.fileno()
        before = termios.tcgetattr(handle)
    except (termios.error, OSError, ValueError):  # not a terminal
        yield
        return
    silent = before.copy()
    silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH
    termios.tcsetattr(handle, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


class Terminal:
    """Reads lines, shows answers."""

    def __init__(self, session: Session, out: TextIO) -> None:
        """Talk to `session` on `out`, which is a terminal."""
        self._session, self._out = session, out
        self._commands = Commands(session)
        self._is_plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self._had_text = False
        self._input: PromptSession[str] = PromptSession(
            history=open_history(),
            key_bindings=self._keys(),
            multiline=True,
            completer=WordCompleter([usage.split()[0] for usage, _ in HELP], sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
        )

    def run(self) -> None:
        """Go on until `/quit`, Ctrl-D or Ctrl-C twice."""
        is_leaving = False
        while True:
            try:
                line = self._input.prompt("› ", prompt_continuation="  ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if self._had_text:
                    is_leaving = False
                    continue
                if is_leaving:
                    return
                self._dim("Ctrl-C again or Ctrl-D leaves")
                is_leaving = True
                continue
            is_leaving = False
            text = unquote(line)
            if text and not self._handle(text):
                return

    def _handle(self, text: str) -> bool:
        """Run a command or answer a message; False is the end."""
        turns = list(self._session.turns)
        try:
            if text.startswith("/"):
                outcome = self._commands.run(text)
                if outcome.text:
                    self._dim(outcome.text)
                if outcome.action == "copy":
                    self._show(clipboard(outcome.question))
                if outcome.action == "ask":
                    self._answer(outcome.question)
                return outcome.action != "quit"
            self._answer(text)
        except MinillmError as error:
            if text == "/regenerate":
                self._session.turns = turns
            self._dim(f"error: {error}")
            if error.hint:
                self._dim(f"hint: {error.hint}")
        return True

    def _answer(self, text: str) -> None:
        view = AnswerView(self._out, self._session.thoughts, is_plain=self._is_plain)
        with stop_on_interrupt() as cancel:
            try:
                for part in self._session.ask(text, cancel):
                    if part.kind == "notice":
                        self._dim(part.text)
                    else:
                        view.add(part)
            except KeyboardInterrupt:  # a second Ctrl-C
                cancel.set()
            finally:
                view.finish()
        stopped = "stopped · " if cancel.is_set() else ""
        self._dim(f"{stopped}{self._session.stats}\n")

    def _dim(self, text: str) -> None:
        wrapper = Wrapper(shutil.get_terminal_size().columns)
        self._show(wrapper.feed(text) + wrapper.flush(), is_dim=True)
        self._show("\n")

    def _show(self, text: str, *, is_dim: bool = False) -> None:
        if text:
            self._out.write(f"\x1b[2m{text}\x1b[0m" if is_dim and not self._is_plain else text)
            self._out.flush()

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if is_open_block(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            self._had_text = bool(event.current_buffer.text)
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys


def clipboard(text: str) -> str:
    """Return the sequence (OSC 52) that makes a terminal put `text` on its clipboard."""
    return f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07"


def is_open_block(text: str) -> bool:
    '''Tell whether `text` begins with `"""` that is not closed yet.'''
    text = text.strip()
    return text.startswith(BLOCK) and not (len(text) >= 2 * len(BLOCK) and text.endswith(BLOCK))


def unquote(text: str) -> str:
    '''Return a message without the white space and the `"""` around it.'''
    text = text.strip()
    if text.startswith(BLOCK):
        text = text.removeprefix(BLOCK).removesuffix(BLOCK).strip()
    return text


def open_history() -> History:
    """Return the history of earlier sessions, private to the user; none if it cannot be kept."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(base).expanduser() / "minillm" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
