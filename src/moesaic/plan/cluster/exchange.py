"""What decoding units send one another: every token straight to every expert that it chose.

Prefill and training send a token once to each node and pass it on there (`plan.network.all_to_all`), which saves
bytes; for the few tokens of a decode step every copy goes by itself, which saves a hop (DeepEP's low-latency kernels,
github.com/deepseek-ai/DeepEP).
"""

from moesaic.config import ModelConfig, MoeConfig
from moesaic.plan.formats import Formats
from moesaic.plan.network import Traffic


def direct(config: ModelConfig, formats: Formats, tokens: float, ranks: int, per_node: int) -> Traffic:
    """Dispatch and combine of all MoE layers for `tokens` of one rank; a rank keeps the rows of its own experts."""
    if ranks <= 1:
        return Traffic()
    dispatch = 1.0 + 4 / 128 if formats.of("experts").products in ("fp8", "fp4") else 2.0
    near = min(ranks, per_node)
    total = Traffic()
    for index in config.moe_layers:
        moe = config.layers[index].feed_forward
        assert isinstance(moe, MoeConfig), "moe_layers says so"
        size = tokens * moe.router.top_k * config.hidden_size * (dispatch + 2.0)
        total += Traffic(size * (near - 1) / ranks, size * (ranks - near) / ranks, 2.0)
    return total
