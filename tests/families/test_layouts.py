"""Experts one by one and stacked: every family that has both goes there and back, and transformers reads each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.hub import load, read_config
from moesaic.hub.layouts import fused
from moesaic.hub.streaming import convert
from tests.families.cases import CASES
from tests.families.decoder_oracle import loaded, their_logits, token_ids
from tests.families.same import assert_same, assert_same_bytes

FIRST = {name.partition("/")[0]: name for name in reversed(CASES)}
# Dense, or released with stacked experts, each in its own way.
ONE_LAYOUT = {"llama", "mistral", "qwen2", "qwen3", "dbrx", "gpt_oss", "granitemoe", "granitemoeshared", "llama4_text"}
BOTH = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "ernie4_5_moe", "glm4_moe", "glm_moe_dsa",
    "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FIRST)
def test_which_families_have_both(made: Callable[[str], Any], family: str) -> None:
    config = read_config(made(FIRST[family]).folder)
    has_both = bool(fused(families.family(family).weight_map(config)))
    assert has_both == (family in BOTH)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(BOTH))
def test_there_and_back(made: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    oracle = made(FIRST[family])
    convert(oracle.folder, tmp_path / "fused", layout="fused")
    config = read_config(oracle.folder)
    stacked = {piece.name for piece in fused(families.family(family).weight_map(config)).values()}
    assert len(stacked) == 2 * len(config.moe_layers) and stacked <= tensors_of(tmp_path / "fused").keys()
    assert not any(".experts.0." in name for name in tensors_of(tmp_path / "fused"))
    assert torch.equal(load(tmp_path / "fused")(token_ids()), oracle.ours(token_ids()))

    convert(tmp_path / "fused", tmp_path / "back", layout="per-expert")
    assert_same_bytes(tmp_path / "back", oracle.folder)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(BOTH))
def test_they_read_stacked_experts_too(made: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    oracle = made(FIRST[family])
    convert(oracle.folder, tmp_path / "fused", layout="fused")
    theirs = loaded(type(oracle.model), tmp_path / "fused", experts_implementation="eager")
    assert_same(their_logits(theirs, token_ids()), their_logits(oracle.model, token_ids()))


@pytest.mark.parametrize("family", sorted(ONE_LAYOUT))
def test_of_one_layout_it_is_kept(made: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    folder = made(FIRST[family]).folder
    convert(folder, tmp_path / "same")
    assert_same_bytes(tmp_path / "same", folder)
    for layout in ("fused", "per-expert"):
        with pytest.raises(ConfigError, match=f"{family} (files have one layout of|has no) experts.*out --layout"):
            convert(folder, tmp_path / "other", layout=layout)
