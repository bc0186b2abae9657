"""Who may use the server: API keys with names, and a door that closes when the server stops."""

import hmac
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from minillm.errors import ConfigError, InputError
from minillm.serve.problems import ApiError, error_body, unavailable

OPEN_PATHS = frozenset(("/", "/health"))
"""What needs no API key."""

HOW = "write one key per line as `name:key`; lines that begin with `#` are comments"


def read_keys(given: Sequence[str], file: Path | None) -> dict[str, str]:
    """Return key by name: those `given` are named `key-1` and so on, those of `file` as it says.

    Raises:
        ConfigError: A given key is empty.
        InputError: The file cannot be read, or a line is not `name:key`; no message holds a key.
    """
    found: dict[str, str] = {}
    for number, key in enumerate(given, start=1):
        if not key.strip():
            raise ConfigError(
                "`--api-key` is empty", hint='make one: `--api-key "$(openssl rand -hex 16)"`'
            )
        found[f"key-{number}"] = key
    if file is None:
        return found
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "it is not UTF-8"
        raise InputError(f"`--api-key-file {file}` cannot be read: {why}", hint=HOW) from None
    num_before = len(found)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, key = (part.strip() for part in line.partition(":"))
        if not name or not key or name in found:
            why = f"the name `{name}` comes twice" if name and key else "is not `name:key`"
            raise InputError(f"`{file}`, line {number}: {why}", hint=HOW)
        found[name] = key
    if len(found) == num_before:  # an empty file must not open the server
        raise InputError(f"`{file}` holds no key", hint=HOW)
    return found


class KeyRequired:
    """Middleware that lets only bearers of a key pass."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str], note: Callable[[str], None]) -> None:
        """Guard `app`; `note` gets the name of the key of each request that passes."""
        self._app, self._note = app, note
        self._expected = {name: b"bearer " + key.encode() for name, key in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        given = given[:7].lower() + given[7:]
        name = ""
        for candidate, expected in self._expected.items():  # all of them: time tells nothing
            if hmac.compare_digest(given, expected):
                name = candidate
        if name:
            self._note(name)
            return await self._app(scope, receive, send)
        error = ApiError(
            "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
            status=401,
            code="invalid_api_key",
            kind="authentication_error",
        )
        response = JSONResponse(error_body(error), 401, {"www-authenticate": "Bearer"})
        return await response(scope, receive, send)


class Door:
    """Middleware that refuses new requests once `close` was called; running ones go on."""

    def __init__(self, app: ASGIApp) -> None:
        """Let all pass to `app` at first."""
        self._app, self._is_closed = app, False

    def close(self) -> None:
        """Refuse from now on; from any thread."""
        self._is_closed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 503."""
        if scope["type"] != "http" or not self._is_closed:
            return await self._app(scope, receive, send)
        error = unavailable("this server is stopping; try again shortly")
        headers = {**error.headers, "connection": "close"}
        return await JSONResponse(error_body(error), 503, headers)(scope, receive, send)
