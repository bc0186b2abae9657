"""A hub on the loopback address that speaks ModelScope's and Hugging Face's protocols, and lies.

Protocols: the listing and download endpoints of both hubs, paged. Hugging Face bodies come by a
redirect to `localhost`, another origin than `127.0.0.1`, as from its CDN.
"""

import hashlib
import io
import json
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3
SLOW_CHUNK = 256 * 1024
COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    path: str
    range: str
    authorization: str
    sent_bytes: int


@dataclass
class Fault:
    """What goes wrong with the next answers about one file or the listing."""

    kind: str  # status, cut, cut_whole, flip, html, ignore_range, slow
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    at: int = 0


class LoopbackHub:
    """Files by repository and path, faults by path (`listing` for the listing)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.small: set[str] = set()  # paths that Hugging Face keeps in git, without sha256
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.url = ""

    def fault(self, path: str) -> Fault | None:
        """Use up one fault of a path."""
        waiting = self.faults[path]
        if not waiting:
            return None
        waiting[0].times -= 1
        return waiting.pop(0) if waiting[0].times <= 0 else waiting[0]

    @property
    def sent_bytes(self) -> int:
        """Bytes of file bodies sent since the last `forget`."""
        return sum(request.sent_bytes for request in self.requests)

    def bodies(self) -> list[Request]:
        """Requests for a file's bytes."""
        return [r for r in self.requests if r.path.startswith("/cdn/") or "FilePath=" in r.path]

    def forget(self) -> None:
        """Start counting anew."""
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = unquote(url.path).strip("/").split("/")
        if parts[:2] == ["api", "v1"]:
            self._modelscope("/".join(parts[3:5]), parts[5:], query)
        elif parts[0] == "api":
            self._huggingface_api("/".join(parts[2:4]), parts[4:], query)
        elif parts[0] == "cdn":
            repo, path = "/".join(parts[1:3]), "/".join(parts[3:])
            self._body(path, self.hub.repos[repo][path])
        else:
            parts = parts[1:] if parts[0] == "datasets" else parts
            repo, path = "/".join(parts[:2]), "/".join(parts[4:])
            port = urlsplit(self.hub.url).port
            self._send(302, b"", {"Location": f"http://localhost:{port}/cdn/{repo}/{path}"})

    def _modelscope(self, repo: str, rest: list[str], query: dict[str, str]) -> None:
        files = self.hub.repos[repo]
        if rest == ["repo"]:
            self._body(query["FilePath"], files[query["FilePath"]])
            return
        size, number = int(query["PageSize"]), int(query["PageNumber"])
        chosen = _below(files, query.get("Root", ""))[(number - 1) * size : number * size]
        rows = [
            {
                "Path": path,
                "Size": len(files[path]),
                "Sha256": hashlib.sha256(files[path]).hexdigest(),
                "Type": "blob",
            }
            for path in chosen
        ]
        self._listing({"Code": 200, "Data": {"Files": rows}})

    def _huggingface_api(self, repo: str, rest: list[str], query: dict[str, str]) -> None:
        files = self.hub.repos[repo]
        if rest[0] == "revision":
            self._listing({"sha": COMMIT})
            return
        start = int(query.get("cursor", 0))
        paths = _below(files, "/".join(rest[2:]))
        rows = []
        for path in paths[start : start + PAGE]:
            blob = b"blob %d\0" % len(files[path]) + files[path]
            row: dict[str, Any] = {
                "type": "file",
                "path": path,
                "size": len(files[path]),
                "oid": hashlib.sha1(blob).hexdigest(),
            }
            if path not in self.hub.small:
                row["lfs"] = {"oid": hashlib.sha256(files[path]).hexdigest(), "size": row["size"]}
            rows.append(row)
        headers = {}
        if start + PAGE < len(paths):
            # A mirror's link names the hub it mirrors: only the query may be used.
            headers["Link"] = f'<http://mirrored.invalid/x?cursor={start + PAGE}>; rel="next"'
        self._listing(rows, headers)

    def _listing(self, tree: Any, headers: dict[str, str] | None = None) -> None:
        fault = self.hub.fault("listing")
        if fault and fault.kind == "status":
            self._send(fault.status, b"{}", fault.headers)
        elif fault and fault.kind == "html":
            self._send(200, b"<html>please log in</html>", {})
        else:
            self._send(200, json.dumps(tree).encode(), headers or {})

    def _body(self, path: str, data: bytes) -> None:
        fault = self.hub.fault(path) or Fault("none")
        if fault.kind == "status":
            self._send(fault.status, b"busy", fault.headers)
            return
        if fault.kind == "html":
            self._send(200, b"<html>please log in</html>", {})
            return
        if fault.kind == "flip":
            data = data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
        wanted = self.headers.get("Range", "")
        ignores_range = fault.kind in ("ignore_range", "cut_whole")
        start = int(wanted[6:-1]) if wanted and not ignores_range else 0
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        is_cut = fault.kind in ("cut", "cut_whole")
        end = fault.at if is_cut else len(data)
        if fault.kind == "slow":
            headers["X-Slow"] = "yes"
        self._send(206 if start else 200, data[start:end], headers, is_body=True)
        if is_cut:
            self.close_connection = True

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, is_body: bool = False
    ) -> None:
        sent = len(body) if is_body else 0
        auth = self.headers.get("Authorization", "")
        self.hub.requests.append(Request(self.path, self.headers.get("Range", ""), auth, sent))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if "X-Slow" not in headers:
            self.wfile.write(body)
            return
        for at in range(0, len(body), SLOW_CHUNK):
            try:
                self.wfile.write(body[at : at + SLOW_CHUNK])
            except OSError:  # the client has gone
                return
            time.sleep(0.05)


def _below(files: dict[str, bytes], folder: str) -> list[str]:
    return sorted(path for path in files if not folder or path.startswith(f"{folder}/"))


@contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    """Serve an empty hub for the block."""
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def make_zip(members: dict[str, bytes], mode: int = 0o100644) -> bytes:
    """Return a zip whose members all have one Unix mode."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bundle:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            bundle.writestr(info, data)
    return stream.getvalue()
