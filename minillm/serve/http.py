"""The OpenAI-compatible HTTP interface: routes, streaming, errors, limits.

Knows nothing of how tokens are made: it talks to a `minillm.serve.backend.Backend`. A client that
goes away frees its place at once, streaming or not. Pages of other sites get nothing, unless they
are named: by default there are no CORS headers.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from minillm.errors import MinillmError
from minillm.serve.access import KeyRequired
from minillm.serve.backend import Backend, Job, Run
from minillm.serve.conversation import prepare
from minillm.serve.grammar import Grammars
from minillm.serve.metrics import Metrics
from minillm.serve.openapi import describe
from minillm.serve.page import load_page
from minillm.serve.problems import ApiError, unknown_model
from minillm.serve.prompts import check_size, make_runs
from minillm.serve.replies import ChatReply, CompletionReply, Reply
from minillm.serve.responses_http import Responses
from minillm.serve.sampling_choice import Defaults
from minillm.serve.schema import (
    MAX_RUNS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_ids,
    parse,
    parse_plain,
)
from minillm.serve.wire import (
    TimedJob,
    abort_on_disconnect,
    read_json,
    show_error,
    stream_events,
)

LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"


def create_app(
    backend: Backend,
    *,
    model: str,
    defaults: Defaults | None = None,
    keys: Mapping[str, str] | None = None,
    cors_origins: Sequence[str] = (),
    timeout_s: float = 0,
) -> FastAPI:
    """Build the application.

    Args:
        backend: What makes the tokens.
        model: The name that clients use.
        defaults: Sampling where a request has none.
        keys: Key by name; one is required as `Authorization: Bearer KEY` on all but the page and
            the health check. Empty: no key.
        cors_origins: Sites whose pages may read answers, e.g. `https://chat.example`; `*` is all,
            `localhost` all of this machine.
        timeout_s: Longest time of one answer, with its time in the queue; 0: no limit.
    """
    api = Api(backend, model, defaults or Defaults(), timeout_s)
    api.description = describe(needs_key=bool(keys))
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes: Sequence[tuple[str, str, Callable[..., Any]]] = (
        ("GET", "/", api.page),
        ("GET", "/health", api.health),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model_id:path}", api.model),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/responses", api.responses.create),
        ("GET", "/v1/responses/{response_id}", api.responses.fetch),
        ("DELETE", "/v1/responses/{response_id}", api.responses.delete),
        ("POST", "/v1/responses/{response_id}/cancel", api.responses.cancel),
        ("GET", "/v1/responses/{response_id}/input_items", api.responses.input_items),
        ("POST", "/v1/embeddings", api.embeddings),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/metrics", api.metrics),
        ("GET", "/openapi.json", api.openapi),
    )
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (MinillmError, HTTPException, Exception):
        app.add_exception_handler(kind, show_error)
    if keys:
        app.add_middleware(KeyRequired, keys=keys, note=api.count_key)
    if cors_origins:  # added last, so it answers the browsers' question before the key is asked for
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin for origin in cors_origins if origin != "localhost"],
            allow_origin_regex=LOCAL_PAGES if "localhost" in cors_origins else None,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["retry-after"],
        )
    return app


class Api:
    """The endpoints, and what they share."""

    def __init__(
        self, backend: Backend, model: str, defaults: Defaults, timeout_s: float = 0
    ) -> None:
        """Serve `backend` under the name `model`."""
        self._timeout_s = timeout_s
        self.description = describe(needs_key=False)
        self._backend, self._model, self._defaults = backend, model, defaults
        self._created = int(time.time())
        self._metrics, self._grammars = Metrics(), Grammars(backend)
        self.responses = Responses(backend, model, defaults, self._grammars, self._answer)
        self._page, self._page_headers = load_page()

    async def page(self) -> Response:
        """Return the chat page."""
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def health(self) -> Response:
        """Tell whether text can be generated; never waits for a generation."""
        alive = self._backend.is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """Describe the model; 404 for any other."""
        self._check_model(model_id)
        return self._card()

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        call = parse(ChatRequest, await read_json(request))
        self._check_model(call.model)
        made = await prepare(call, self._backend, self._grammars, self._defaults)
        reply = ChatReply(
            self._model,
            made.num_tokens,
            call.n,
            items=made.items,
            bytes_of=self._backend.token_bytes if call.logprobs else None,
        )
        return await self._answer(request, made.runs, reply, call)

    async def completions(self, request: Request) -> Response:
        """Continue plain text."""
        call = parse(CompletionRequest, await read_json(request))
        self._check_model(call.model)
        if len(call.prompt) * call.n > MAX_RUNS:
            message = f"`prompt` and `n` ask for {len(call.prompt) * call.n} answers"
            raise ApiError(f"{message}; the limit is {MAX_RUNS}", param="n")
        texts = [item for item in call.prompt if isinstance(item, str)]
        check_size(texts, self._backend, "prompt")
        encoded = [await self._ids(item) for item in call.prompt]
        runs = make_runs(call, encoded, self._backend, self._defaults, "prompt")
        echoes = [
            (await self._text(item), ids)
            for item, ids in zip(call.prompt, encoded, strict=True)
            for _ in range(call.n * call.echo)
        ]
        num_tokens = sum(len(ids) for ids in encoded)
        bytes_of = self._backend.token_bytes if call.logprobs is not None else None
        reply = CompletionReply(
            self._model, num_tokens, len(runs), echoes=echoes, bytes_of=bytes_of
        )
        return await self._answer(request, runs, reply, call)

    async def embeddings(self, request: Request) -> Response:
        """Refuse: the models here make text."""
        raise ApiError(
            "embeddings are not implemented; this server makes text",
            status=501,
            code="not_implemented",
            kind="server_error",
            headers={"x-should-retry": "false"},
        )

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Return the ids of plain text."""
        call = parse_plain(TokenizeRequest, await read_json(request))
        if call.model is not None:
            self._check_model(call.model)
        ids = await asyncio.to_thread(
            self._backend.encode, call.text, add_special_tokens=call.specials
        )
        return {"tokens": ids, "count": len(ids), "max_model_len": self._backend.max_context}

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """Return the text of ids."""
        call = parse_plain(DetokenizeRequest, await read_json(request))
        if call.model is not None:
            self._check_model(call.model)
        check_ids(call.tokens, self._backend.vocab_size, "tokens")
        text = await asyncio.to_thread(self._backend.decode, call.tokens)
        return {"content": text, "prompt": text}

    async def metrics(self) -> Response:
        """Report for Prometheus."""
        text = self._metrics.render(self._backend.stats())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self) -> dict[str, Any]:
        """Describe the interface for programs."""
        return self.description

    def count_key(self, name: str) -> None:
        """Count a request by the name of its key."""
        self._metrics.by_key.labels(name).inc()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "minillm",
            "max_model_len": self._backend.max_context,
        }

    def _check_model(self, given: str) -> None:
        if given != self._model:
            raise unknown_model(given, self._model)

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(self._backend.encode, prompt)
        check_ids(prompt, self._backend.vocab_size, "prompt")
        return prompt

    async def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return await asyncio.to_thread(self._backend.decode, prompt)

    async def _answer(
        self, request: Request, runs: list[Run], reply: Reply, call: ChatRequest | CompletionRequest
    ) -> Response:
        job: Job = self._metrics.watch(self._backend.submit(runs), runs)
        if self._timeout_s:
            job = TimedJob(job, self._timeout_s)
        watcher = asyncio.create_task(abort_on_disconnect(request.receive, job))
        if call.stream:
            events = stream_events(job, reply, watcher, include_usage=call.include_usage)
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            async for index, delta in job:
                reply.feed(index, delta)
        finally:
            is_gone = watcher.done()
            watcher.cancel()
            job.abort()
        if is_gone:
            return Response(status_code=499)  # nobody reads it
        reply.check_finished()
        return JSONResponse(reply.body())
