"""The contract between attention and what is kept of the past, and its plainest keeper: one tensor a layer.

B batch, G key/value heads, N slots, A head dim. A slot is a place in the sequence, padding included; all sequences of
a batch are written in step, and `valid_BN` says which slots hold a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.config import (
    AbsentConfig,
    AttentionConfig,
    CompressedAttentionConfig,
    LayerConfig,
    LongRopeConfig,
    MlaConfig,
    ModelConfig,
    RecurrentConfig,
    StateSpec,
)
from moesaic.errors import GenerationError
from moesaic.layers.compressed_state import CompressedState


class Past(NamedTuple):
    """Keys and values [B, G, N, A] that a query may look at; the first of them stands in slot `first_slot`.

    Latent attention keeps its latents as keys [B, 1, N, Z]; its turned keys, index keys beside them, as values.
    """

    keys: Tensor
    values: Tensor
    first_slot: int


@dataclass(eq=False)
class Memory:
    """What an encoder made of a batch of sources, and what cross attention makes of that.

    states_BMD: the encoder's outputs. valid_BM: which of them are tokens; None when all are. kept: keys and values
    [B, M, G, A] by layer, for the tokens to come; None where there are none to come.
    """

    states_BMD: Tensor
    valid_BM: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None

    def keys_and_values(self, layer: int, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Those of a layer, made from the encoder's outputs unless they are kept."""
        if self.kept is None:
            return make(self.states_BMD)
        if layer not in self.kept:
            self.kept[layer] = make(self.states_BMD)
        return self.kept[layer]


class LayerState(Protocol):
    """What attention writes to: it appends the new tokens' keys and values and gets back all it may look at."""

    def append(self, keys_BGSA: Tensor, values_BGSA: Tensor) -> Past: ...


class FullState:
    """Keeps every token, in tensors reserved for as many slots as `shape` [B, G, N, A] has.

    value_dim: of the values, where they are not as wide as keys.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        value_dim: int | None = None,
    ) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty((*shape[:3], value_dim or shape[3]), dtype=dtype, device=device)
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

    def clear(self) -> None:
        self.keys, self.values, self.length = self.keys[:, :, :0], self.values[:, :, :0], 0


class KeyValueCache:
    """What every layer of a model keeps of a batch of sequences; `memory`: and of their sources, where they have such.

    layers: others than the model's own, such as those of `config.mtp`, which see other tokens at each step.
    Raises GenerationError when more than `max_length` slots are written, or more than it `takes`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layers: Sequence[LayerConfig] | None = None,
    ) -> None:
        self.max_length = max_length
        self.length = 0
        self.memory: Memory | None = None
        self.valid_BN = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        layers = config.decoder.layers if layers is None else layers
        self.states = [
            _layer_state(layer.attention, layer.attention.state(), batch_size, max_length, dtype, device)
            for layer in layers
        ]
        scalings = {rope.scaling for layer in layers if (rope := getattr(layer.attention, "rope", None)) is not None}
        self._turning_points = sorted({each.original_length for each in scalings if isinstance(each, LongRopeConfig)})

    def takes(self, num_tokens: int | Tensor) -> bool:
        """Whether so many more tokens (of each sequence, [B, 1] where they differ) can stand beside those kept.

        They cannot where they take a text past the length from which on LongRoPE turns its first tokens otherwise:
        then the whole text must be written anew, after `rollback(0)`.
        """
        if not self._turning_points:
            return True
        seen_B1 = self.valid_BN[:, : self.length].sum(1, keepdim=True)
        return not any(
            bool(((seen_B1 > 0) & (seen_B1 <= point) & (seen_B1 + num_tokens > point)).any())
            for point in self._turning_points
        )

    def begin(self, mask_BS: Tensor) -> Tensor:
        """Reserve the next S slots, of which `mask_BS` hold tokens; returns the new tokens' positions [B, S]."""
        end = self.length + mask_BS.shape[1]
        if end > self.max_length:
            raise GenerationError(
                f"{end} tokens do not fit a cache of {self.max_length}; shorten the prompt or ask for fewer new tokens"
            )
        if not self.takes(mask_BS.sum(1, keepdim=True)):
            raise GenerationError(
                f"a text grows past {self._turning_points[0]} tokens, and longer ones are turned otherwise from their "
                "first token on (LongRopeConfig); roll the cache back to 0 and write the whole text"
            )
        self.valid_BN[:, self.length : end] = mask_BS
        seen_B1 = self.valid_BN[:, : self.length].sum(1, keepdim=True)
        self.length = end
        return (seen_B1 + mask_BS.long().cumsum(1) - 1).clamp(min=0)

    def rollback(self, length: int) -> None:
        """Forget all slots from `length` on.

        Raises GenerationError when a layer cannot, other than to 0: a window has forgotten, or what stays was turned
        as part of a longer text (LongRoPE).
        """
        seen_B, kept_B = (self.valid_BN[:, :end].sum(1) for end in (self.length, length))
        if length and any(bool(((kept_B <= end) & (end < seen_B)).any()) for end in self._turning_points):
            raise GenerationError(
                f"a cache of texts longer than {self._turning_points[0]} tokens cannot be rolled back to that; "
                "start a new one"
            )
        if length and not all(isinstance(state, FullState) for state in self.states):
            raise GenerationError("a cache with windowed or compressed layers cannot be rolled back; start a new one")
        for state in self.states:
            if isinstance(state, FullState):
                state.rollback(length)
            else:
                state.clear()
        self.length = length
        self.valid_BN[:, length:] = False


def _layer_state(
    attention: AttentionConfig | MlaConfig | CompressedAttentionConfig | RecurrentConfig | AbsentConfig,
    spec: StateSpec,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> FullState | WindowState | CompressedState:
    assert not isinstance(attention, RecurrentConfig | AbsentConfig), "nothing builds what is only described"
    if isinstance(attention, CompressedAttentionConfig):
        return CompressedState(attention, batch_size, max_length, dtype, device)
    if isinstance(attention, MlaConfig):
        beside = spec.elements_per_token - attention.latent_rank
        return FullState((batch_size, 1, max_length, attention.latent_rank), dtype, device, beside)
    shape = (batch_size, attention.num_key_value_heads, max_length, attention.head_dim)
    if spec.window is None:
        return FullState(shape, dtype, device)
    return WindowState(shape, spec.window, dtype, device)
