"""Models that are counted and planned from their configurations, and do not run yet: most are hybrids.

Each architecture is a function from a config.json to a description of the same kind as that of families that run.
"""

from collections.abc import Callable
from typing import Any

from moesaic.config import OutlinedModel
from moesaic.families import _further, _hybrids, _usual
from moesaic.families._common import HfFields, Preset
from moesaic.families._multimodal import TEXT, has_text_part, text_part
from moesaic.registry import unknown_name

NOT_YET = "counted and planned from its configuration only: some of its layers do not run yet"

ARCHITECTURES: dict[str, Callable[[HfFields], OutlinedModel]] = {
    "qwen3_next": _hybrids.qwen3_next,
    "qwen3_5_moe_text": _hybrids.qwen3_next,
    "jamba": _hybrids.jamba,
    "granitemoehybrid": _hybrids.granitemoehybrid,
    "nemotron_h": _hybrids.nemotron_h,
    "kimi_linear": _hybrids.kimi_linear,
    "minimax": _hybrids.minimax,
    "minimax_text_01": _hybrids.minimax,
    "mimo_v2_flash": _further.mimo_v2_flash,
    "flex_olmo": _further.flex_olmo,
    "longcat_flash": _further.longcat_flash,
    "gemma4_text": _further.gemma4_text,
    **dict.fromkeys(_usual.KNOWN, _usual.usual),
}


def count(raw: dict[str, Any]) -> OutlinedModel:
    """A model from its config.json. Raises ConfigError for an architecture that is not known here."""
    raw = text_part(raw) if has_text_part(raw) else raw
    family = raw.get("model_type", "")
    if family not in ARCHITECTURES:
        raise unknown_name("model_type", family, list(ARCHITECTURES))
    return ARCHITECTURES[family](HfFields(raw))


def knows(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of an architecture that is not run."""
    name = (raw[TEXT] if has_text_part(raw) else raw).get("model_type")
    return isinstance(name, str) and name in ARCHITECTURES


def _granite(num_layers: int, **sizes: int) -> dict[str, Any]:
    attends = (5, 15, 25, 35)
    kinds = ["attention" if index in attends else "mamba" for index in range(num_layers)]
    common = {"model_type": "granitemoehybrid", "vocab_size": 100352, "tie_word_embeddings": True, "layer_types": kinds}
    return common | {"mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1} | sizes


def _qwen(model_type: str, **sizes: int) -> dict[str, Any]:
    attention = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
    experts = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
    common = {"model_type": model_type, "hidden_size": 2048, "max_position_embeddings": 262_144}
    return {**common, **attention, **experts, **sizes}


PRESETS = {
    "qwen3-next-80b-a3b": Preset(
        _qwen("qwen3_next", num_hidden_layers=48, num_experts=512, num_experts_per_tok=10, vocab_size=151936),
        licence="Apache-2.0",
        source="Qwen/Qwen3-Next-80B-A3B-Instruct",
    ),
    "qwen3.5-35b-a3b": Preset(
        _qwen("qwen3_5_moe_text", num_hidden_layers=40, num_experts=256, num_experts_per_tok=8, vocab_size=248320),
        licence="Apache-2.0",
        source="Qwen/Qwen3.5-35B-A3B; its text part",
    ),
    "jamba-v0.1": Preset(
        {
            "model_type": "jamba",
            "vocab_size": 65536,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        licence="Apache-2.0",
        source="ai21labs/Jamba-v0.1; arXiv:2403.19887",
    ),
    "granite-4.0-h-small": Preset(
        _granite(
            40, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_local_experts=72,
            num_experts_per_tok=10, intermediate_size=768, shared_intermediate_size=1536, mamba_n_heads=128,
        ),
        licence="Apache-2.0",
        source="ibm-granite/granite-4.0-h-small",
        is_verified=False,
    ),
    "granite-4.0-h-tiny": Preset(
        _granite(
            40, hidden_size=1536, num_attention_heads=12, num_key_value_heads=4, num_local_experts=64,
            num_experts_per_tok=6, intermediate_size=512, shared_intermediate_size=1024, mamba_n_heads=48,
        ),
        licence="Apache-2.0",
        source="ibm-granite/granite-4.0-h-tiny",
        is_verified=False,
    ),
    "nemotron-3-nano-30b-a3b": Preset(
        {
            "model_type": "nemotron_h",
            "vocab_size": 131072,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 3712,
        },
        licence="NVIDIA Open Model License",
        source="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    ),
    "nemotron-3-super-120b-a12b": Preset(
        {
            "model_type": "nemotron_h",
            "vocab_size": 131072,
            "hidden_size": 4096,
            "hybrid_override_pattern": (
                "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
            ),
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "n_routed_experts": 512,
            "num_experts_per_tok": 22,
            "moe_intermediate_size": 2688,
            "moe_latent_size": 1024,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 5376,
        },
        licence="NVIDIA Open Model License",
        source="nvidia/NVIDIA-Nemotron-3-Super-120B-A12B",
    ),
}  # fmt: skip
