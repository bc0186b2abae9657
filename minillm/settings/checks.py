"""Checks of settings, each with the flag it is about."""

from minillm.errors import ConfigError


def check_positive(config: object, *names: str) -> None:
    """Raise ConfigError unless each named field is > 0."""
    for name in names:
        value = getattr(config, name)
        if value <= 0:
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
            f"`{flag}` must lie between {low} and {high}, got {value}", hint=f"try `{flag} {high}`"
        )
