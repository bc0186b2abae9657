"""ModelScope and Hugging Face behind one interface: what files a set has, how big, which checksum.

Both hubs are asked directly, with the time-outs, retries and stop signal of `minillm.data.web`,
rather than through their clients: `modelscope_hub` lists only whole repositories, and
`huggingface_hub` follows a mirror's link to the next page back to the hub that it mirrors. The
price is that the two listing formats are read here, in some forty lines; docs/download.md has the
measurements.

Environment: `MODELSCOPE_ENDPOINT` (or `MODELSCOPE_DOMAIN`) and `HF_ENDPOINT` name a mirror;
`MODELSCOPE_API_TOKEN` is sent to ModelScope only, `HF_TOKEN` or a login of the `hf` command to
Hugging Face only; `HTTPS_PROXY` and its kin are obeyed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from huggingface_hub import get_token

from minillm.data.catalog import Place
from minillm.data.fetch import RemoteFile
from minillm.data.web import UnreachableError, Web
from minillm.errors import RunError
from minillm.log import Progress, task

PAGE_SIZE = 200  # of ModelScope's listing; Hugging Face chooses its own
TITLES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}
_ENDPOINTS = {
    "modelscope": (("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"), "https://modelscope.cn"),
    "huggingface": (("HF_ENDPOINT",), "https://huggingface.co"),
}


def endpoint(hub: str) -> str:
    """Return the address of a hub or of the mirror that stands for it."""
    variables, official = _ENDPOINTS[hub]
    found = [os.environ.get(name, "").strip() for name in variables]
    address = next(filter(None, found), official).rstrip("/")
    return address if "://" in address else f"https://{address}"


def auth_headers(hub: str) -> dict[str, str]:
    """Return the headers that prove who asks, if we have a token for the hub."""
    if hub == "huggingface":
        token = get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    # Its client sends both too: older addresses of the hub read only the cookie.
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}


def list_files(place: Place, web: Web, progress: Progress) -> list[RemoteFile]:
    """Ask a hub which files of a set it has.

    Returns:
        The files that match the set's pattern, by path.

    Raises:
        RunError: The hub does not answer, has no such set, or lists a path that would leave the
            target folder.
        SetupError: The hub wants a token.
    """
    lister = _list_modelscope if place.hub == "modelscope" else _list_huggingface
    found: dict[str, RemoteFile] = {}
    with task(progress, f"list {place.repo} on {TITLES[place.hub]}", None, "files"):
        for remote in lister(place, web):
            progress.advance(1)
            if any(fnmatchcase(remote.path, pattern) for pattern in place.pattern):
                found[check_relative(remote.path)] = remote
    if not found:
        raise RunError(
            f"`{place.repo}` on {TITLES[place.hub]} has no file `{place.pattern[0]}`",
            hint="the set may have moved; `--hub` chooses another hub where a set is on two",
        )
    return [found[path] for path in sorted(found)]


def check_relative(path: str) -> str:
    """Return `path` if it stays inside the folder it is joined to.

    Raises:
        RunError: It is absolute, climbs with `..`, or hides a drive, backslash or NUL.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or any(bad in path for bad in "\\\0:"):
        raise RunError(
            f"the listed path `{path}` would leave the target folder",
            hint="nothing was written; do not trust this source, choose another `--hub`",
        )
    return path


def inside(root: Path, path: str) -> Path:
    """Join a listed path to `root`, refusing links that lead out of it.

    Raises:
        RunError: The result is not below `root`.
    """
    joined = root / check_relative(path)
    if not joined.resolve().is_relative_to(root.resolve()):
        raise RunError(
            f"`{joined}` leads out of `{root}`",
            hint=f"look for a link inside `{root}`, remove it, and run the same command again",
        )
    return joined


def _list_modelscope(place: Place, web: Web) -> Iterator[RemoteFile]:
    base = f"{endpoint(place.hub)}/api/v1/{place.kind}/{place.repo}/repo"
    query: dict[str, Any] = {"Revision": "master", "Recursive": "True", "PageSize": PAGE_SIZE}
    if place.folder:
        query["Root"] = place.folder
    number, seen, is_last = 0, set[str](), False
    while not is_last:
        number += 1
        url = f"{base}/tree?{urlencode({**query, 'PageNumber': number})}"
        # A later page is now and then forbidden for no reason: the first has shown that we may.
        retry = {403} if number > 1 else set[int]()
        answer, _ = web.get_json(url, auth_headers(place.hub), retry_too=retry)
        with _as_listing(url):
            items = answer["Data"]["Files"]
            page = [_from_modelscope(item, base) for item in items if item["Type"] != "tree"]
            names = {item["Path"] for item in items}
        is_last = len(items) < PAGE_SIZE
        if not is_last and names <= seen:
            raise _endless(url)
        seen |= names
        yield from page


def _from_modelscope(item: Any, base: str) -> RemoteFile:
    query = urlencode({"Revision": "master", "FilePath": item["Path"]})
    digest = f"sha256:{item['Sha256']}" if item.get("Sha256") else ""
    return RemoteFile(item["Path"], int(item["Size"]), digest, f"{base}?{query}")


def _list_huggingface(place: Place, web: Web) -> Iterator[RemoteFile]:
    base, headers = endpoint(place.hub), auth_headers(place.hub)
    api = f"{base}/api/{place.kind}/{place.repo}"
    answer, _ = web.get_json(f"{api}/revision/main", headers)
    with _as_listing(f"{api}/revision/main"):
        commit = answer["sha"]  # every address names it, so that all files are of one version
    prefix = "" if place.kind == "models" else f"{place.kind}/"
    resolve = f"{base}/{prefix}{place.repo}/resolve/{commit}"
    tree = f"{api}/tree/{commit}" + (f"/{quote(place.folder)}" if place.folder else "")
    query = "recursive=true&expand=false"
    seen = set[str]()
    while query:
        if query in seen:
            raise _endless(f"{tree}?{query}")
        seen.add(query)
        answer, reply = web.get_json(f"{tree}?{query}", headers)
        with _as_listing(tree):
            page = [_from_huggingface(item, resolve) for item in answer if item["type"] == "file"]
        yield from page
        # Only the query: a mirror's link to the next page may name the hub that it mirrors.
        query = urlsplit(reply.links.get("next", {}).get("url", "")).query


def _from_huggingface(item: Any, resolve: str) -> RemoteFile:
    digest = f"sha256:{item['lfs']['oid']}" if item.get("lfs") else f"git:{item['oid']}"
    return RemoteFile(item["path"], int(item["size"]), digest, f"{resolve}/{quote(item['path'])}")


def _endless(url: str) -> UnreachableError:
    return UnreachableError(
        f"`{url}` gives the same page of its listing again and again",
        hint="choose another `--hub`, or another mirror in MODELSCOPE_ENDPOINT or HF_ENDPOINT",
    )


@contextmanager
def _as_listing(url: str) -> Iterator[None]:
    """Name the address when its JSON is not a listing."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UnreachableError(
            f"`{url}` answered JSON that is not a listing ({err!r})",
            hint="check MODELSCOPE_ENDPOINT and HF_ENDPOINT, or choose another `--hub`",
        ) from err
