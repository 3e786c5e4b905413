"""A small model on small clusters, for the tests of this folder."""

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.plan.cluster.loads import expert_loads
from moesaic.plan.cluster.placed import place
from moesaic.plan.cluster.unit import Unit
from moesaic.plan.formats import named
from moesaic.plan.hardware import find_device

MODEL = families.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 4096,
    }
)


def unit(ranks: int = 4, redundant: int = 4, *, new: int = 1, config: ModelConfig = MODEL) -> Unit:
    """Some devices that serve it together."""
    placed = place(config, expert_loads(config), ranks=ranks, redundant=redundant)
    device = find_device("h100")
    return Unit(
        config=config, formats=named("bf16"), device=device, ranks=ranks, placed=placed, redundant=redundant, new=new
    )
