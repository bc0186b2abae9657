"""Requests of OpenAI's Responses API, and how they become conversations.

A request is checked here, then rewritten as a chat completion and checked there: one set of rules.
What the second check finds is told with the names that the client used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from minillm.serve.problems import ApiError, short, unsupported
from minillm.serve.schema import (
    MAX_TURNS,
    ChatRequest,
    Strict,
    TemplateOptions,
    given_fields,
    parse,
    parse_plain,
    refuse,
)

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "context_management": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
"""Known fields that this server cannot honour, with the values that ask for nothing."""

LOGPROBS = "message.output_text.logprobs"
_AS_THEY_ARE = (
    "model", "temperature", "top_p", "parallel_tool_calls", "top_k", "min_p",
    "repetition_penalty", "seed", "stop", "chat_template_kwargs",
)  # fmt: skip
_NAMES = (
    (r"\bmessages\b", "input"),
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\bresponse_format\b", "text.format"),
    (r"\bjson_schema\.schema\b", "schema"),
    (r"(tools\[\d+\])\.function\.", r"\1."),
    (r"(\binput\[\d+\])\.tool_calls\[\d+\]", r"\1"),
    (r"\btool_call_id\b", "call_id"),
)
"""Names of chat completions, and what they are called here."""


def _input(value: Any) -> Any:
    """Return a list of items."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise refuse("must be a string or a list of items")
    if not 0 < len(value) <= MAX_TURNS:
        raise refuse(f"must hold 1 to {MAX_TURNS} items, got {len(value)}")
    return [{key: part for key, part in item.items() if part is not None} for item in value]


def _include(value: Any) -> Any:
    if not isinstance(value, list) or any(item != LOGPROBS for item in value):
        raise refuse(f"can hold only `{LOGPROBS}`")
    return tuple(value)


def _metadata(value: Any) -> Any:
    is_map = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not is_map or len(value) > 16:
        raise refuse("must map up to 16 names to strings")
    if any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise refuse("may have names of 64 and values of 512 characters")
    return value


class TextOptions(Strict):
    """Form of the text."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    verbosity: None = None


class ResponseRequest(Strict):
    """`POST /v1/responses`."""

    model: str
    input: Annotated[list[dict[str, Any]], BeforeValidator(_input)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    include: Annotated[tuple[str, ...], BeforeValidator(_include)] = ()
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata)] = Field(default_factory=dict)
    store: bool = True
    stream: bool = False
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = Field(None, ge=1)  # of built-in tools, of which there are none
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Any = None
    chat_template_kwargs: TemplateOptions | None = None


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation, and the item that each turn begins with."""

    turns: list[dict[str, Any]]
    places: list[int]


def parse_response(body: Any) -> ResponseRequest:
    """Check a decoded JSON body.

    Raises:
        ApiError: 400 that names the first field at fault.
    """
    given = given_fields(body, NEUTRAL)
    if isinstance(text := given.get("text"), dict):
        given["text"] = {key: value for key, value in text.items() if value is not None}
    return parse_plain(ResponseRequest, given)


def as_chat(call: ResponseRequest, earlier: Sequence[dict[str, Any]]) -> tuple[ChatRequest, Turns]:
    """Return the conversation to answer.

    Args:
        call: The request.
        earlier: Items of the response that it goes on from.

    Raises:
        ApiError: 400; see `rename`.
    """
    found = read_items([*earlier, *call.input], len(earlier))
    if call.instructions is not None:
        found.turns.insert(0, {"role": "system", "content": call.instructions})
        found.places.insert(0, -1)
    body: dict[str, Any] = {key: getattr(call, key) for key in _AS_THEY_ARE}
    if call.chat_template_kwargs is not None:
        body["chat_template_kwargs"] = call.chat_template_kwargs.model_dump()
    body |= {
        "messages": found.turns,
        "max_completion_tokens": call.max_output_tokens,
        "stream": call.stream,
        "response_format": _format(call.text.format),
        "tools": [_tool(tool, index) for index, tool in enumerate(call.tools)],
        "tool_choice": _choice(call.tool_choice),
    }
    if LOGPROBS in call.include:
        body |= {"logprobs": True, "top_logprobs": call.top_logprobs or 0}
    elif call.top_logprobs:
        raise ApiError(f"`top_logprobs` needs `{LOGPROBS}` in `include`", param="top_logprobs")
    try:
        return parse(ChatRequest, body), found
    except ApiError as error:
        raise rename(error, found.places) from None


def rename(error: ApiError, places: Sequence[int]) -> ApiError:
    """Return an error of the chat side with the names of this one."""

    def fix(text: str) -> str:
        def item(match: re.Match[str]) -> str:
            place = places[int(match[1])] if int(match[1]) < len(places) else -1
            return f"input[{place}]" if place >= 0 else "instructions"

        text = re.sub(r"\bmessages\[(\d+)\]", item, text)
        for old, new in _NAMES:
            text = re.sub(old, new, text)
        return text

    return ApiError(
        fix(str(error)),
        status=error.http_status,
        code=error.code,
        param=fix(error.param) if error.param else None,
        kind=error.kind,
        headers=error.headers,
    )


def read_items(items: Sequence[dict[str, Any]], num_earlier: int = 0) -> Turns:
    """Return items as turns of a chat.

    A call joins the assistant's turn before it; reasoning is dropped, as templates do.

    Raises:
        ApiError: 400 that names the item.
    """
    found = Turns([], [])
    for number, item in enumerate(items):
        place = number - num_earlier
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "reasoning":
            continue
        if kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function"}
            call["function"] = {"name": item.get("name"), "arguments": item.get("arguments")}
            last = found.turns[-1] if found.turns else {}
            if last.get("role") == "assistant":
                last.setdefault("tool_calls", []).append(call)
                continue
            turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            turn = {"role": "tool", "tool_call_id": item.get("call_id")}
            turn["content"] = _parts(item.get("output"))
        elif kind == "message":
            turn = {"role": item.get("role"), "content": _parts(item.get("content"))}
            for key in item.keys() - {"type", "role", "content", "id", "status", "phase"}:
                raise unsupported(f"input[{place}].{key}", "a message has no place for it")
        else:
            raise unsupported(f"input[{place}]", f"items of type `{short(kind)}` are unknown here")
        found.turns.append(turn)
        found.places.append(place)
    return found


def _parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = ("input_text", "output_text")
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in texts
        else part
        for part in content
    ]


def _format(given: Mapping[str, Any]) -> Any:
    if given.get("type") != "json_schema":
        return dict(given)
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        why = "this server has only functions"
        raise unsupported(f"tools[{index}]", f"{why}, not `{short(tool.get('type'))}`")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _choice(given: str | Mapping[str, Any]) -> Any:
    if isinstance(given, str) or given.get("type") != "function":
        return given
    return {"type": "function", "function": {"name": given.get("name")}}
