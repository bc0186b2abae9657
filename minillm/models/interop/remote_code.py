"""Write the code of an architecture into a model folder, for hubs and tools without minillm.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs the modeling file that
lies in the folder. It is made from our own sources: the file of the architecture and, before it,
those definitions of the shared blocks that it uses. Nothing else is copied, nothing is rewritten,
and docstrings and comments stay.
"""

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)

from minillm.errors import ConfigError
from minillm.files import write_text
from minillm.models import registry

PACKAGE = "minillm"
LINE_LENGTH = 100

_Import = tuple[str | None, str, str | None]
"""Module, or None for a plain `import`; name; alias."""

AUTO_CLASSES = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}

HEAD = '''\
"""{architecture} in one file, made by minillm {version} from its own sources.

Licence: Apache-2.0, as minillm. Needs transformers 5.23 or newer. Every part is taken over as it
is; it is better read in minillm, where each block is a short file of its own.
"""
'''


def write_remote_code(folder: str | Path, model: PreTrainedModel) -> Path:
    """Make a folder that `save_pretrained` wrote loadable with `trust_remote_code=True`.

    Writes `modeling_<architecture>.py` and the `auto_map` of `config.json`.

    Args:
        folder: Where the `config.json` of the model lies.
        model: A model of one of our architectures; tells which.

    Returns:
        The modeling file.

    Raises:
        ConfigError: The model is not of an architecture of ours.
    """
    architecture: str = model.config.model_type
    if architecture not in registry.ARCHITECTURES:
        raise ConfigError(
            f"there is no remote code for `{architecture}`: transformers has it already",
            hint="use `--to official`",
        )
    path = Path(folder) / f"modeling_{architecture}.py"
    write_text(path, flatten(registry.ARCHITECTURES[architecture][0], architecture))
    config_path = Path(folder) / "config.json"
    fields = json.loads(config_path.read_text(encoding="utf-8"))
    fields["auto_map"] = auto_map(type(model.config), path.stem)
    write_text(config_path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return path


def auto_map(config_class: Any, module: str) -> dict[str, str]:
    """Return which class in the file each of transformers' Auto classes means."""
    found = {"AutoConfig": f"{module}.{config_class.__name__}"}
    for auto, mapping in AUTO_CLASSES.items():
        model_class: Any = mapping.get(config_class, None)
        if model_class is not None:
            found[auto] = f"{module}.{model_class.__name__}"
    return found


def flatten(module: str, architecture: str) -> str:
    """Return one source text with all that `module` needs of this package."""
    sources: dict[str, _Source] = {}
    order: list[tuple[str, ast.stmt]] = []
    main = _read(module, sources)
    for statement in main.statements:
        if not _is_left_out(statement):
            _collect(main, statement, sources, order)
    used = {item for source in sources.values() for item in source.used_imports}
    version = importlib.import_module(PACKAGE).__version__
    parts = [HEAD.format(architecture=architecture, version=version) + "\n" + _imports(used)]
    parts += [sources[name].text_of(statement) for name, statement in order]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


@dataclass
class _Source:
    """A module of ours: its statements by the names they define, and what it imports."""

    name: str
    lines: list[str]
    statements: list[ast.stmt]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here → (module of ours, name there)."""
    foreign: dict[str, "_Import"] = field(default_factory=dict)
    used_imports: set["_Import"] = field(default_factory=set)
    done: set[int] = field(default_factory=set)

    def text_of(self, statement: ast.stmt) -> str:
        """Return the lines of a statement with its decorators and the comments above it."""
        first = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]
        )
        start = first - 1
        while start and self.lines[start - 1].startswith("#"):
            start -= 1
        following = self.statements.index(statement) + 1
        end = statement.end_lineno or first
        if following < len(self.statements) and _is_docstring(self.statements[following]):
            end = self.statements[following].end_lineno or end
        return "\n".join(self.lines[start:end])


def _read(name: str, sources: dict[str, _Source]) -> _Source:
    if name in sources:
        return sources[name]
    text = inspect.getsource(importlib.import_module(name))
    source = _Source(name, text.splitlines(), ast.parse(text).body)
    for statement in source.statements:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith(PACKAGE):
            for alias in statement.names:
                if alias.asname and alias.asname != alias.name:
                    raise ValueError(f"{name} renames {alias.name}: give it its own name")
                source.ours[alias.name] = (statement.module or "", alias.name)
        elif isinstance(statement, ast.ImportFrom | ast.Import):
            source.foreign.update(_single_imports(statement))
        else:
            source.defined.update(dict.fromkeys(_names_defined(statement), statement))
    sources[name] = source
    return source


def _collect(
    source: _Source,
    statement: ast.stmt,
    sources: dict[str, _Source],
    order: list[tuple[str, ast.stmt]],
) -> None:
    """Append a statement to `order`, after those that it uses."""
    if id(statement) in source.done:
        return
    source.done.add(id(statement))
    everything = _names_used(statement)
    at_once = set(_names_used(statement, with_bodies=False))
    for name in everything:
        if name in source.foreign:
            source.used_imports.add(source.foreign[name])
    for name in everything:
        if name in at_once:
            _collect_name(source, name, sources, order)
    order.append((source.name, statement))
    for name in everything:  # what bodies need may come later, and may need this statement
        _collect_name(source, name, sources, order)
    names = set(_names_defined(statement))
    for other in source.statements:  # `op.register_autograd(…)`, `@op.register_fake`
        if names & set(_names_completed(other)):
            _collect(source, other, sources, order)


def _collect_name(
    source: _Source, name: str, sources: dict[str, _Source], order: list[tuple[str, ast.stmt]]
) -> None:
    if name in source.ours:
        module, there = source.ours[name]
        other = _read(module, sources)
        _collect(other, other.defined[there], sources, order)
    elif name in source.defined:
        _collect(source, source.defined[name], sources, order)


def _names_completed(statement: ast.stmt) -> list[str]:
    """Return the names to which a statement adds something without defining them."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return _names_used(statement.value.func)
    if isinstance(statement, ast.FunctionDef):
        calls = [d.func if isinstance(d, ast.Call) else d for d in statement.decorator_list]
        return [n for call in calls if isinstance(call, ast.Attribute) for n in _names_used(call)]
    return []


def _names_used(node: ast.AST, with_bodies: bool = True) -> list[str]:
    """Return the names in a piece of code; without bodies, those needed when it is defined."""
    found: dict[str, None] = {}
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name):
            found[node.id] = None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and with_bodies:
            found[node.value] = None  # perhaps an annotation in quotes
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef) and not with_bodies:
            children = [child for child in children if child not in node.body]
        pending += reversed(children)
    return list(found)


def _names_defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _single_imports(statement: ast.ImportFrom | ast.Import) -> Iterator[tuple[str, _Import]]:
    for alias in statement.names:
        module = statement.module if isinstance(statement, ast.ImportFrom) else None
        yield alias.asname or alias.name.split(".")[0], (module, alias.name, alias.asname)


def _imports(used: set[_Import]) -> str:
    """Return import statements, standard library first, one for each module."""
    by_module: dict[str, list[str]] = {}
    for module, name, alias in used:
        text = f"{name} as {alias}" if alias else name
        by_module.setdefault(f"from {module} import" if module else f"import {text}", [])
        if module:
            by_module[f"from {module} import"].append(text)

    def rank(start: str) -> tuple[bool, str, str]:
        module = start.split()[1]
        return module.split(".")[0] not in sys.stdlib_module_names, start.split()[0][::-1], module

    groups: dict[bool, list[str]] = {False: [], True: []}
    for start in sorted(by_module, key=rank):
        line = f"{start} {', '.join(sorted(by_module[start]))}".strip()
        if len(line) > LINE_LENGTH:
            inner = "".join(f"    {name},\n" for name in sorted(by_module[start]))
            line = f"{start} (\n{inner})"
        groups[rank(start)[0]].append(line)
    return "\n\n".join("\n".join(lines) for lines in groups.values() if lines)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_left_out(statement: ast.stmt) -> bool:
    """Imports are gathered at the top, presets are of no use, documentation follows its subject."""
    if isinstance(statement, ast.Import | ast.ImportFrom) or _is_docstring(statement):
        return True
    return "PRESETS" in set(_names_defined(statement))
