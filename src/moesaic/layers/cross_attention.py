"""Attention to what an encoder made of a source.

B batch, S new tokens, M source tokens, H heads, A head dim, D hidden.
"""

from torch import Tensor

from moesaic.config import AttentionConfig
from moesaic.kernels.attention import attention
from moesaic.layers.attention import Attention, Sight
from moesaic.layers.kv_cache import LayerState


class CrossAttention(Attention):
    """Queries of the target, keys and values of the source's memory (Vaswani et al., arXiv:1706.03762, sec. 3.2.3).

    layer: its number, by which the memory keeps its keys and values.
    """

    def __init__(self, config: AttentionConfig, hidden_size: int, layer: int) -> None:
        super().__init__(config, hidden_size, layer)

    def forward(self, x_BSD: Tensor, sight: Sight, state: LayerState | None = None) -> Tensor:
        """out_BSD. Keys and values are made once for a memory that keeps them; `state` is not for these."""
        memory = sight.memory
        assert memory is not None, "cross attention without a memory to look at"
        q = self._queries(x_BSD).transpose(1, 2)
        k, v = memory.keys_and_values(self.layer, self._keys_and_values)
        visible = None if memory.valid_BM is None else memory.valid_BM[:, None, None]
        out_BHSA = attention(
            q, k.transpose(1, 2), v.transpose(1, 2), visible=visible, scale=self.config.scale, sinks_H=self.sinks
        )
        return self.o_proj(out_BHSA.transpose(1, 2).flatten(2))
