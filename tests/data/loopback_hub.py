"""A hub on the loopback address that speaks ModelScope's and Hugging Face's protocols, and lies.

Protocols: the listing, metadata and download endpoints of both hubs, paged; that they are spoken
rightly, `benchmarks/hub_faults.py` proves with the hubs' own clients. Hugging Face bodies come by a
redirect to `localhost`, another origin than `127.0.0.1`, as from its CDN. It is an HTTP proxy, too.
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
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

PAGE = 3
SLOW_CHUNK = 256 * 1024
COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    path: str
    range: str
    authorization: str
    cookie: str
    sent_bytes: int


@dataclass
class Fault:
    """What goes wrong with the next answers about one file or the listing."""

    kind: str  # status, cut, cut_whole, flip, other, short, html, ignore_range, slow, stall
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    at: int = 0

    def spoil(self, data: bytes) -> bytes:
        """Return the bytes that are sent in place of a file's."""
        if self.kind == "flip":
            return data[: self.at] + bytes([data[self.at] ^ 1]) + data[self.at + 1 :]
        if self.kind == "other":
            return bytes(len(data))
        return data[: self.at] if self.kind == "short" else data


class LoopbackHub:
    """Files by repository and path, faults by path (`listing` for the listing)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.small: set[str] = set()  # paths that Hugging Face keeps in git, without sha256
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.url = ""
        self.is_sending = False  # a slow or stalling body has begun
        self.links_to = ""  # a mirror's link to the next page may name the hub that it mirrors
        self.repeats_pages = False  # ModelScope's listing ignores PageNumber
        self.released = threading.Event()  # ends every stall

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
        return [r for r in self.requests if "/cdn/" in r.path or "FilePath=" in r.path]

    def forget(self) -> None:
        """Start counting anew."""
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)  # of a whole address, as a proxy gets it, too
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
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))

    def _resolve(self, repo: str, path: str) -> None:
        data = self.hub.repos[repo].get(path)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        port = urlsplit(self.hub.url).port
        headers = {
            "Location": f"http://localhost:{port}/cdn/{repo}/{quote(path)}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
        }
        self._send(302, b"", headers)

    def _modelscope(self, repo: str, rest: list[str], query: dict[str, str]) -> None:
        files = self.hub.repos[repo]
        if rest == ["repo"]:
            self._body(query["FilePath"], files[query["FilePath"]])
            return
        size, number = int(query["PageSize"]), int(query["PageNumber"])
        number = 1 if self.hub.repeats_pages else number
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
        if rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._listing({"sha": COMMIT, "id": repo, "siblings": siblings})
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
                oid = hashlib.sha256(files[path]).hexdigest()
                row["lfs"] = {"oid": oid, "size": row["size"], "pointerSize": 133}
            rows.append(row)
        headers = {}
        if start + PAGE < len(paths):
            here = urlsplit(self.path).path
            host = self.hub.links_to or self.hub.url
            headers["Link"] = f'<{host}{here}?{_later(query, start + PAGE)}>; rel="next"'
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
        data = fault.spoil(data)
        start, stop = 0, len(data)
        wanted = self.headers.get("Range", "")
        if wanted and fault.kind not in ("ignore_range", "cut_whole"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or stop) + bool(last), stop)
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
        is_part = (start, stop) != (0, len(data))
        headers = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        if is_part:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        is_cut = fault.kind in ("cut", "cut_whole")
        end = min(fault.at, stop) if is_cut else stop
        if fault.kind in ("slow", "stall"):
            headers["X-Fault"] = f"{fault.kind} {fault.at}"
        self._send(206 if is_part else 200, data[start:end], headers, is_body=True)
        if is_cut:
            self.close_connection = True

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, is_body: bool = False
    ) -> None:
        is_head = self.command == "HEAD"
        sent = len(body) if is_body and not is_head else 0
        asked = [self.headers.get(name, "") for name in ("Range", "Authorization", "Cookie")]
        self.hub.requests.append(Request(self.path, *asked, sent))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if is_head:
            return
        try:
            self._write(body, headers.get("X-Fault", ""))
        except OSError:  # the client has gone
            self.close_connection = True

    def _write(self, body: bytes, fault: str) -> None:
        if not fault:
            self.wfile.write(body)
            return
        kind, stall_at = fault.split()
        for at in range(0, len(body), SLOW_CHUNK):
            if kind == "stall" and at >= int(stall_at):
                self.hub.released.wait(60)
            self.wfile.write(body[at : at + SLOW_CHUNK])
            self.hub.is_sending = True
            if kind == "slow":
                time.sleep(0.05)


def _later(query: dict[str, str], cursor: int) -> str:
    return urlencode({**query, "cursor": cursor})


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
            hub.released.set()
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
