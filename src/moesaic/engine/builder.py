"""What lowerings write a program with: buffers, weights as the program takes them, and the steps that parts share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.config import LongRopeConfig, ModelConfig, NormConfig, RopeConfig
from moesaic.engine.packing import Packer
from moesaic.kernels.backend import compiled
from moesaic.kernels.blocks import PackedMatrices
from moesaic.kernels.rounding import Bits
from moesaic.layers.rope import rotation

_native = compiled()


class Place(NamedTuple):
    """A buffer, and where in each of its rows something begins."""

    buffer: int
    offset: int = 0

    def after(self, size: int) -> "Place":
        return Place(self.buffer, self.offset + size)


class Label(NamedTuple):
    """What a step is a part of (attention, router, experts, ...), and in which layer; -1: in none."""

    part: str
    layer: int = -1


class CacheShape(NamedTuple):
    """What a layer keeps of a token: `groups` keys and values. shared: a value is the beginning of its key.

    taken: rows of one section that another takes as they are; they are never kept in 8 bits.
    """

    groups: int
    key_dim: int
    value_dim: int
    shared: bool
    taken: bool = False


class Builder:
    """A program as it is written.

    residual: the rows that layers add to. normed: what a part of a layer reads. max_length: the most tokens of a text.
    """

    def __init__(self, packer: Packer, threads: int, max_length: int) -> None:
        self.native: Any = _native.Program(threads)
        self.packer, self.max_length = packer, max_length
        self.config: ModelConfig = packer.weights.config
        self.caches: list[CacheShape] = []
        self._buffers: dict[str, int] = {}
        self._rotations: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}
        self.residual = self.buffer("residual", self.config.hidden_size)
        self.normed = self.buffer("normed", self.config.hidden_size)

    def buffer(self, name: str, width: int) -> Place:
        """Rows that the steps of one part share, and other layers after them; as wide as the widest who asks."""
        if name not in self._buffers:
            self._buffers[name] = self.native.buffer(width)
        self.native.widen(self._buffers[name], width)
        return Place(self._buffers[name])

    def floats(self, name: str) -> Tensor:
        """A small tensor in fp32: norms, biases, sinks."""
        return self.packer.weights.read(name).float().contiguous()

    def norm(
        self,
        label: Label,
        config: NormConfig,
        name: str | None,
        source: Place,
        target: Place,
        size: int,
        count: int = 1,
    ) -> None:
        """`count` vectors of `size`, each normalised for itself. name: of the module with the weight; None: none."""
        weight = None if name is None else self.floats(f"{name}.weight")
        bias = self.floats(f"{name}.bias") if config.bias else None
        self.native.norm(label, source, target, count, size, weight, bias, config.eps, config.kind == "layer")

    def linear(
        self,
        label: Label,
        names: Sequence[str],
        source: Place,
        target: Place,
        *,
        bias: bool = False,
        adding: float | None = None,
    ) -> None:
        """What modules of these names make of a source, side by side. adding: a multiplier; the target is added to."""
        packed = self.packer.matrix([f"{name}.weight" for name in names], self.packer.precision.bits, label.part)
        biases = torch.cat([self.floats(f"{name}.bias") for name in names]) if bias else None
        self.native.linear(label, source, target, native_packed(packed), biases, adding)

    def per_head(
        self,
        label: Label,
        name: str,
        read: Callable[[], Tensor],
        source: Place,
        stride: int,
        target: Place,
        step: int,
    ) -> None:
        """Each head's own matrix [H, O, I] times what begins every `stride` floats, written every `step` floats."""
        bits: Bits | None = None if self.packer.precision.bits is None else 8
        packed = self.packer.tensor(name, read, bits, label.part)
        self.native.per_head(label, source, stride, target, step, native_packed(packed))

    def rotate(self, label: Label, rope: RopeConfig, place: Place, *, heads: int, stride: int, size: int) -> None:
        """Turn heads, `stride` apart, of `size` dimensions by their positions."""
        cos, sin = self._rotation(rope, size)
        self.native.rotate(label, place, heads, stride, cos, sin, rope.layout == "interleaved")

    def _rotation(self, rope: RopeConfig, size: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, half of what turns]."""
        if (rope, size) not in self._rotations:
            positions_1N = torch.arange(self.max_length)[None]
            turn = rotation(rope, size, positions_1N, torch.float32)
            half = turn.cos.shape[-1] // 2
            self._rotations[rope, size] = (
                turn.cos[0, :, 0, :half].contiguous(),
                turn.sin[0, :, 0, :half].contiguous(),
            )
        return self._rotations[rope, size]


def native_packed(packed: PackedMatrices) -> Any:
    """As native steps take packed matrices; they share the memory."""
    shape = packed.shape
    return _native.Packed(packed.data, shape.format, shape.outputs, shape.inputs, shape.group, shape.paired)


def longest(config: ModelConfig) -> int:
    """The most tokens of a text that a program can hold.

    With LongRoPE those of its short factors: what a cache holds was turned by these.
    """
    ropes = [getattr(layer.attention, "rope", None) for layer in config.every_layer]
    scalings = [rope.scaling for rope in ropes if rope is not None]
    limits = [scaling.original_length for scaling in scalings if isinstance(scaling, LongRopeConfig)]
    return min([config.context_length, *limits])
