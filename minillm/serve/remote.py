"""What a conversation is held with when the model is behind an OpenAI-compatible server.

Needs neither torch nor a tokenizer. Fields that OpenAI does not know are sent only if they are set.
"""

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from minillm.errors import ConfigError, InputError, MinillmError, RunError
from minillm.serve.chat import ContextFullError, Usage
from minillm.serve.think import Part, ThinkSplitter
from minillm.settings import SamplingConfig

POLL_S = 0.05  # how soon a Ctrl-C is seen
LIMITS = ("max_model_len", "context_length", "max_context_length")  # names that servers use


class RemoteSpeaker:
    """Messages in, text out, over HTTP."""

    def __init__(self, url: str, *, api_key: str = "", model: str = "") -> None:
        """Find the model on the server; an empty name is the first it lists.

        Raises:
            ConfigError: The address, the key or the model's name is wrong.
            RunError: There is no server, or it does not speak the protocol.
        """
        self.url = base_url(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(600, connect=10)
        self._client = httpx.Client(headers=headers, timeout=timeout, follow_redirects=True)
        try:
            models = self._models()
        except MinillmError:
            self.close()
            raise
        self.model = model or next(iter(models), "")
        if not self.model:
            self.close()
            raise RunError(f"{self.url} lists no model", hint="name one: `--model NAME`")
        found = models.get(self.model, {})
        limits = (found.get(name) for name in LIMITS)
        self.max_context = next((n for n in limits if isinstance(n, int) and n > 0), 0)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def count(self, messages: Sequence[Mapping[str, str]], *, think: bool) -> int:
        """Return 0: only the server can count, and tells after the answer."""
        return 0

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        settings: SamplingConfig,
        *,
        think: bool,
        cancel: threading.Event,
    ) -> Iterator[Part | Usage]:
        """Yield the parts of one answer, and the server's count of its tokens.

        Raises:
            ContextFullError: The conversation is too long for the model.
            ConfigError: The server refuses the key, the model or a setting.
            RunError: The connection broke, or the server failed.
        """
        body = {"model": self.model, "messages": list(messages), "stream": True}
        body |= {"stream_options": {"include_usage": True}, **_sampling(settings)}
        if think:
            body["chat_template_kwargs"] = {"enable_think": True, "enable_thinking": True}
        splitter, num_pieces, is_counted = ThinkSplitter(), 0, False
        for event in _Reader(self, body).events(cancel):
            if event.get("error"):
                raise self._refusal(200, event)
            if usage := event.get("usage"):
                is_counted = True
                yield Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                thought = delta.get("reasoning_content") or delta.get("reasoning")
                num_pieces += bool(thought or delta.get("content"))
                if not is_counted:
                    yield Usage(0, num_pieces)
                if thought:
                    yield Part("think", thought)
                yield from splitter.feed(delta.get("content") or "")
        yield from splitter.flush()

    def request(self, body: Mapping[str, Any]) -> contextlib.AbstractContextManager[httpx.Response]:
        """Ask for an answer; its events come in the response."""
        return self._client.stream("POST", f"{self.url}/chat/completions", json=body)

    def check(self, response: httpx.Response) -> None:
        """Raise what a refused request means."""
        if response.is_success:
            return
        response.read()
        try:
            tree = response.json()
        except ValueError:
            tree = None
        raise self._refusal(response.status_code, tree)

    def unreachable(self, error: Exception) -> RunError:
        """Return what a broken or missing connection means."""
        reason = str(error) or type(error).__name__
        hint = "is it running? `minillm serve` starts one at http://127.0.0.1:8000"
        return RunError(f"no answer from {self.url}: {reason}", hint=hint)

    def _models(self) -> dict[str, dict[str, Any]]:
        try:
            response = self._client.get(f"{self.url}/models")
            self.check(response)
            listed = response.json()["data"]
            return {str(model["id"]): model for model in listed}
        except httpx.HTTPError as error:
            raise self.unreachable(error) from None
        except (ValueError, KeyError, TypeError):
            hint = "the address of an OpenAI-compatible API mostly ends in `/v1`"
            raise RunError(f"{self.url}/models is no list of models", hint=hint) from None

    def _refusal(self, status: int, tree: Any) -> MinillmError:
        found = tree.get("error", tree) if isinstance(tree, dict) else {}
        fields = found if isinstance(found, dict) else {"message": found}
        message = str(fields.get("message") or fields.get("detail") or f"status {status}")
        message = " ".join(message.split())[:300]
        code = str(fields.get("code") or fields.get("type") or "")
        if status in (401, 403):
            return ConfigError(f"{self.url} refuses the key: {message}", hint="`--api-key KEY`")
        if status == 404:
            hint = f"`curl {self.url}/models` lists what it serves"
            return ConfigError(f"{self.url}: {message}", hint=hint)
        if "context" in code and "exceed" in code:
            return ContextFullError(message, hint="send a shorter message")
        if 400 <= status < 500 and status not in (408, 429):
            return InputError(f"{self.url} refuses the request: {message}")
        return RunError(f"{self.url} failed: {message}", hint="try again")


class _Reader:
    """Read the events of one response in a thread, so that a Ctrl-C need not wait for the next."""

    def __init__(self, speaker: RemoteSpeaker, body: Mapping[str, Any]) -> None:
        self._speaker, self._body = speaker, body
        self._queue: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        self._stop = threading.Event()
        self._socket: socket.socket | None = None

    def events(self, cancel: threading.Event) -> Iterator[dict[str, Any]]:
        """Yield the events until the end or until `cancel` is set; then hang up."""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            while not cancel.is_set():
                try:
                    item = self._queue.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._stop.set()
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread

    def _read(self) -> None:
        try:
            with self._speaker.request(self._body) as response:
                self._speaker.check(response)
                stream = response.extensions.get("network_stream")
                found = stream.get_extra_info("socket") if stream else None
                for event in _events(response.iter_lines()):
                    self._socket = found
                    if self._stop.is_set():
                        return
                    self._queue.put(event)
                self._socket = None  # whole: the connection is kept for the next question
            self._queue.put(None)
        except httpx.HTTPError as error:
            self._queue.put(self._speaker.unreachable(error))
        except MinillmError as error:
            self._queue.put(error)
        except (ValueError, AttributeError):
            self._queue.put(RunError(f"{self._speaker.url} sent an event that is no JSON"))


def base_url(url: str) -> str:
    """Return the address below which `/models` is.

    >>> base_url("http://127.0.0.1:8000/")
    'http://127.0.0.1:8000/v1'
    >>> base_url("https://api.example.org/v2/")
    'https://api.example.org/v2'

    Raises:
        ConfigError: It is no http address.
    """
    try:
        parts = urlsplit(url.strip())
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        parts.port  # noqa: B018  raises if it is no number
    except ValueError:
        is_address = False
    if not is_address:
        hint = "`--url http://127.0.0.1:8000`"
        raise ConfigError(f"`--url` must be an http address, got `{url}`", hint=hint)
    text = url.strip().rstrip("/")
    return text if parts.path.strip("/") else f"{text}/v1"


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of server-sent events until `[DONE]`."""
    for line in lines:
        name, _, value = line.partition(":")
        if name != "data" or not value.strip():
            continue
        if value.strip() == "[DONE]":
            for _line in lines:  # to the end, so that the connection can be used again
                pass
            return
        tree = json.loads(value)
        if isinstance(tree, dict):
            yield tree


def _sampling(settings: SamplingConfig) -> dict[str, Any]:
    """Return the settings as fields of a request."""
    fields: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p}
    fields["max_tokens"] = settings.max_tokens
    if settings.seed is not None:
        fields["seed"] = settings.seed
    if settings.frequency_penalty:
        fields["frequency_penalty"] = settings.frequency_penalty
    if settings.top_k:
        fields["top_k"] = settings.top_k
    if settings.repetition_penalty != 1:
        fields["repetition_penalty"] = settings.repetition_penalty
    return fields
