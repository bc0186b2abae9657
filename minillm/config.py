"""Run configuration: frozen dataclasses to and from TOML. Knows neither Typer nor torch.

The dataclasses themselves, one tree per command, are in `minillm.settings`.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tomli_w
from annotated_doc import Doc

from minillm.errors import ConfigError, InputError
from minillm.files import write_text


@dataclass(frozen=True, slots=True)
class Knob:
    """One leaf of a config tree: `name` is also the flag, `section` the TOML table."""

    section: str
    name: str
    type: Any
    default: Any
    help: str

    @property
    def path(self) -> str:
        """Dotted TOML path, e.g. `optim.lr`."""
        return f"{self.section}.{self.name}" if self.section else self.name


def knobs(cls: type, section: str = "", base: Any = None) -> Iterator[Knob]:
    """Yield the leaf fields of a config class in declaration order.

    Args:
        cls: A config dataclass.
        section: TOML table the leaves stand in.
        base: An instance whose values are the defaults, where a parent sets its own.
    """
    hints = get_type_hints(cls, include_extras=True)
    for item in dataclasses.fields(cls):
        hint: Any = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from knobs(hint, item.name, _default(item, base))  # type: ignore[arg-type]
            continue
        doc = next((m.documentation for m in get_args(hint) if isinstance(m, Doc)), "")
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        yield Knob(section, item.name, bare, _default(item, base), doc)


def _default(item: "dataclasses.Field[Any]", base: Any) -> Any:
    if base is not None:
        return getattr(base, item.name)
    return item.default if item.default_factory is MISSING else item.default_factory()


def build(cls: type, values: Mapping[str, Any], base: Any = None) -> Any:
    """Make a config tree from flat values; fields left out keep their defaults."""
    hints = get_type_hints(cls)
    kwargs = {}
    for item in dataclasses.fields(cls):
        default = _default(item, base)
        if dataclasses.is_dataclass(hints[item.name]):
            kwargs[item.name] = build(hints[item.name], values, default)
        elif item.name in values:
            value = values[item.name]
            kwargs[item.name] = tuple(value) if isinstance(value, list) else value
        elif default is not MISSING:
            kwargs[item.name] = default
    return cls(**kwargs)


def read_toml(cls: type, path: Path) -> dict[str, Any]:
    """Read a run file into flat values.

    Raises:
        InputError: The file is missing or is not TOML.
        ConfigError: It sets a key that `cls` does not have; the hint names the nearest one.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no config file at `{path}`") from None
    except OSError as err:
        raise InputError(f"cannot read `{path}`: {err.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise InputError(f"`{path}` is not valid TOML: {err}") from None

    tree.pop("provenance", None)  # written by us, never read back
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": leaf for name, leaf in value.items()}
        else:
            found[key] = value

    names = {knob.path: knob.name for knob in knobs(cls)}
    for dotted in found:
        if dotted not in names:
            near = difflib.get_close_matches(dotted, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"remove `{dotted}` from `{path}`"
            raise ConfigError(f"`{path}` sets unknown key `{dotted}`", hint=hint)
    return {names[dotted]: value for dotted, value in found.items()}


def write_toml(config: Any, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a resolved config, so that `--config PATH` repeats the run."""
    write_text(path, tomli_w.dumps({**to_plain(config), "provenance": dict(provenance)}))


def to_plain(value: Any) -> Any:
    """Reduce to TOML and JSON types. `None` is left out, for TOML has no null."""
    if dataclasses.is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: to_plain(leaf) for name, leaf in pairs if leaf is not None}
    if isinstance(value, Path):
        return value.as_posix()
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
