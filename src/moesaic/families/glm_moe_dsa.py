"""GLM-5, 5.1 and 5.2: latent attention to the tokens that an indexer chooses, in some layers an earlier one's."""

from dataclasses import replace
from typing import Any

from moesaic.config import MlaConfig, ModelConfig, NormConfig
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields, Preset
from moesaic.families._deepseek import (
    INDEXER_NAMES,
    deepseek_weight_map,
    index_fields,
    mla_fields,
    read_indexer,
    read_mla,
    read_sigmoid_moe,
    read_stack,
    require_known,
    stack_fields,
)
from moesaic.models.weight_map import WeightMap

NAME = "glm_moe_dsa"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` glm_moe_dsa. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    require_known(hf, "rope_interleave", True)
    require_known(hf, "indexer_rope_interleave", True)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5))
    return read_stack(hf, _attentions(hf), read_sigmoid_moe(hf), norm=norm, predicts=True)


def _attentions(hf: HfFields) -> list[MlaConfig]:
    """Each layer's, with an indexer or with what the last one before it chose."""
    attention, indexer = read_mla(hf), read_indexer(hf, "interleaved")
    found, last = [], 0
    for index, kind in enumerate(_kinds(hf)):
        last = index if kind == "full" else last
        found.append(replace(attention, indexer=indexer if kind == "full" else last))
    return found


def _kinds(hf: HfFields) -> list[str]:
    """ "full" or "shared" of each layer: as listed, as a pattern of F and S, or one in so many after the first ones."""
    num_layers = hf.size("num_hidden_layers")
    kinds: Any = hf.get("indexer_types", "index_topk_pattern")
    if isinstance(kinds, str):
        kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in kinds]
    if kinds is None:
        every, offset = hf.size("index_topk_freq", default=1), hf.size("index_skip_topk_offset", default=2)
        kinds = ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(num_layers)]
    known = isinstance(kinds, list) and len(kinds) == num_layers and set(kinds) <= {"full", "shared"}
    if not known or kinds[0] != "full":
        raise ConfigError(
            f'indexer_types={kinds!r} is not supported; known: "full" or "shared" for each of {num_layers} layers, '
            "the first one full"
        )
    return kinds


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    fields = mla_fields(config, "GlmMoeDsaForCausalLM") | stack_fields(config) | index_fields(config)
    shared = [
        isinstance(layer.attention, MlaConfig) and isinstance(layer.attention.indexer, int) for layer in config.layers
    ]
    return fields | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "indexer_rope_interleave": True,
        "indexer_types": ["shared" if each else "full" for each in shared],
        "num_nextn_predict_layers": len(config.mtp),
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in GLM-5's files."""
    return deepseek_weight_map(config, INDEXER_NAMES)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 154880,
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
}
_SHORT = _COMMON | {"rope_theta": 1e6, "max_position_embeddings": 202752}

PRESETS = {
    "glm-5": Preset(_SHORT, licence="MIT", source="zai-org/GLM-5"),
    "glm-5.1": Preset(_SHORT, licence="MIT", source="zai-org/GLM-5.1"),
    "glm-5.2": Preset(
        _COMMON
        | {
            "rope_theta": 8e6,
            "max_position_embeddings": 1048576,
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
        },
        licence="MIT",
        source="zai-org/GLM-5.2",
    ),
}
