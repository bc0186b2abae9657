"""A scripted generator behind a real uvicorn server on a free loopback port."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from minillm.models.generator import Delta
from minillm.models.sampling import SamplingParams
from minillm.serve.http import create_app
from minillm.serve.server import Server, listen
from minillm.serve.worker import Worker

MODEL = "lab/scripted"


class ByteTokenizer:
    """One token per UTF-8 byte."""

    chat_template = "{% if enable_think %}<think>{% endif %}"
    added_tokens_decoder: Mapping[int, Any] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, index: int) -> str:
        return f"<0x{index:02X}>"

    def get_vocab(self) -> dict[str, int]:
        return {chr(index): index for index in range(256)}


class ScriptedGenerator:
    """Answers the last message by a script; each piece is a delta of one token.

    `slow` never ends by itself, `boom` fails after one piece, `die` kills the thread.
    """

    script: Mapping[str, Sequence[str]] = {
        "hi": ("Hel", "lo", "!"),
        "think": ("<thi", "nk>\nlet me", " see\n</think>\n\n", "42"),
        "chinese": ("你", "好，世", "界 🙂‍↔️", "\u2028\n"),
        "empty": (),
        "call": (
            "See.\n<to",
            'ol_call>\n{"name": "add", "argu',
            'ments": {"a": 1}}\n</tool_c',
            "all>",
        ),
        "calls": ('<tool_call>{"name": "add"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>',),
        "broken": ("<tool_call>{oops</tool_call> a <b",),
    }

    def __init__(self, max_context: int = 400, delay_s: float = 0.01) -> None:
        self.tokenizer = ByteTokenizer()
        self.max_context, self.vocab_size, self.delay_s = max_context, 256, delay_s
        self.eos_ids: tuple[int, ...] = ()
        self.seen: list[SamplingParams] = []
        self.prompts: list[str] = []
        self.num_running = 0

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, enable_think: bool = False, **_: Any
    ) -> list[int]:
        text = "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)
        return self.tokenizer.encode(text + "[assistant]" + ("<think>\n" if enable_think else ""))

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        prompt = self.tokenizer.decode(prompt_ids)
        self.prompts.append(prompt)
        self.seen.append(params)
        word = prompt.removesuffix("<think>\n").removesuffix("[assistant]").split("]")[-1]
        self.num_running += 1
        try:
            yield from self._pieces(word, params, cancel or threading.Event())
        finally:
            self.num_running -= 1

    def _pieces(
        self, word: str, params: SamplingParams, cancel: threading.Event
    ) -> Iterator[Delta]:
        if word == "die":
            raise SystemExit
        if word == "boom":
            yield Delta("so far", (1,), None)
            raise ValueError("secret detail")
        pieces = iter(("x",) * 10**6 if word == "slow" else self.script.get(word, ("ok",)))
        for count, piece in enumerate(pieces, start=1):
            if cancel.is_set():
                yield Delta("", (), "cancelled")
                return
            yield Delta(piece, (count % 256,), None)
            if word == "slow":
                time.sleep(self.delay_s)
            if count == params.max_tokens:
                yield Delta("", (), "length")
                return
        yield Delta("", (), "stop")


@dataclass
class Running:
    """A server in a thread."""

    url: str
    worker: Worker
    server: Server
    generator: ScriptedGenerator = field(repr=False)

    def wait_idle(self, within_s: float) -> float:
        """Return the seconds until nothing is in work or waiting."""
        start = time.monotonic()
        while self.worker.num_open:
            assert time.monotonic() - start < within_s, "the place was not freed"
            time.sleep(0.005)
        return time.monotonic() - start


@contextmanager
def running(
    generator: ScriptedGenerator,
    *,
    model: str = MODEL,
    max_waiting: int = 64,
    api_key: str = "",
    drain_s: int = 0,
    **options: Any,
) -> Iterator[Running]:
    """Serve `generator` until the block ends."""
    worker = Worker(generator, max_waiting=max_waiting)
    options.setdefault("keys", {"it": api_key} if api_key else None)
    app = create_app(worker, model=model, **options)
    server = Server(app, drain_s, worker.abort_all)
    ready = threading.Event()
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run_on, args=(sock, ready.set), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert ready.wait(10)
        try:
            yield Running(url, worker, server, generator)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(10)
            worker.close()
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with the default limits."""
    with running(ScriptedGenerator()) as it:
        yield it


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[Running]]:
    """Start a server of one's own."""
    return running


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedGenerator]:
    """The scripted generator's class."""
    return ScriptedGenerator
