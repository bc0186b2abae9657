"""Routes of OpenAI's Responses API: create, fetch, delete, list the input."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from minillm.serve.backend import Backend, Run
from minillm.serve.conversation import prepare
from minillm.serve.grammar import Grammars
from minillm.serve.problems import ApiError, unknown_model, unsupported
from minillm.serve.replies import Reply
from minillm.serve.responses_reply import ResponseReply
from minillm.serve.responses_schema import (
    ResponseRequest,
    as_chat,
    parse_response,
    rename,
)
from minillm.serve.responses_store import ResponseStore, list_items
from minillm.serve.sampling_choice import Defaults
from minillm.serve.schema import ChatRequest
from minillm.serve.wire import read_json

Answer = Callable[[Request, list[Run], Reply, ChatRequest], Awaitable[Response]]


class Responses:
    """The endpoints, and the responses they keep."""

    def __init__(
        self, backend: Backend, model: str, defaults: Defaults, grammars: Grammars, answer: Answer
    ) -> None:
        """Serve `backend` under the name `model`; `answer` runs a job and tells its reply."""
        self._backend, self._model, self._defaults = backend, model, defaults
        self._grammars, self._answer = grammars, answer
        self._store = ResponseStore()

    async def create(self, request: Request) -> Response:
        """Answer."""
        call = parse_response(await read_json(request))
        if call.model != self._model:
            raise unknown_model(call.model, self._model)
        earlier: list[dict[str, Any]] = []
        if call.previous_response_id is not None:
            name = "previous_response_id"
            earlier = self._store.get(call.previous_response_id, name).conversation
        chat, found = as_chat(call, earlier)
        try:
            made = await prepare(chat, self._backend, self._grammars, self._defaults)
        except ApiError as error:
            raise rename(error, found.places) from None
        reply = ResponseReply(
            self._model,
            made.num_tokens,
            items=made.items[0],
            fields=_repeated(call, made.runs[0]),
            bytes_of=self._backend.token_bytes if chat.logprobs else None,
            keep=partial(self._store.put, items=[*earlier, *call.input]) if call.store else None,
        )
        return await self._answer(request, made.runs, reply, chat)

    async def fetch(self, request: Request, response_id: str) -> dict[str, Any]:
        """Return a stored response; 404 for any other."""
        for name in request.query_params:
            raise unsupported(name, "a response is fetched whole")
        return dict(self._store.get(response_id).body)

    async def delete(self, response_id: str) -> dict[str, Any]:
        """Forget a stored response."""
        self._store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, response_id: str) -> None:
        """Refuse: nothing runs in the background. A client that leaves cancels its response."""
        self._store.get(response_id)
        raise ApiError("only a response made with `background` can be cancelled")

    async def input_items(self, request: Request, response_id: str) -> dict[str, Any]:
        """List what a stored response answers."""
        given = dict(request.query_params)
        limit, order = given.pop("limit", "20"), given.pop("order", "desc")
        after = given.pop("after", None)
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= 100:
            raise ApiError("`limit` must be a number from 1 to 100", param="limit")
        if order not in ("asc", "desc"):
            raise ApiError("`order` must be asc or desc", param="order")
        for name in given:
            raise unsupported(name, "items are listed by `limit`, `order` and `after`")
        return list_items(self._store.get(response_id), limit=int(limit), order=order, after=after)


def _repeated(call: ResponseRequest, run: Run) -> dict[str, Any]:
    """Return what a response repeats of its request; sampling as it really was."""
    tools = [{"parameters": None, "strict": False, **tool} for tool in call.tools]
    return {
        "background": False,
        "instructions": call.instructions,
        "max_output_tokens": call.max_output_tokens,
        "max_tool_calls": call.max_tool_calls,
        "metadata": call.metadata,
        "parallel_tool_calls": call.parallel_tool_calls,
        "previous_response_id": call.previous_response_id,
        "prompt_cache_key": call.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": call.safety_identifier,
        "service_tier": "default",
        "store": call.store,
        "temperature": run.params.temperature,
        "text": {"format": call.text.format},
        "tool_choice": call.tool_choice,
        "tools": tools,
        "top_logprobs": call.top_logprobs or 0,
        "top_p": run.params.top_p,
        "truncation": "disabled",
        "user": call.user,
    }
