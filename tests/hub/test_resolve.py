"""From what a user types to a model."""

from pathlib import Path

import pytest

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError
from moesaic.hub import read_config


def test_a_folder_a_file_and_a_preset(folder: Path, config: ModelConfig) -> None:
    assert read_config(folder) == config
    assert read_config(str(folder / "config.json")) == config
    assert read_config("qwen3-30b-a3b") == families.find_preset("qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("mixtral-8x7", "no preset .nothing is downloaded.; nearest presets: mixtral-8x7b"),
        ("mistralai/Mixtral-8x7B-v0.1", "nearest presets: mixtral-8x7b"),
        ("jamba-v0.1", "'jamba-v0.1' is counted .* do not run yet; `moesaic count` and `plan` take it"),
        ("./zzzzzz", "no path on this machine and no preset .*; `moesaic count --all` lists the presets"),
    ],
)
def test_what_is_not_there_names_what_is_near(typed: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(typed)


def test_a_file_that_is_no_model(folder: Path) -> None:
    (folder / "generation_config.txt").touch()
    with pytest.raises(
        CheckpointError, match=r"is no model; give a folder with a config.json, a .gguf file or a preset"
    ):
        read_config(folder / "generation_config.txt")
