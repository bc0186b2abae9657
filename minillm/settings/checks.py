"""Checks of settings, each with the flag it is about."""

import importlib.util
import re

from minillm.errors import ConfigError, SetupError


def check_positive(config: object, *names: str) -> None:
    """Raise ConfigError unless each named field is > 0."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:  # a NaN too
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"`{flag}` must be positive, got {value}",
                hint=f"leave `{flag}` out for its default, or give a value above 0",
            )


def check_range(config: object, name: str, low: float, high: float) -> None:
    """Raise ConfigError unless `low <= field <= high`."""
    value = getattr(config, name)
    if not low <= value <= high:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(
            f"`{flag}` must lie between {low} and {high}, got {value}",
            hint=f"try `{flag} {low if value < low else high}`",
        )


def check_not_negative(config: object, *names: str) -> None:
    """Raise ConfigError unless each named field is 0 or more."""
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"`{flag}` must not be negative, got {value}",
                hint=f"leave `{flag}` out for its default, or give 0 or more",
            )


def check_package(flag: str, name: str) -> None:
    """Raise SetupError unless the package that `flag` asks for is installed; import nothing."""
    if importlib.util.find_spec(name) is None:
        raise SetupError(
            f"`{flag} {name}`: the package `{name}` is not installed",
            hint=f"run `pip install {name}`, or leave `{flag}` out",
        )


def duration_s(text: str) -> float:
    """Return the seconds that `4h`, `1h30m`, `90s` or a bare number of seconds stand for.

    >>> duration_s("1h30m"), duration_s("")
    (5400.0, 0.0)

    Raises:
        ConfigError: `text` is not a duration.
    """
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if found is None:
        raise ConfigError(
            f"`{text}` is not a duration", hint="write hours, minutes and seconds: `4h`, `1h30m`"
        )
    units = (86_400, 3_600, 60, 1)
    return sum(float(n or 0) * unit for n, unit in zip(found.groups(), units, strict=True))
