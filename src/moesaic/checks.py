"""The checks that descriptions make of their own fields."""

from typing import Any

from moesaic.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(part: Any, *fields: str) -> None:
    """Raise ConfigError unless these fields of `part` are whole numbers above 0."""
    for field in fields:
        value = getattr(part, field)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{field}={value!r} in {type(part).__name__}; it must be a whole number above 0",
        )


def require_share(part: Any, *fields: str) -> None:
    """Raise ConfigError unless these fields of `part` are numbers from 0 to below 1."""
    for field in fields:
        value = getattr(part, field)
        require(
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
            f"{field}={value!r} in {type(part).__name__}; it must be at least 0 and below 1",
        )
