"""One tiny model for every corner of every family, with weights that are far from degenerate.

Made by transformers, but for our own family, which transformers has no model of.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic import families
from moesaic.hub import save
from moesaic.models.decoder import Decoder

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}

# family/what is special -> fields. Sizes are unequal and odd: a transposition cannot hide.
CASES: dict[str, dict[str, Any]] = {
    "llama/tied": {"head_dim": 10, "tie_word_embeddings": True},
    "llama/biases": {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True, "rope_theta": 5e5},
    "llama/all heads": {"num_key_value_heads": 6, "rms_norm_eps": 1e-3},
    "mixtral/top 2 of 5": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10},
    "mixtral/window, tied": {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 3,
        "sliding_window": 4,
        "tie_word_embeddings": True,
    },
    "mixtral/top 1": {"num_local_experts": 5, "num_experts_per_tok": 1, "num_key_value_heads": 6, "rope_theta": 1e4},
    "qwen3/tied": {"head_dim": 10, "tie_word_embeddings": True},
    "qwen3/window, biases": {
        "head_dim": 14,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen3_moe/not renormalised, a dense layer": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11,
        "mlp_only_layers": [1],
        "head_dim": 10,
        "num_key_value_heads": 3,
    },
    "qwen3_moe/every second, window, biases, tied": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 14,
        "rope_theta": 1e6,
    },
    "qwen3_moe/top 1, heads as wide as hidden": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 9,
        "norm_topk_prob": True,
        "num_key_value_heads": 6,
    },
}

OUR_CASES: dict[str, dict[str, Any]] = {
    "moesaic/hash first, groups, shared, a dense layer": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11,
        "shared_intermediate_size": 7,
        "head_dim": 10,
        "router": {
            "name": "sigmoid_topk",
            "selection_bias": True,
            "groups": {"num_groups": 3, "top_groups": 2},
            "scaling_factor": 2.5,
            "jitter": 0.01,
        },
        "capacity": {"factor": 1.25, "drop": "probability", "overflow": "shared"},
        "expert_dropout": 0.1,
        "overrides": [
            {"layers": [0], "router": {"name": "hash", "table": "random", "weight": "sqrt_softplus"}, "capacity": None},
            {"layers": [2], "num_experts": 0, "sliding_window": 5, "attention_bias": True, "rope_theta": 5e5},
        ],
    },
    "moesaic/every router with tensors of its own, tied": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 13,
        "head_dim": 14,
        "qk_norm": False,
        "tie_word_embeddings": True,
        "router": {"name": "noisy_topk", "noise_epsilon": 0.02},
        "overrides": [
            {"layers": [1], "router": {"name": "relu", "start": 1e-3}, "num_experts": 7},
            {"layers": [2], "router": {"name": "null_topk", "num_null_experts": 2, "batch_norm": True}},
        ],
    },
}


class Oracle(NamedTuple):
    """A transformers model and the folder that transformers saved it to."""

    model: Any
    folder: Path


def tiny_model(family: str, fields: dict[str, Any]) -> Any:
    """A transformers model with weights of std 0.2 and norms around 1."""
    config = AutoConfig.for_model(family, **COMMON | fields)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1.0)
    return model


def our_folder(fields: dict[str, Any], folder: Path) -> None:
    """A tiny model that only we have, saved by us."""
    model = Decoder(families.from_hf({"model_type": "moesaic", **COMMON, **fields}), dtype=torch.float32).initialize(7)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2, generator=generator)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator) / 10)
    save(model, folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Cases by name, each made once; our own have no model of theirs."""
    transformers.utils.logging.disable_progress_bar()

    @cache
    def make(case: str) -> Oracle:
        family = case.partition("/")[0]
        folder = tmp_path_factory.mktemp(family)
        if case in OUR_CASES:
            our_folder(OUR_CASES[case], folder)
            return Oracle(None, folder)
        model = tiny_model(family, CASES[case])
        model.save_pretrained(folder)
        return Oracle(model, folder)

    return make


@pytest.fixture(params=CASES)
def oracle(request: pytest.FixtureRequest, made: Callable[[str], Oracle]) -> Oracle:
    return made(request.param)


@pytest.fixture(params=[*CASES, *OUR_CASES])
def folder(request: pytest.FixtureRequest, made: Callable[[str], Oracle]) -> Path:
    """A saved model of any family, ours too."""
    return made(request.param).folder


@pytest.fixture(scope="session")
def families_in_cases() -> set[str]:
    return {name.partition("/")[0] for name in CASES | OUR_CASES}
