"""Presets: counts as published, and to the digit those of the models that we build and of transformers'."""

import dataclasses

import pytest

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import check_weight_map
from tests.families.golden import preset_counts

# name: billions in total, active with the embedding table, active without it (sums over the released shapes).
BILLIONS = {
    "mixtral-8x7b": (46.703, 12.880, 12.749),
    "mixtral-8x22b": (140.621, 39.152, 38.955),
    "qwen3-30b-a3b": (30.532, 3.353, 3.042),
    "qwen3-235b-a22b": (235.094, 22.191, 21.568),
    "qwen3-coder-480b-a35b": (480.155, 35.475, 34.541),
    "llama-2-70b": (68.977, 68.977, 68.715),
    "llama-3.1-8b": (8.030, 8.030, 7.505),
    "llama-3.1-70b": (70.554, 70.554, 69.503),
    "llama-3.1-405b": (405.853, 405.853, 403.752),
    "mistral-7b": (7.242, 7.242, 7.111),
    "mistral-nemo-12b": (12.248, 12.248, 11.577),
    "mistral-small-24b": (23.572, 23.572, 22.901),
    "qwen1.5-moe-a2.7b": (14.316, 2.689, 2.378),
    "qwen2-57b-a14b": (57.409, 14.249, 13.705),
    "olmoe-1b-7b": (6.919, 1.282, 1.179),
    "minimax-m2": (228.690, 11.031, 10.416),
    "minimax-m2.5": (228.690, 11.031, 10.416),
    "minimax-m2.7": (228.690, 11.031, 10.416),
    "ernie-4.5-21b-a3b": (21.825, 3.352, 3.352),
    "ernie-4.5-300b-a47b": (299.484, 47.927, 47.079),
    "dbrx": (131.597, 36.470, 35.853),
    "phi-3.5-moe": (41.873, 6.641, 6.510),
    "qwen2.5-0.5b": (0.494, 0.494, 0.494),
    "qwen2.5-1.5b": (1.544, 1.544, 1.544),
    "qwen2.5-7b": (7.616, 7.616, 7.071),
    "qwen2.5-14b": (14.770, 14.770, 13.991),
    "qwen2.5-32b": (32.764, 32.764, 31.985),
    "qwen2.5-72b": (72.706, 72.706, 71.460),
    "qwen3-0.6b": (0.596, 0.596, 0.596),
    "qwen3-8b": (8.191, 8.191, 7.568),
    "qwen3-14b": (14.768, 14.768, 13.990),
    "qwen3-32b": (32.762, 32.762, 31.984),
    "granite-3.0-1b-a400m": (1.335, 0.429, 0.429),
    "granite-3.0-3b-a800m": (3.299, 0.883, 0.883),
    "llama-4-scout": (107.770, 17.173, 16.138),
    "llama-4-maverick": (400.712, 17.185, 16.150),
    "gpt-oss-20b": (20.915, 4.187, 3.608),
    "gpt-oss-120b": (116.829, 5.712, 5.133),
    "deepseek-v2": (235.741, 21.376, 20.852),
    "deepseek-v2-lite": (15.706, 2.661, 2.451),
    "deepseek-v3": (671.026, 37.552, 36.626),
    "deepseek-r1": (671.026, 37.552, 36.626),
    "deepseek-v3.1": (671.026, 37.552, 36.626),
    "deepseek-v3.2": (671.878, 38.404, 37.477),
    "kimi-k2": (1026.408, 32.861, 31.687),
    "deepseek-v4-flash": (284.332, 13.800, 13.270),
    "deepseek-v4-pro": (1572.997, 49.779, 48.852),
    "glm-4.5": (352.798, 33.632, 32.856),
    "glm-4.6": (352.798, 33.632, 32.856),
    "glm-4.5-air": (106.852, 13.424, 12.803),
    "smollm2-135m": (0.135, 0.135, 0.135),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_counts_are_the_published_ones(name: str) -> None:
    config = families.find_preset(name)
    counts = (config.total, config.active_all, config.active_gemm)
    assert tuple(round(count / 1e9, 3) for count in counts) == BILLIONS[name]


DECODERS = [name for name in families.presets() if families.find_preset(name).encoder is None]


@pytest.mark.parametrize("name", DECODERS)
def test_counts_are_the_built_models(name: str) -> None:
    config = families.find_preset(name)
    built = sum(parameter.numel() for parameter in Decoder(config, device="meta").parameters())
    assert config.total == built - config.mtp_total == preset_counts()[name]


@pytest.mark.parametrize("name", families.presets())
def test_a_preset_names_licence_and_source_and_reads_back(name: str) -> None:
    preset, config = families.presets()[name], families.find_preset(name)
    own = families.family(config.family)
    assert preset.licence and preset.source
    assert families.from_hf(families.to_hf(config)) == config
    # The first layers are of every kind, and checking all of them would take long.
    short = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, layers=config.decoder.layers[:6]))
    if config.encoder is not None:  # one of each kind: a layer of 2048 experts is long enough
        stacks = {"encoder": config.encoder, "decoder": config.decoder}
        kinds = {each: tuple(dict.fromkeys(stack.layers)) for each, stack in stacks.items()}
        short = dataclasses.replace(
            config, **{each: dataclasses.replace(stacks[each], layers=kinds[each]) for each in stacks}
        )
    check_weight_map(short.tensors(), own.weight_map(short))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'mixtral-8x8b'; did you mean 'mixtral-8x7b'"):
        families.find_preset("mixtral-8x8b")
