"""The modules of benchmarks/, which are no package: they import each other as programs do."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace


@contextmanager
def imported(names: Sequence[str]) -> Iterator[SimpleNamespace]:
    """The modules by their names, forgotten again afterwards."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
