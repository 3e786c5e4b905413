"""Chooses once between the compiled kernels and the plain ones, and says what it chose.

`MOESAIC_KERNELS` = native | reference forces the choice. Without it the compiled ones serve where they were built;
where not, one line on stderr says what is missing, how to get it and what it costs. Tensors on a GPU have kernels of
their own (cuda.py), unless the plain ones were asked for.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from moesaic.errors import ConfigError, MissingDependencyError

# Time of one token in a small MoE layer (hidden 256, 32 experts of 256, 4 chosen, fp32), plain kernels over compiled
# ones, as benchmarks/native_kernels.py measured it on 2 cores with AVX-512: 2.9 to 3.2.
_SLOWDOWN = 3

_MISSING = (
    "the compiled kernels are missing ({reason}). Install a C++ compiler (Debian, Ubuntu: apt install g++; "
    "macOS: xcode-select --install) and reinstall moesaic"
)


class Choice(NamedTuple):
    """The module that serves the operations, its name, and how it came to be chosen."""

    kernels: ModuleType
    name: str
    reason: str


def choose(wanted: str | None) -> Choice:
    """The kernels called `wanted`, or the best there are.

    Raises ConfigError for an unknown name, MissingDependencyError for "native" where it was not built.
    """
    if wanted not in (None, "", "native", "reference"):
        raise ConfigError(f"MOESAIC_KERNELS={wanted!r} is not known; use native or reference, or leave it unset")
    if wanted == "reference":
        return Choice(_module("reference"), "reference", "asked for by MOESAIC_KERNELS")
    try:
        return Choice(_module("native"), "native", "asked for by MOESAIC_KERNELS" if wanted else "the best there is")
    except ImportError as error:
        missing = _MISSING.format(reason=_why(error))
        if wanted == "native":
            raise MissingDependencyError(f"{missing}, or unset MOESAIC_KERNELS") from error
        print(
            f"moesaic: {missing}; until then MoE layers take about {_SLOWDOWN} times as long to decode", file=sys.stderr
        )
        return Choice(_module("reference"), "reference", _why(error))


def compiled() -> Any:
    """The extension with the compiled kernels. Raises MissingDependencyError where it was not built."""
    return choose("native").kernels._native


def describe() -> str:
    """What serves the operations: "native (amx, 2 threads; experts: fp32 native, bf16 native)"."""
    detail = _choice.kernels.describe() if _choice.name == "native" else _choice.reason
    return f"{_choice.name} ({detail})"


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"moesaic.kernels.{name}")


def _why(error: ImportError) -> str:
    return "they were not built" if error.name == "moesaic._native" else str(error)


def of(tensor: Tensor) -> ModuleType:
    """The kernels that compute with this tensor: those of the device where it is."""
    return _on_gpu if tensor.is_cuda else kernels


_choice = choose(os.environ.get("MOESAIC_KERNELS"))
kernels = _choice.kernels
name = _choice.name
_on_gpu = kernels if os.environ.get("MOESAIC_KERNELS") == "reference" else _module("cuda")
