"""DeepSeek-V3.2 (arXiv:2512.02556): DeepSeek-V3 whose queries attend to the tokens that an indexer chooses for them."""

from dataclasses import replace
from typing import Any

from moesaic.config import ModelConfig, NormConfig
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
    stack_fields,
)
from moesaic.families.deepseek_v3 import PRESETS as V3_PRESETS
from moesaic.models.weight_map import WeightMap

NAME = "deepseek_v32"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` deepseek_v32. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    # Heads of the attention pair neighbouring dimensions, those of the indexer halves.
    attention = replace(read_mla(hf), indexer=read_indexer(hf, "half"))
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    attentions = [attention] * hf.size("num_hidden_layers")
    return read_stack(hf, attentions, read_sigmoid_moe(hf), norm=norm, predicts=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    fields = mla_fields(config, "DeepseekV32ForCausalLM") | stack_fields(config) | index_fields(config)
    return fields | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": len(config.mtp),
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in DeepSeek-V3.2's files."""
    return deepseek_weight_map(config, INDEXER_NAMES)


PRESETS = {
    "deepseek-v3.2": Preset(
        V3_PRESETS["deepseek-v3"].config
        | {"model_type": NAME, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
        licence="MIT",
        source="deepseek-ai/DeepSeek-V3.2; arXiv:2512.02556",
    ),
}
