"""What a program cannot run, said in one way."""

from typing import NoReturn

from moesaic.errors import ConfigError


def refuse(what: str) -> NoReturn:
    """Raise ConfigError: `what`, and what runs it."""
    raise ConfigError(f"{what}, which the engine does not run; moesaic.load and moesaic.generate do")
