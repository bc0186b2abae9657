"""`minillm inspect PATH`: find out what something is, and describe it.

Here, above data and models, because a run folder is about both. What needs torch is imported only
where such a thing is met, so that a token file is described at once.
"""

import zipfile
from pathlib import Path

from minillm import paths
from minillm.data.inspect_bin import inspect_bin
from minillm.data.inspect_near import fingerprints_in
from minillm.data.inspect_report import Report, Table
from minillm.data.inspect_sft import inspect_sft
from minillm.data.inspect_text import inspect_text, is_sft
from minillm.data.inspect_tokenizer import inspect_tokenizer
from minillm.errors import InputError
from minillm.log import Progress, Silent
from minillm.settings import InspectConfig

_LONG_BYTES = 50_000_000
_TEXT = (".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst")


def inspect(cfg: InspectConfig, progress: Progress) -> Report:
    """Describe a file or a folder.

    Args:
        cfg: What, and how much of it to show.
        progress: Where to report on long scans.

    Raises:
        InputError: There is nothing at the path, or nothing that we know.
        SetupError: A GGUF file, and the package `gguf` is not installed.
    """
    path = cfg.path
    if not path.exists():
        raise InputError(
            f"no file or folder at `{path}`", hint="`ls` shows what is here; name one of them"
        )
    look = _file if path.is_file() else _folder
    try:
        report = look(path, cfg, progress)
    except PermissionError as err:
        raise InputError(
            f"cannot read `{err.filename}`: {err.strerror}", hint=f"`chmod -R u+r {path}`"
        ) from err
    if report is None:
        raise InputError(
            f"`{path}` is none of: .bin, .parquet, .jsonl, .txt, .gguf, or a folder of a "
            "tokenizer, model or run, or of such files",
            hint="name one of those, for example `minillm inspect data`",
        )
    return report


def _file(path: Path, cfg: InspectConfig, progress: Progress) -> Report | None:
    name = path.name.lower()
    progress = _talk([path], progress)
    if name.endswith(".bin"):
        if _is_zip(path):
            report = Report(path.as_posix(), "pickled weights of torch")
            report.problems.append("it is a pickle, which minillm never reads")
            return report
        return inspect_bin(path, cfg, progress)
    if name.endswith(".parquet"):
        read = inspect_sft(path, cfg, progress) if is_sft(path) else None
        return read or inspect_text(path, [path], cfg, progress)
    if name.endswith(_TEXT):
        return inspect_text(path, [path], cfg, progress)
    if name.endswith(".gguf"):
        from minillm.train.inspect_model import inspect_gguf

        return inspect_gguf(path)
    if name == "tokenizer.json":
        return inspect_tokenizer(path.parent, cfg)
    if name in (paths.RUN_FILE, "config.json") or name.endswith((".safetensors", ".bin.json")):
        other = path.with_name(path.name.removesuffix(".json"))
        if name.endswith(".bin.json") and other.is_file():
            return inspect_bin(other, cfg, progress)
        return _special(path.parent, cfg)
    return None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04" and zipfile.is_zipfile(path)


def _special(folder: Path, cfg: InspectConfig) -> Report | None:
    """Describe a folder that is one thing: a run, a model, a tokenizer."""
    if (folder / paths.RUN_FILE).is_file():
        from minillm.train.inspect_run import inspect_run

        return inspect_run(folder, verify=cfg.verify)
    if (folder / "config.json").is_file() or (
        folder.absolute().parent.name == "checkpoints" and folder.name.startswith("step-")
    ):
        from minillm.train.inspect_model import inspect_model

        return inspect_model(folder, verify=cfg.verify)
    if (folder / "tokenizer.json").is_file() and not list(folder.glob("*.bin")):
        return inspect_tokenizer(folder, cfg)
    return None


def _folder(folder: Path, cfg: InspectConfig, progress: Progress) -> Report | None:
    """Describe a folder: as one thing if it is one, else by what is inside."""
    if (found := _special(folder, cfg)) is not None:
        return found
    report = Report(folder.as_posix(), "folder")
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    texts = [entry for entry in entries if entry.is_file() and _is_text(entry)]
    if texts:
        report.parts.append(inspect_text(folder, texts, cfg, _talk(texts, progress)))
    if folder.name.endswith(".bin.work"):
        report.notes.append("parts of a token file: the same `minillm tokenize` goes on with them")
    num_other = 0
    for entry in entries:
        if entry.is_dir():
            part = None if entry.is_symlink() else _folder(entry, cfg, progress)
        elif entry in texts or _is_manifest(entry, report):
            continue
        else:
            part = _file(entry, cfg, progress)
            num_other += part is None
        if part is not None:
            report.parts.append(part)
    if not report.parts and not report.problems:
        return None
    _summarize(report, num_other)
    _compare(folder, report)
    return report


def _is_manifest(path: Path, report: Report) -> bool:
    """Tell whether a file only speaks of another one, which must be there."""
    if not path.name.endswith((".bin.json", ".parquet.json")):
        return False
    if not path.with_name(path.name.removesuffix(".json")).is_file():
        report.problems.append(f"`{path.name}` is a manifest without its file")
    return True


def _is_text(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(_TEXT) or (name.endswith(".parquet") and not is_sft(path))


def _talk(files: list[Path], progress: Progress) -> Progress:
    """Return the progress display, or a silent one where the scan takes no time."""
    return progress if sum(file.stat().st_size for file in files) > _LONG_BYTES else Silent()


def _summarize(report: Report, num_other: int) -> None:
    """Put a line for each part on top; the rest of a part is for when it is named."""
    rows = []
    for part in report.parts:
        facts = part.facts
        size = facts.get("size_bytes")
        amount = next(
            (
                f"{facts[name]:,} {name}"
                for name in ("tokens", "documents", "dialogues", "parameters", "step", "vocabulary")
                if isinstance(facts.get(name), int)
            ),
            "",
        )
        if part.kind == "folder":
            amount = f"{len(part.parts)} things"
        name = Path(part.path).relative_to(report.path).as_posix()
        shown = f"{size / 1e6:,.1f} MB" if isinstance(size, int) else ""
        rows.append([name, part.kind, shown, amount, part.num_problems])
    report.tables.append(Table("inside", ["name", "what", "size", "holds", "problems"], rows))
    if num_other:
        report.notes.append(f"{num_other} other files, which are none of our kinds")


def _compare(folder: Path, report: Report) -> None:
    made_with = fingerprints_in(folder)
    kinds = sorted(set(made_with.values()))
    if len(kinds) > 1:
        first = {kind: next(n for n, k in made_with.items() if k == kind) for kind in kinds}
        names = ", ".join(f"`{name}` {kind[:12]}…" for kind, name in first.items())
        report.problems.append(f"made with {len(kinds)} tokenizers, not to be mixed: {names}")
