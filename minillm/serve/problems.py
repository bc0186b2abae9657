"""Errors as HTTP clients expect them: a status, and `{"error": {message, type, param, code}}`.

The openai client retries 408, 409, 429 and every status from 500 up, so a mistake of the caller
must never become a 500: it would triple the load.
"""

import reprlib
from typing import Any

from minillm.errors import MinillmError

INVALID = "invalid_request_error"


class ApiError(MinillmError):
    """An error with all that an OpenAI client reads from one.

    Args:
        message: One sentence for the caller.
        status: HTTP status.
        code: Stable word for programs, e.g. `model_not_found`.
        param: The request field at fault, e.g. `messages[0].content`.
        kind: The error's `type`; by default it follows from the status.
        headers: Extra response headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.code, self.param, self.kind = code, param, kind
        self.headers = headers or {}


def unsupported(param: str, why: str) -> ApiError:
    """Return the error for a field that this server cannot honour."""
    return ApiError(f"`{param}` is not supported: {why}", code="unsupported_parameter", param=param)


def unknown_model(given: str, served: str) -> ApiError:
    """Return the 404 for a model that is not served here."""
    message = f"no model `{short(given)}` here; this server has `{served}`"
    return ApiError(message, status=404, code="model_not_found", param="model")


def too_long(num_tokens: int | None, max_context: int, param: str) -> ApiError:
    """Return the error for a prompt that leaves no room for an answer."""
    size = f"{num_tokens} tokens" if num_tokens is not None else "more text than can fit"
    message = f"the context holds {max_context} tokens, but `{param}` is {size}"
    return ApiError(message, code="context_length_exceeded", param=param)


def overloaded(num_waiting: int) -> ApiError:
    """Return the 429 of a full queue."""
    return ApiError(
        f"{num_waiting} requests are already waiting; try again shortly",
        status=429,
        code="overloaded",
        kind="rate_limit_error",
        headers={"retry-after": "1"},
    )


def unavailable(message: str) -> ApiError:
    """Return the 503 of a server that cannot generate."""
    headers = {"retry-after": "5"}
    return ApiError(message, status=503, code="unavailable", kind="server_error", headers=headers)


def timed_out(limit_s: float) -> ApiError:
    """Return the 504 of an answer that took too long; another try would take as long."""
    return ApiError(
        f"the answer took longer than this server's limit of {limit_s:g} s; ask for fewer tokens",
        status=504,
        code="timeout",
        kind="server_error",
        headers={"x-should-retry": "false"},
    )


def error_body(error: Exception) -> dict[str, Any]:
    """Return the JSON body for any exception; a bug shows nothing of its inside."""
    message, kind, param, code = "internal error; the server's log has the details", "", None, None
    if isinstance(error, ApiError):
        message, kind, param, code = str(error), error.kind, error.param, error.code
    elif isinstance(error, MinillmError):
        message = str(error)
        kind, code = (INVALID, "invalid_value") if error.http_status < 500 else ("", None)
    return {
        "error": {"message": message, "type": kind or "server_error", "param": param, "code": code}
    }


def status_of(error: Exception) -> int:
    """Return the HTTP status for any exception."""
    return error.http_status if isinstance(error, MinillmError) else 500


def short(value: object, limit: int = 80) -> str:
    """Return `value` as text of at most `limit` characters, for use in a message."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # safe for deep nesting
    return text if len(text) <= limit else text[: limit - 1] + "…"
