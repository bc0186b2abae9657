"""The slash commands of the terminal chat: what is typed, what it does to the session."""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from minillm.errors import ConfigError
from minillm.serve.chat import Session
from minillm.settings import SamplingConfig


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the terminal does next."""

    text: str = ""
    action: Literal["", "quit", "ask", "copy"] = ""
    question: str = ""


HELP = (
    ("/help", "show this"),
    ("/system TEXT", "set the system message; `/system none` removes it"),
    ("/set KEY VALUE", "temperature, top_p, max_tokens, think on …; bare `/set` lists them"),
    ("/think HOW", "show thoughts: on, off, or fold them to one line"),
    ("/clear", "forget the conversation"),
    ("/undo", "take back the last question and its answer"),
    ("/regenerate", "answer the last question anew"),
    ("/copy", "put the last answer on the terminal's clipboard (OSC 52)"),
    ("/save FILE", "write the conversation as JSON"),
    ("/load FILE", "read a saved conversation"),
    ("/stats", "context, settings and the last answer's speed"),
    ("/quit", "leave (also Ctrl-D)"),
)
KEYS = (
    """Alt-Enter or a line that starts with \"\"\" writes several lines; Ctrl-C stops an answer."""
)


class Commands:
    """Run the commands of one session."""

    def __init__(self, session: Session) -> None:
        """Work on `session`."""
        self._session = session
        self._table: dict[str, Callable[[str], Outcome]] = {
            "/help": self._help,
            "/system": self._system,
            "/set": self._set,
            "/think": self._think,
            "/copy": self._copy,
            "/clear": self._clear,
            "/undo": self._undo,
            "/regenerate": self._regenerate,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/quit": lambda _: Outcome(action="quit"),
        }

    def run(self, line: str) -> Outcome:
        """Run one line that starts with `/`.

        Raises:
            ConfigError: There is no such command, or its argument is wrong.
            InputError: A file cannot be read.
        """
        name, _, argument = line.strip().partition(" ")
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "`/help` lists the commands"
            raise ConfigError(f"no command `{name}`", hint=hint)
        return self._table[name](argument.strip())

    def _help(self, _: str) -> Outcome:
        lines = [f"{usage:<16} {what}" for usage, what in HELP]
        return Outcome("\n".join([*lines, KEYS]))

    def _system(self, argument: str) -> Outcome:
        if argument:
            self._session.system = "" if argument == "none" else argument
        system = self._session.system
        return Outcome(f"system message: {system}" if system else "no system message")

    def _set(self, argument: str) -> Outcome:
        session = self._session
        values = dataclasses.asdict(session.settings) | {"think": session.think}
        if not argument:
            shown = {True: "on", False: "off"}
            lines = [
                f"{key:<20} {shown[value] if isinstance(value, bool) else value}"
                for key, value in values.items()
            ]
            return Outcome("\n".join(lines))
        key, _, text = argument.partition(" ")
        text = text.strip()
        if key not in values:
            near = difflib.get_close_matches(key, values, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "bare `/set` lists the settings"
            raise ConfigError(f"no setting `{key}`", hint=hint)
        if key == "think":
            session.think = _switch(text)
        else:
            changed: dict[str, Any] = {key: _number(key, text)}
            session.settings = dataclasses.replace(session.settings, **changed)
        return Outcome(f"{key} = {text}")

    def _think(self, argument: str) -> Outcome:
        match argument:
            case "on" | "off" | "fold":
                self._session.thoughts = argument
            case "":
                pass
            case _:
                message = f"`/think` is `on`, `off` or `fold`, got `{argument}`"
                raise ConfigError(message, hint="`/think fold`")
        asked = "" if self._session.think else "; `/set think on` asks the model to think"
        return Outcome(f"thoughts: {self._session.thoughts}{asked}")

    def _copy(self, _: str) -> Outcome:
        turns = self._session.turns
        if not turns:
            return Outcome("nothing to copy")
        text = turns[-1]["content"]
        return Outcome(f"copied {len(text)} characters", action="copy", question=text)

    def _clear(self, _: str) -> Outcome:
        self._session.clear()
        return Outcome("the conversation is empty")

    def _undo(self, _: str) -> Outcome:
        question = self._session.undo()
        return Outcome("nothing to undo" if question is None else f"took back: {question}")

    def _regenerate(self, _: str) -> Outcome:
        question = self._session.undo()
        if question is None:
            return Outcome("nothing to regenerate")
        return Outcome(action="ask", question=question)

    def _save(self, argument: str) -> Outcome:
        path = _path("/save", argument)
        self._session.save(path)
        return Outcome(f"saved to {path}")

    def _load(self, argument: str) -> Outcome:
        path = _path("/load", argument)
        self._session.load(path)
        return Outcome(f"loaded {len(self._session.turns)} messages from {path}")

    def _stats(self, _: str) -> Outcome:
        session = self._session
        asked = sum(turn["role"] == "user" for turn in session.turns)
        used, limit = session.context_tokens(), session.speaker.max_context
        lines = [f"{asked} questions, context {used}/{limit or '?'}"]
        if session.stats is not None:
            lines.append(f"last answer: {session.stats}")
        return Outcome("\n".join([*lines, "", self._set("").text]))


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise ConfigError(f"`{command}` needs a file", hint=f"`{command} chat.json`")
    return Path(argument).expanduser()


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"`think` is `on` or `off`, got `{text}`", hint="`/set think on`")
    return text == "on"


def _number(key: str, text: str) -> float | int | None:
    kind = get_type_hints(SamplingConfig)[key]
    if key == "seed" and text == "none":
        return None
    try:
        return float(text) if kind is float else int(text)
    except ValueError:
        wanted = "a number" if kind is float else "a whole number"
        raise ConfigError(
            f"`{key}` must be {wanted}, got `{text}`", hint=f"`/set {key} 1`"
        ) from None
