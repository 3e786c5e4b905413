"""Tiny models of transformers with unequal sizes; multiples of 8, which grouped_mm wants."""

from typing import Any

import torch
import transformers
from torch import nn

COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 40, "num_local_experts": 6}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 16, "num_experts": 6, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"intermediate_size": 16, "num_experts": 6, "num_attention_heads": 3, "num_key_value_heads": 3}),
    # Experts without a gate; clamped gates and another activation are made where they are tested.
    "nemotron_h": (
        "NemotronH",
        {"layers_block_type": ["attention", "moe", "moe"], "moe_intermediate_size": 16, "n_routed_experts": 6},
    ),
    "gpt_oss": ("GptOss", {"intermediate_size": 16, "num_local_experts": 6}),
}


def tiny_model(kind: str = "mixtral", *, seed: int = 0, **fields: Any) -> Any:
    """A model with weights large enough for every part to matter."""
    name, own = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **own, **fields})
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
    return model.eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length], none of them special."""
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
