"""Bodies in, events out: JSON, server-sent events, clients that go away, time limits."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minillm.errors import MinillmError
from minillm.models.generator import Delta
from minillm.serve.backend import Job
from minillm.serve.problems import ApiError, error_body, status_of, timed_out
from minillm.serve.replies import Reply

MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 60

LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Finds every escape that may be one; most are halves of a proper pair."""

logger = logging.getLogger("minillm")


async def show_error(request: Request, error: Exception) -> JSONResponse:
    """Turn any exception into the JSON body of an OpenAI error."""
    if isinstance(error, HTTPException):  # the router's own: no such path or method
        code = {404: "not_found", 405: "method_not_allowed"}.get(
            error.status_code, "invalid_request"
        )
        message = f"{error.detail}: {request.method} on this path"
        headers = dict(error.headers or {})
        error = ApiError(message, status=error.status_code, code=code, headers=headers)
    headers = error.headers if isinstance(error, ApiError) else {}
    return JSONResponse(error_body(error), status_of(error), headers)


async def read_json(request: Request) -> Any:
    """Return the decoded body.

    Raises:
        ApiError: 413 above `MAX_BODY_BYTES`; 408 after `BODY_TIMEOUT_S`; 400 if it is not JSON.
    """
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                size += len(piece)
                if size > 4 * MAX_BODY_BYTES:
                    break  # a client that sends without end is cut off
                if size <= MAX_BODY_BYTES:  # the rest is dropped: a client reads its answer last
                    pieces.append(piece)
    except ClientDisconnect:
        raise ApiError("the client left in the middle of its request") from None
    except TimeoutError:
        raise ApiError(
            f"the request body was not whole within {BODY_TIMEOUT_S} seconds",
            status=408,
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    if size > MAX_BODY_BYTES:
        raise ApiError(
            f"the request body is larger than {MAX_BODY_BYTES} bytes",
            status=413,
            code="request_too_large",
            headers={"connection": "close"},
        )
    try:
        text = b"".join(pieces).decode("utf-8")
        body = json.loads(text, parse_constant=_no_constant)
        if LONE_SURROGATE.search(text):  # half a character: no tokenizer takes it
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise ApiError("the request body is not valid JSON", code="invalid_json") from None
    return body


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


async def abort_on_disconnect(receive: Callable[[], Awaitable[Any]], job: Job) -> None:
    """Wait until the client has gone, then free its place."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.abort()


class TimedJob:
    """A job that is given up when its time is over; the queue counts."""

    def __init__(self, job: Job, limit_s: float) -> None:
        """Start the clock: `limit_s` seconds from now."""
        self._job, self._limit_s, self._is_over = job, limit_s, False
        self._timer = asyncio.get_running_loop().call_later(limit_s, self._expire)

    def _expire(self) -> None:
        self._is_over = True
        self._job.abort()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield as the job does.

        Raises:
            ApiError: 504 when the time is over.
        """
        async for item in self._job:
            if self._is_over:
                break
            yield item
        if self._is_over:
            raise timed_out(self._limit_s)

    def abort(self) -> None:
        """Give up and stop the clock."""
        self._timer.cancel()
        self._job.abort()


async def stream_events(
    job: Job, reply: Reply, watcher: "asyncio.Task[None]", *, include_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events to the end of the job, always closed by the reply's end mark."""
    named = reply.names_events
    try:
        for chunk in reply.opening():
            yield _event(chunk, named)
        async for index, delta in job:
            for chunk in reply.feed(index, delta):
                yield _event(chunk, named)
        reply.check_finished()
        for chunk in reply.closing(include_usage=include_usage):
            yield _event(chunk, named)
    except Exception as error:
        if not isinstance(error, MinillmError):
            logger.exception("a streamed request failed")
        for chunk in reply.failure(error):
            yield _event(chunk, named)
    finally:
        watcher.cancel()
        job.abort()
    if reply.end_mark:
        yield reply.end_mark


def _event(data: Mapping[str, Any], named: bool) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in "\u0085\u2028\u2029":  # some clients take these for line ends
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f"event: {data['type']}\ndata: {text}\n\n" if named else f"data: {text}\n\n"
