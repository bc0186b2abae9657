"""Lets llama.cpp's own server tests run against minillm: `pytest -p llama_suite_shim unit/…`.

A pytest plugin for `tools/server/tests` (in the source archive of llama-cpp-python). Instead of the
binary it starts minillm's application in a thread, with the model at `SHIM_MODEL`, and translates
paths and llama.cpp's own `/completion` JSON. What minillm answers is not changed otherwise.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from minillm.serve.engine import Engine
from minillm.serve.engine_backend import EngineBackend
from minillm.serve.http import create_app
from minillm.serve.memory import EngineSettings
from minillm.serve.sampling_choice import Defaults
from minillm.serve.server import Server, listen
from minillm.serve.source import load

sys.path.insert(0, str(Path.cwd()))
import utils
from requests.structures import CaseInsensitiveDict
from starlette.responses import JSONResponse

MODEL, TOKENIZER = load(os.environ["SHIM_MODEL"], device="cpu", precision="float32", quantize=None)
NATIVE = ("/completion", "/completions")
UNUSED = ("cache_prompt", "id_slot", "return_tokens", "verbose", "timings_per_token")


def _ids(text: Any) -> list[int]:
    is_id = isinstance(text, int) or text.isdigit()
    return [int(text)] if is_id else TOKENIZER.encode(text, add_special_tokens=False)


def _prompt(given: Any) -> Any:
    """Return ids where llama.cpp's mixtures of text, ids and objects are not OpenAI's."""
    if isinstance(given, dict):
        return given if "multimodal_data" in given else given["prompt_string"]
    if not isinstance(given, list) or all(type(one) is type(given[0]) for one in given):
        return given
    if any(isinstance(one, int) for one in given):
        return [i for one in given for i in _ids(one)]
    return [one if isinstance(one, list) else _ids(_prompt(one)) for one in given]


class Translated:
    """An application that understands llama.cpp's paths and JSON."""

    def __init__(self, app: Any, it: Any, name: str, backend: EngineBackend) -> None:
        self.app, self.it, self.name, self.backend = app, it, name, backend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Translate a request and, if it is of llama.cpp's own kind, its answer."""
        path = scope.get("path", "")
        is_native = path in NATIVE and scope.get("method") == "POST"
        if path in ("/models", "/chat/completions", "/responses", *NATIVE):
            path = "/v1" + ("/completions" if path in NATIVE else path)
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if path == "/slots":
            busy = self.backend.stats().num_running
            told = [{"is_processing": n < busy} for n in range(self.it.n_slots)]
            return await JSONResponse(told)(scope, receive, send)
        if scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        sent = self._ask(json.loads(body), is_native, path)
        ready = [{"type": "http.request", "body": json.dumps(sent).encode(), "more_body": False}]

        async def replay() -> Any:
            return ready.pop() if ready else await receive()

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                pairs = [pair for pair in message["headers"] if pair[0] != b"content-length"]
                message = {**message, "headers": pairs}
            elif message.get("body"):
                message = {**message, "body": self._tell(message["body"], sent)}
            await send(message)

        return await self.app(scope, replay, answer if is_native else send)

    def _ask(self, given: Any, is_native: bool, path: str) -> Any:
        sent = {key: value for key, value in given.items() if key not in UNUSED}
        if path.startswith("/v1/"):
            sent["model"] = self.name  # llama.cpp takes any name
            if "responses" not in path:
                sent.setdefault("seed", self.it.seed)
        if "json_schema" in sent:
            form = {"schema": sent.pop("json_schema")}
            sent["response_format"] = {"type": "json_schema", "json_schema": form}
        if is_native:
            limit = sent.pop("n_predict", self.it.n_predict)
            sent["max_tokens"] = limit if limit and limit > 0 else 10**6
            self.fields = sent.pop("response_fields", [])
            sent["prompt"] = _prompt(sent.get("prompt"))
            bias = sent.get("logit_bias", {})
            pairs = bias.items() if isinstance(bias, dict) else bias
            sent["logit_bias"] = {str(i): value for key, value in pairs for i in _ids(key)}
        return sent

    def _tell(self, body: bytes, sent: Any) -> bytes:
        if not body.startswith(b"data: "):
            return self._json(json.loads(body), sent)
        parts = body.decode().split("\n\n")[:-1]
        told = [
            part
            if part.endswith("[DONE]")
            else "data: " + self._json(json.loads(part[6:]), sent).decode()
            for part in parts
        ]
        return "".join(f"{part}\n\n" for part in told).encode()

    def _json(self, given: Any, sent: Any) -> bytes:
        if "choices" not in given:
            return json.dumps(given).encode()
        settings = {"n_predict": sent["max_tokens"], "seed": self.it.seed}
        usage = given.get("usage") or {}
        timings = {
            "prompt_n": usage.get("prompt_tokens"),
            "cache_n": 0,
            "predicted_n": usage.get("completion_tokens"),
        }
        told = [
            {
                "content": one["text"],
                "tokens": [],
                "stop": one["finish_reason"] is not None,
                "stop_type": "limit" if one["finish_reason"] == "length" else "eos",
                "truncated": False,
                "has_new_line": "\n" in one["text"],
                "generation_settings": settings,
                "timings": timings,
                "prompt": sent["prompt"],
            }
            for one in given["choices"]
        ]
        if self.fields:
            told = [{key: one.get(key) for key in self.fields} for one in told]
        is_many = isinstance(sent["prompt"], list) and not isinstance(sent["prompt"][0], int)
        return json.dumps(told if is_many else told[0]).encode()


def start(it: Any, timeout_seconds: int = 60) -> None:
    """Start a server with the options of a `ServerProcess`."""
    context = (it.n_ctx or 1024) // (1 if it.kv_unified else it.n_slots or 1)
    settings = EngineSettings(max_running=it.n_slots or 4, cache_tokens=context)
    backend = EngineBackend(Engine(MODEL, TOKENIZER, settings))
    name = it.model_alias or "model"
    app = create_app(
        backend,
        model=name,
        defaults=Defaults(temperature=it.temperature, top_p=0.95),
        keys={"test": it.api_key} if it.api_key else None,
        cors_origins=[it.cors_origins or "*"],
    )
    translated: Any = Translated(app, it, name, backend)
    server = Server(translated, 0, backend.abort_all)
    ready, sock = threading.Event(), listen(it.server_host, it.server_port)
    thread = threading.Thread(target=server.run_on, args=(sock, ready.set), daemon=True)
    thread.start()
    assert ready.wait(timeout_seconds)
    it.running = server, thread, sock, backend
    utils.server_instances.add(it)


def stop(it: Any) -> None:
    """Stop it."""
    if it in utils.server_instances:
        utils.server_instances.remove(it)
        server, thread, sock, backend = it.running
        server.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        sock.close()
        backend.close()


def make_request(it: Any, *args: Any, **options: Any) -> Any:
    """Ask as the suite does, but look headers up whatever their case is."""
    found = ASK(it, *args, **options)
    found.headers = CaseInsensitiveDict(found.headers)
    return found


ASK = utils.ServerProcess.make_request
utils.ServerProcess.make_request = make_request
utils.ServerProcess.start, utils.ServerProcess.stop = start, stop
utils.ServerPreset.load_all = staticmethod(lambda: None)
