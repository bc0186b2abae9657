"""Tie downloaded ids to the tokenizer that made them, so that later commands refuse any other.

The published sets say nothing about their tokenizer. A `.bin` gets its manifest here, which costs
one scan and saves every later command its own; a parquet of SFT rows gets `NAME.parquet.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from minillm.data.binfile import TokenFile
from minillm.data.manifest import Manifest, manifest_path
from minillm.data.tokenizer import fingerprint, load_tokenizer
from minillm.errors import InputError
from minillm.files import write_text
from minillm.log import Progress, task


def bind(folder: Path, digests: Mapping[str, str], tokenizer: Path, progress: Progress) -> str:
    """Write beside each token file and each parquet which tokenizer its ids belong to.

    Args:
        folder: Where the files are.
        digests: `sha256:HEX` of each file by its path below `folder`.
        tokenizer: Folder of the published tokenizer.
        progress: Told of scanned bytes.

    Returns:
        The tokenizer's fingerprint.

    Raises:
        InputError: The tokenizer cannot be read, or cannot have made the ids.
    """
    fp = fingerprint(tokenizer)
    for name, digest in digests.items():
        path = folder / name
        if path.suffix == ".bin" and not _is_bound(path, digest, fp):
            with task(progress, f"scan {path.name}", path.stat().st_size, "bytes"):
                found = TokenFile.scan(path, load_tokenizer(tokenizer), progress.advance)
            found.manifest.write(manifest_path(path))
        if path.suffix == ".parquet":
            write_text(manifest_path(path), json.dumps({"tokenizer_sha256": fp}) + "\n")
    return fp


def _is_bound(path: Path, digest: str, fp: str) -> bool:
    beside = manifest_path(path)
    if not beside.is_file():
        return False
    try:
        manifest = Manifest.read(beside)
    except InputError:
        return False
    return (manifest.tokenizer_sha256, f"sha256:{manifest.sha256}") == (fp, digest)
