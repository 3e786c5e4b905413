"""Errors of the code that lint checks, told apart from lint's own."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesaic.errors import ConfigError, MoesaicError
from moesaic.train.lint.report import NotMeasured

_NOT_THEIRS = (str(Path(__file__).parents[2]), sysconfig.get_path("stdlib"), "<")
_PACKAGES = ("site-packages", "dist-packages")


@contextmanager
def their_own(what: str, *, is_needed: bool = True) -> Iterator[None]:
    """For a block that runs their code. Raises ConfigError where that fails; NotMeasured where it is not needed."""
    try:
        yield
    except (MoesaicError, NotMeasured):
        raise
    except (Exception, SystemExit) as error:
        said = f"{what} failed: {_in_words(error)}"
        if not is_needed:
            raise NotMeasured(said) from error
        raise ConfigError(f"{said}; it must run by itself before lint can look at it") from error


def _in_words(error: BaseException) -> str:
    """`ValueError: no such column (train.py, line 12)`: the last line that is neither ours nor a package's."""
    message = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not each.filename.startswith(_NOT_THEIRS) and not _is_package(each.filename)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{f': {message}' if message else ''}{place}"


def _is_package(filename: str) -> bool:
    return any(part in filename for part in _PACKAGES)
