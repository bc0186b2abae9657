"""Start and stop the server: take the port, load the model, serve, drain."""

import asyncio
import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minillm.errors import ConfigError, SetupError
from minillm.models.generator import Generator
from minillm.serve.http import create_app
from minillm.serve.schema import Defaults
from minillm.serve.source import find_source, load, short_name
from minillm.serve.worker import Worker
from minillm.settings import ServeConfig

LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))


def run_server(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM (returns) or Ctrl-C (raises KeyboardInterrupt).

    The port is taken before the model is loaded, so that a taken port costs no time.

    Args:
        config: Model, address, limits.
        announce: Gets the lines for the person who started the server.

    Raises:
        SetupError: The address cannot be listened on, or the device is not there.
        InputError: The model cannot be found or loaded.
    """
    source = find_source(config.model)
    with listen(config.host, config.port) as sock:
        announce(f"loading `{source}`")
        model, tokenizer = load(source, device=config.device, precision=config.precision)
        name = config.served_model_name or short_name(source)
        worker = Worker(Generator(model, tokenizer), max_waiting=config.max_waiting)
        app = create_app(
            worker,
            model=name,
            defaults=Defaults(config.temperature, config.top_p),
            api_key=config.api_key,
        )
        try:
            serve_app(
                app,
                sock,
                drain_s=config.drain_s,
                ready=lambda: welcome(config, name, sock, announce),
            )
        finally:
            worker.close()


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


def serve_app(
    app: FastAPI, sock: socket.socket, *, drain_s: int, ready: Callable[[], None]
) -> None:
    """Run `app` on a listening socket until a signal.

    Running answers get `drain_s` seconds to end; a second Ctrl-C does not wait.

    Raises:
        KeyboardInterrupt: The server was stopped by Ctrl-C, after it has shut down.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=drain_s,
        lifespan="off",
    )
    server = Server(config, ready)
    asyncio.run(server.serve(sockets=[sock]))
    if server.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


class Server(uvicorn.Server):
    """uvicorn's server that says when it is ready, and does not raise its signal again."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        """Call `ready` once connections are accepted."""
        super().__init__(config)
        self._ready = ready
        self.stopped_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets=sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after a drain; at once at the second signal."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.stopped_by = sig


def welcome(
    config: ServeConfig, name: str, sock: socket.socket, announce: Callable[[str], None]
) -> None:
    """Tell where the server is and how to try it."""
    host = config.host if config.host not in ("0.0.0.0", "::") else "127.0.0.1"
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{sock.getsockname()[1]}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_key else ""
    example = {"model": name, "messages": [{"role": "user", "content": "你好"}]}
    body = json.dumps(example, ensure_ascii=False).replace("'", "'\\''")
    announce(f"model      {name}")
    announce(f"chat page  {url}/")
    announce(f"API        {url}/v1")
    announce(
        f"try        curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\"
    )
    announce(f"             -d '{body}'")
    if config.host not in LOOPBACK and not config.api_key:
        announce(f"warning: anyone who reaches {config.host} can use this server; see `--api-key`")
    announce("Ctrl-C stops it")
