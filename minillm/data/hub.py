"""ModelScope and Hugging Face behind one interface: what files a set has, how big, which checksum.

Both hubs are asked directly, with the time-outs and retries of `minillm.data.fetch`. Their own
clients each miss a fault that the other notices: one accepts a flipped byte of the right size, one
follows a listed path out of the target folder, and neither resumes and retries everywhere. The
price is that the two listing formats are read here, in some forty lines.

Environment: `MODELSCOPE_ENDPOINT` and `HF_ENDPOINT` name a mirror; `HF_TOKEN`, or a login of the
`hf` command, is sent to Hugging Face only.
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
from minillm.data.fetch import RemoteFile, UnreachableError, Web
from minillm.errors import RunError
from minillm.log import Progress, task

PAGE_SIZE = 200  # of ModelScope's listing; Hugging Face chooses its own
TITLES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}


def endpoint(hub: str) -> str:
    """Return the address of a hub or of the mirror that stands for it."""
    names = {
        "modelscope": ("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
        "huggingface": ("HF_ENDPOINT", "https://huggingface.co"),
    }
    variable, official = names[hub]
    return (os.environ.get(variable) or official).rstrip("/")


def auth_headers(hub: str) -> dict[str, str]:
    """Return the headers that prove who asks, if the hub has a token of ours."""
    if hub != "huggingface":
        return {}
    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


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
    found = {}
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
    number, is_last = 0, False
    while not is_last:
        number += 1
        url = f"{base}/tree?{urlencode({**query, 'PageNumber': number})}"
        answer, _ = web.get_json(url, {})
        with _as_listing(url):
            items = answer["Data"]["Files"]
            page = [_from_modelscope(item, base) for item in items if item["Type"] != "tree"]
        yield from page
        is_last = len(items) < PAGE_SIZE


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
    while query:
        answer, reply = web.get_json(f"{tree}?{query}", headers)
        with _as_listing(tree):
            page = [_from_huggingface(item, resolve) for item in answer if item["type"] == "file"]
        yield from page
        # Only the query: a mirror's link to the next page may name the hub that it mirrors.
        query = urlsplit(reply.links.get("next", {}).get("url", "")).query


def _from_huggingface(item: Any, resolve: str) -> RemoteFile:
    digest = f"sha256:{item['lfs']['oid']}" if item.get("lfs") else f"git:{item['oid']}"
    return RemoteFile(item["path"], int(item["size"]), digest, f"{resolve}/{quote(item['path'])}")


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
