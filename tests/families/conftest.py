"""One tiny model for every corner of every family, made by transformers with weights that are far from degenerate."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

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


@pytest.fixture(scope="session", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    transformers.utils.logging.disable_progress_bar()
    family = request.param.partition("/")[0]
    model = tiny_model(family, CASES[request.param])
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    return Oracle(model, folder)


@pytest.fixture(scope="session")
def families_in_cases() -> set[str]:
    return {name.partition("/")[0] for name in CASES}
