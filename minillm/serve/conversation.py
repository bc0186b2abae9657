"""From a conversation to the run that answers it: template, tools, thinking, grammar.

Chat completions and responses share it; what differs between them is how the answer is told.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from minillm.serve.answer_items import AnswerItems
from minillm.serve.backend import Backend, Run
from minillm.serve.grammar import Grammars
from minillm.serve.problems import ApiError
from minillm.serve.prompts import check_size, make_runs
from minillm.serve.sampling_choice import Defaults
from minillm.serve.schema import ChatRequest
from minillm.serve.think import OPEN, TAIL
from minillm.serve.tool_calls import (
    CallReader,
    call_schema,
    check_tools,
    find_strict,
    plain_turns,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What will be computed, and how its text is read."""

    runs: list[Run]
    items: list[AnswerItems]
    """One for each run."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.runs[0].prompt_ids)


async def prepare(
    call: ChatRequest, backend: Backend, grammars: Grammars, defaults: Defaults
) -> Prepared:
    """Return the runs of a conversation.

    Raises:
        ApiError: 400; the message and `param` use the names of chat completions.
    """
    messages = call.plain_messages()
    check_size(_texts(messages), backend, "messages")
    tools, wanted = check_tools(call.tools, call.tool_choice)
    if wanted and call.response_format:
        raise ApiError("a forced `tool_choice` excludes `response_format`", param="response_format")
    switches = call.chat_template_kwargs
    options: dict[str, Any] = {"enable_think": switches.enable_think or switches.enable_thinking}
    if "tools" not in backend.template:
        messages = plain_turns(messages, tools)
    elif tools:
        options["tools"] = tools
    check_size(_texts(messages), backend, "messages")
    ids = await asyncio.to_thread(backend.encode_chat, messages, options)
    tail = await asyncio.to_thread(backend.decode, ids[-TAIL:])
    is_inside = tail.rstrip().endswith(OPEN)
    runs = make_runs(call, [ids], backend, defaults, "messages")
    strict = find_strict(tools)
    if wanted or call.response_format is not None:
        schema = call_schema(tools, wanted) if wanted else call.response_format
        place = "tool_choice" if wanted else "response_format"
        make = await asyncio.to_thread(grammars.json, schema, inside=is_inside, param=place)
    elif strict:
        schema = call_schema(tools, "required")
        make = await asyncio.to_thread(grammars.calls, schema, inside=is_inside, param=strict)
    else:
        make = None
    if make is not None:
        runs = [replace(run, params=replace(run.params, constraint=make)) for run in runs]
    limit = 1 if wanted is not None or not call.parallel_tool_calls else None
    return Prepared(
        runs,
        [
            AnswerItems(
                inside=is_inside,
                reader=CallReader(is_forced=wanted is not None, limit=limit) if tools else None,
            )
            for _ in runs
        ],
    )


def _texts(messages: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (turn["content"] for turn in messages)
