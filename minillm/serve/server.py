"""Start and stop the server: take the port, load the model, serve, drain."""

import asyncio
import errno
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minillm.errors import ConfigError, SetupError
from minillm.models.generator import Generator
from minillm.serve.access import Door, read_keys
from minillm.serve.engine import Engine
from minillm.serve.engine_backend import EngineBackend
from minillm.serve.http import create_app
from minillm.serve.memory import EngineSettings, supports_engine
from minillm.serve.native import TransformersSource
from minillm.serve.sampling_choice import Defaults
from minillm.serve.source import find_source, load, short_name
from minillm.serve.worker import Worker
from minillm.settings import ServeConfig

SWITCH_S = 1e-4
"""How long a Python thread may go on while the engine's thread waits to begin its next step."""

LAST_WORDS_S = 3
"""How long a client may take to read that its answer was cut short."""

IDLE_S = 75
"""How long a silent connection stays open: longer than clients keep theirs, so that none is closed
at the moment it is used again (httpx, and so the openai client, gives one up after 5 seconds)."""

LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))


def run_server(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM (returns) or Ctrl-C (raises KeyboardInterrupt).

    The port is taken before the model is loaded, so that a taken port costs no time.

    Args:
        config: Model, address, limits.
        announce: Gets the lines for the person who started the server.

    Raises:
        SetupError: The address cannot be listened on, or the device is not there.
        InputError: The model cannot be found or loaded, or the file of keys is not as it must be.
    """
    keys = read_keys(config.api_key, config.api_key_file)
    source = find_source(config.model)
    with listen(config.host, config.port) as sock:
        announce(f"loading `{source}`")
        is_plain = config.backend == "transformers" and config.quantize == "none"
        quantize = None if is_plain else config.quantize
        model, tokenizer = load(
            source, device=config.device, precision=config.precision, quantize=quantize
        )
        name = config.served_model_name or short_name(source)
        worker = make_backend(model, tokenizer, config, announce)
        app = create_app(
            worker,
            model=name,
            defaults=Defaults(config.temperature, config.top_p),
            keys=keys,
            cors_origins=config.cors_origin,
            timeout_s=config.request_timeout,
        )
        server = Server(app, config.drain_s, worker.abort_all)
        gc.collect()
        gc.freeze()  # models and libraries: the collector need not walk them between tokens
        sys.setswitchinterval(SWITCH_S)
        try:
            server.run_on(sock, ready=lambda: welcome(config, name, sock, announce))
        finally:
            worker.close()
    if server.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


def make_backend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: ServeConfig,
    announce: Callable[[str], None],
) -> EngineBackend | Worker:
    """Return what answers: the engine, if the model is one that it can run.

    Raises:
        ConfigError: The engine's settings do not fit the model.
    """
    if config.backend == "engine" and supports_engine(model):
        settings = EngineSettings(
            max_running=config.max_running,
            cache_tokens=config.cache_tokens,
            prefill_chunk=config.prefill_chunk,
            speculate=config.speculate,
        )
        engine = Engine(model, tokenizer, settings)
        return EngineBackend(engine, max_waiting=config.max_waiting)
    if config.backend == "engine":
        announce("note: this model has layers that the engine does not know; one answer at a time")
    make = TransformersSource if config.backend == "transformers" else Generator
    return Worker(make(model, tokenizer), max_waiting=config.max_waiting)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host:port`; port 0 takes a free one.

    Raises:
        ConfigError: `host` is no address of any machine.
        SetupError: The port is taken or forbidden.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as err:
        raise ConfigError(
            f"`--host {host}` is not an address: {err.strerror}", hint="try `--host 127.0.0.1`"
        ) from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # there it only allows a quick restart, elsewhere it shares the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as err:
        sock.close()
        if err.errno == errno.EADDRINUSE:
            raise SetupError(
                f"port {port} on {host} is in use by another program",
                hint=f"take another: `minillm serve --port {_free_port(host, port)}`",
            ) from None
        hint = "ports below 1024 are reserved: try `--port 8000`"
        if err.errno != errno.EACCES:
            hint = "to be reached from this machine only: `--host 127.0.0.1`"
        raise SetupError(f"cannot listen on {host}:{port}: {err.strerror}", hint=hint) from None
    return sock


def _free_port(host: str, taken: int) -> int:
    """Return the next port that nobody listens on (`taken + 1` if none is found near it)."""
    for port in range(taken + 1, min(taken + 100, 65_536)):
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex((host if host != "0.0.0.0" else "127.0.0.1", port)) != 0:
                return port
    return taken + 1 if taken < 65_535 else 8000


class Server(uvicorn.Server):
    """uvicorn's server with a drain: it says when it is ready, and ends answers in good order.

    At the first signal new requests get a 503, and running answers get `drain_s` seconds.
    After that, or at the second signal, they are cut short with an error that the client can read.
    """

    def __init__(self, app: FastAPI, drain_s: int, abort: Callable[[], None]) -> None:
        """Serve `app`; `abort` cuts running answers short."""
        self._door = Door(app)
        super().__init__(
            uvicorn.Config(
                self._door,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=LAST_WORDS_S,
                timeout_keep_alive=IDLE_S,
                lifespan="off",
            )
        )
        self._drain_s, self._abort = drain_s, abort
        self._ready: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0
        self.stopped_by: int | None = None

    def run_on(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        """Serve on a listening socket until a signal; call `ready` once that has begun."""
        self._ready = ready
        asyncio.run(self.serve(sockets=[sock]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the running answers, then take no more connections."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_s
        while self.server_state.tasks and self._num_signals < 2 and loop.time() < end:
            await asyncio.sleep(0.02)
        if self.server_state.tasks:
            self._abort()
        await super().shutdown(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal. uvicorn would raise it again after the shutdown; this does not."""
        self._num_signals += 1
        self.stopped_by = sig
        self._door.close()
        self.should_exit = True
        if self._num_signals == 2 and self._loop is not None:
            self._loop.call_soon_threadsafe(self._abort)
        self.force_exit = self._num_signals > 2


def welcome(
    config: ServeConfig, name: str, sock: socket.socket, announce: Callable[[str], None]
) -> None:
    """Tell where the server is and how to try it."""
    has_key = bool(config.api_key or config.api_key_file)
    host = config.host if config.host not in ("0.0.0.0", "::") else "127.0.0.1"
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{sock.getsockname()[1]}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_key else ""
    example = {"model": name, "messages": [{"role": "user", "content": "你好"}]}
    body = json.dumps(example, ensure_ascii=False).replace("'", "'\\''")
    announce(f"model      {name}")
    announce(f"chat page  {url}/")
    announce(f"API        {url}/v1")
    announce(
        f"try        curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\"
    )
    announce(f"             -d '{body}'")
    if config.host not in LOOPBACK and not has_key:
        announce(f"warning: anyone who reaches {config.host} can use this server; see `--api-key`")
    announce("Ctrl-C stops it")
