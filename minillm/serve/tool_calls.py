"""Tool calls: what a request may say of them, how the model is told, how its answer is read.

Where the chat template knows `tools`, it gets them. Elsewhere the turns are written in the form of
Hermes and Qwen, which most small models were trained on: the tools in the system message, a call
as `<tool_call>{"name": …, "arguments": …}</tool_call>`, a result as `<tool_response>…`.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minillm.serve.problems import ApiError, short

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Turn = Mapping[str, Any]


def check_tools(tools: Any, choice: Any) -> tuple[list[dict[str, Any]], str | None]:
    """Return the functions that may be called, and what must be: `None`, `required` or a name.

    Raises:
        ApiError: 400 that names the field at fault.
    """
    if not isinstance(tools, list):
        raise ApiError("`tools` must be a list", param="tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        given = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(given, dict) or tool.get("type") != "function":
            raise ApiError(f"`{place}` must have the type `function`, and one", param=place)
        name = given.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
            raise ApiError(f"`{place}.function.name` is not a name", param=f"{place}.function.name")
        if name in names:
            raise ApiError(f"two tools are called `{name}`", param=f"{place}.function.name")
        names.add(name)
        if not isinstance(given.get("parameters") or {}, dict):
            param = f"{place}.function.parameters"
            raise ApiError(f"`{param}` must be a JSON schema", param=param)
        if not isinstance(given.get("strict", False), bool | None):
            param = f"{place}.function.strict"
            raise ApiError(f"`{param}` must be true or false", param=param)
    return _choose(tools, names, choice)


def _choose(
    tools: list[dict[str, Any]], names: set[str], choice: Any
) -> tuple[list[dict[str, Any]], str | None]:
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return [], None
    if choice == "required" and tools:
        return tools, "required"
    wanted = choice.get("function") if isinstance(choice, dict) else None
    name = wanted.get("name") if isinstance(wanted, dict) else choice
    if isinstance(wanted, dict) and isinstance(name, str) and name in names:
        return tools, name
    message = f"`tool_choice` must be none, auto, required or one of `tools`, got `{short(name)}`"
    raise ApiError(message, param="tool_choice")


def find_strict(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the place of the first `strict: true`; empty if there is none."""
    found = (n for n, tool in enumerate(tools) if tool["function"].get("strict"))
    number = next(found, None)
    return "" if number is None else f"tools[{number}].function.strict"


def call_schema(tools: Sequence[Mapping[str, Any]], wanted: str) -> dict[str, Any]:
    """Return the JSON schema of one call: of the tool `wanted`, or of any if it is `required`."""
    forms: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": _closed(tool["function"].get("parameters") or {"type": "object"}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if wanted in ("required", tool["function"]["name"])
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema without names that it does not mention, unless it speaks of them.

    All that fits it fits the given one too; a small model would go on making up names.
    """
    is_open = "properties" in schema and not any(key.endswith("Properties") for key in schema)
    return {**schema, "additionalProperties": False} if is_open else schema


def check_calls(calls: Sequence[Any], place: str) -> list[dict[str, Any]]:
    """Return an assistant's earlier calls with their arguments read.

    Raises:
        ApiError: 400 that names the field at fault.
    """
    found: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        given = call.get("function") if isinstance(call, dict) else None
        param = f"{place}.tool_calls[{index}]"
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise ApiError(f"`{param}` must have a `function` with a name", param=param)
        uid = call.get("id")
        if not isinstance(uid, str) or not uid or any(uid == other["id"] for other in found):
            raise ApiError(f"`{param}.id` must be a text of its own", param=f"{param}.id")
        try:
            arguments = json.loads(given.get("arguments") or "{}")
        except (TypeError, ValueError, RecursionError):
            raise ApiError(f"`{param}`: `arguments` is not JSON", param=param) from None
        function = {"name": given["name"], "arguments": arguments}
        found.append({"id": uid, "type": "function", "function": function})
    return found


def link_results(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns with the results of an assistant's calls in the order of the calls.

    Raises:
        ApiError: 400 for a result of no call, and for a call without one.
    """
    done: list[dict[str, Any]] = []
    due: list[str] = []  # calls whose results come now
    results: dict[str, dict[str, Any]] = {}
    caller = -1
    for index, turn in enumerate([*turns, {"role": "end"}]):
        if turn["role"] == "tool":
            uid, param = turn.get("tool_call_id"), f"messages[{index}].tool_call_id"
            if uid is None:
                raise ApiError(f"`{param}` is required", code="missing_parameter", param=param)
            if uid not in due or uid in results:
                message = f"`{param}`: no call `{short(uid)}` waits for a result here"
                raise ApiError(message, param=param)
            results[uid] = turn
            continue
        for number, uid in enumerate(due):
            if uid not in results:
                param = f"messages[{caller}].tool_calls[{number}]"
                raise ApiError(f"`{param}` has no result: call `{short(uid)}`", param=param)
            done.append(results[uid])
        due, results, caller = [call["id"] for call in turn.get("tool_calls", ())], {}, index
        done.append(turn)
    return done[:-1]


def plain_turns(turns: Sequence[Turn], tools: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the turns for a template that knows no tools."""
    done: list[dict[str, Any]] = []
    for turn in turns:
        content = str(turn["content"])
        if turn["role"] == "tool":
            block = f"<tool_response>\n{content}\n</tool_response>"
            if done and done[-1].get("is_result"):
                done[-1]["content"] += f"\n{block}"
            else:
                done.append({"role": "user", "content": block, "is_result": True})
            continue
        blocks = [
            f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
            for call in turn.get("tool_calls", ())
        ]
        text = "\n".join([content, *blocks] if content else blocks or [content])
        done.append({"role": turn["role"], "content": text})
    for turn in done:
        turn.pop("is_result", None)
    if not tools:
        return done
    if not done or done[0]["role"] != "system":
        done.insert(0, {"role": "system", "content": ""})
    done[0]["content"] = f"{done[0]['content']}\n\n{_instructions(tools)}".strip()
    return done


def _instructions(tools: Sequence[Turn]) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = '{"name": "NAME", "arguments": {…}}'
    return (
        f"# Tools\n\nThese functions can be called:\n<tools>\n{lines}\n</tools>\n\n"
        f"To call one, answer with\n{OPEN}\n{example}\n{CLOSE}"
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the model made; `arguments` is JSON text, as OpenAI has it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self) -> dict[str, Any]:
        """Return it as a message holds it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Finds the calls in an answer that comes in pieces; what is none stays text."""

    def __init__(self, *, is_forced: bool = False, limit: int | None = None) -> None:
        """Begin.

        Args:
            is_forced: The whole answer is the JSON of one call, without tags.
            limit: Calls that are wanted; more are dropped. `None`: all.
        """
        self._held, self._is_inside = "", is_forced
        self._tag = "" if is_forced else OPEN
        self._limit, self._num_calls = limit, 0

    def feed(self, text: str) -> list[str | Call]:
        """Return the texts and calls that are certain now."""
        self._held += text
        found: list[str | Call] = []
        while True:
            mark = CLOSE if self._is_inside else OPEN
            before, is_there, rest = self._held.partition(mark)
            if not is_there:
                break
            if self._is_inside:
                found += self._call(before, f"{OPEN}{before}{CLOSE}")
            elif before.strip():
                found.append(before)
            self._held, self._is_inside = rest, not self._is_inside
        if not self._is_inside:
            size = next((n for n in range(len(OPEN), 0, -1) if self._held.endswith(OPEN[:n])), 0)
            ready = self._held[: len(self._held) - size]
            ready = ready if ready.strip() else ""  # white space may stand before a call
            found += [ready] if ready else []
            self._held = self._held[len(ready) :]
        return found

    def flush(self) -> list[str | Call]:
        """Return the rest when the answer has ended."""
        rest, self._held = self._held, ""
        if self._is_inside:
            return self._call(rest, self._tag + rest)
        return [rest] if rest and not self._num_calls else []

    def _call(self, text: str, raw: str) -> list[str | Call]:
        try:
            given = json.loads(text)
            name, arguments = given["name"], given.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return [raw] if raw else []
        if not isinstance(name, str):
            return [raw]
        if self._limit is not None and self._num_calls >= self._limit:
            return []
        self._num_calls += 1
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return [Call(name, arguments)]
