"""Which kernels serve, and what is said when the compiled ones are missing."""

import sys

import pytest

from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.kernels import backend


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moesaic._native", None)
    monkeypatch.delitem(sys.modules, "moesaic.kernels.native", raising=False)


def test_the_reference_can_be_forced() -> None:
    choice = backend.choose("reference")
    assert choice.name == "reference" and choice.kernels.__name__ == "moesaic.kernels.reference"


def test_missing_kernels_are_one_line_and_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_native(monkeypatch)
    assert backend.choose(None).name == "reference"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "were not built" in said and "Install a C++ compiler" in said and "times as long" in said


def test_forced_native_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    with pytest.raises(MissingDependencyError, match="compiled kernels are missing"):
        backend.choose("native")


def test_an_unknown_choice_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="use native or reference"):
        backend.choose("fast")


def test_describe_names_the_choice() -> None:
    assert backend.describe().startswith(("native (", "reference ("))
