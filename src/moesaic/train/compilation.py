"""torch.compile, asked politely."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from moesaic.errors import MissingDependencyError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function as torch.compile makes it, at its first call. Python between its graphs stays Python.

    Raises MissingDependencyError where there is no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise MissingDependencyError(
            "train.compile=true needs a C++ compiler and none was found; install one (Debian, Ubuntu: apt install "
            "g++; macOS: xcode-select --install), name it in CXX, or leave train.compile out"
        ) from error
    return torch.compile(function)
