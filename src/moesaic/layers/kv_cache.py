"""The contract between attention and what is kept of the past, and its plainest keeper: one tensor a layer.

B batch, G key/value heads, N slots, A head dim. A slot is a place in the sequence, padding included; all sequences of
a batch are written in step, and `valid_BN` says which slots hold a token.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.config import AttentionConfig, ModelConfig, StateSpec
from moesaic.errors import GenerationError


class Past(NamedTuple):
    """Keys and values [B, G, N, A] that a query may look at; the first of them stands in slot `first_slot`."""

    keys: Tensor
    values: Tensor
    first_slot: int


class LayerState(Protocol):
    """What attention writes to: it appends the new tokens' keys and values and gets back all it may look at."""

    def append(self, keys_BGSA: Tensor, values_BGSA: Tensor) -> Past: ...


class FullState:
    """Keeps every token, in tensors reserved for `max_length` slots."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys_BGSA: Tensor, values_BGSA: Tensor) -> Past:
        end = self.length + keys_BGSA.shape[2]
        self.keys[:, :, self.length : end] = keys_BGSA
        self.values[:, :, self.length : end] = values_BGSA
        self.length = end
        return Past(self.keys[:, :, :end], self.values[:, :, :end], 0)

    def rollback(self, length: int) -> None:
        self.length = length


class WindowState:
    """Keeps the last `window` tokens."""

    def __init__(self, shape: tuple[int, int, int, int], window: int, dtype: torch.dtype, device: torch.device | str):
        batch, heads, _, head_dim = shape
        self.window = window
        self.keys = torch.empty(batch, heads, 0, head_dim, dtype=dtype, device=device)
        self.values = self.keys
        self.length = 0

    def append(self, keys_BGSA: Tensor, values_BGSA: Tensor) -> Past:
        keys = torch.cat([self.keys, keys_BGSA], dim=2)
        values = torch.cat([self.values, values_BGSA], dim=2)
        self.length += keys_BGSA.shape[2]
        self.keys, self.values = keys[:, :, -self.window :], values[:, :, -self.window :]
        return Past(keys, values, self.length - keys.shape[2])


class KeyValueCache:
    """What every layer of a model keeps of a batch of sequences.

    Raises GenerationError when more than `max_length` slots are written.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_length = max_length
        self.length = 0
        self.valid_BN = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.states = [
            _layer_state(layer.attention, spec, batch_size, max_length, dtype, device)
            for layer, spec in zip(config.layers, config.states(), strict=True)
        ]

    def begin(self, mask_BS: Tensor) -> Tensor:
        """Reserve the next S slots, of which `mask_BS` hold tokens; returns the new tokens' positions [B, S]."""
        end = self.length + mask_BS.shape[1]
        if end > self.max_length:
            raise GenerationError(
                f"{end} tokens do not fit a cache of {self.max_length}; shorten the prompt or ask for fewer new tokens"
            )
        self.valid_BN[:, self.length : end] = mask_BS
        seen_B1 = self.valid_BN[:, : self.length].sum(1, keepdim=True)
        self.length = end
        return (seen_B1 + mask_BS.long().cumsum(1) - 1).clamp(min=0)

    def rollback(self, length: int) -> None:
        """Forget all slots from `length` on. Raises GenerationError when a layer cannot: a window has forgotten."""
        states = [state for state in self.states if isinstance(state, FullState)]
        if len(states) < len(self.states):
            raise GenerationError("a cache with windowed layers cannot be rolled back; start a new one")
        for state in states:
            state.rollback(length)
        self.length = length
        self.valid_BN[:, length:] = False


def _layer_state(
    attention: AttentionConfig,
    spec: StateSpec,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> FullState | WindowState:
    shape = (batch_size, attention.num_key_value_heads, max_length, attention.head_dim)
    if spec.window is None:
        return FullState(shape, dtype, device)
    return WindowState(shape, spec.window, dtype, device)
