"""Presets: counts as published, and to the digit those of the models that we and transformers build."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import check_weight_map

# name: billions in total, active with the embedding table, active without it (sums over the released shapes).
BILLIONS = {
    "mixtral-8x7b": (46.703, 12.880, 12.749),
    "mixtral-8x22b": (140.621, 39.152, 38.955),
    "qwen3-30b-a3b": (30.532, 3.353, 3.042),
    "qwen3-235b-a22b": (235.094, 22.191, 21.568),
    "qwen3-coder-480b-a35b": (480.155, 35.475, 34.541),
    "llama-2-70b": (68.977, 68.977, 68.715),
    "smollm2-135m": (0.135, 0.135, 0.135),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_counts_are_the_published_ones(name: str) -> None:
    config = families.find_preset(name)
    counts = (config.total, config.active_all, config.active_gemm)
    assert tuple(round(count / 1e9, 3) for count in counts) == BILLIONS[name]


@pytest.mark.parametrize("name", families.presets())
def test_counts_are_the_built_models(name: str) -> None:
    config = families.find_preset(name)
    with torch.device("meta"):
        described = families.to_hf(config)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described))
    ours = Decoder(config, device="meta")
    assert config.total == sum(parameter.numel() for parameter in ours.parameters()) == theirs.num_parameters()


@pytest.mark.parametrize("name", families.presets())
def test_a_preset_names_licence_and_source_and_reads_back(name: str) -> None:
    preset, config = families.presets()[name], families.find_preset(name)
    own = families.family(config.family)
    assert preset.licence and preset.source
    assert families.from_hf(families.to_hf(config)) == config
    check_weight_map(config.tensors(), own.weight_map(config))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'mixtral-8x8b'; did you mean 'mixtral-8x7b'"):
        families.find_preset("mixtral-8x8b")
