"""Puts packed weights in the place of a model's own, from outside: the model's code knows nothing of it.

E experts, O outputs, I inputs, D hidden, F expert inner.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts.grouped import GroupedExperts
from moesaic.experts.packed import PackedExperts, PackedLinear
from moesaic.kernels.blocks import PackedMatrices, pack_ints
from moesaic.kernels.rounding import BITS, GROUP, Bits, dequantized, round_to_ints
from moesaic.models.base import LanguageModel

HEAD_BITS: Bits = 8


class PackedTensor(NamedTuple):
    """What became of one tensor. bits_per_weight: scales and padding included; error: |w - q| over |w| (2-norms)."""

    name: str
    numel: int
    bits: Bits
    bits_per_weight: float
    error: float


def summary(packed: list[PackedTensor]) -> str:
    """The bits a weight on average, what that takes, and the tensor that suffered most, in one line."""
    numel = sum(each.numel for each in packed)
    bits = sum(each.numel * each.bits_per_weight for each in packed)
    worst = max(packed, key=lambda each: each.error)
    return (
        f"{numel:,} weights packed at {bits / numel:.2f} bits each, scales included: {bits / 8e6:,.1f} MB; "
        f"largest error {worst.error:.1%} of a tensor's norm ({worst.name})"
    )


@torch.no_grad()
def pack_weights(
    model: LanguageModel, bits: Bits, *, experts_bits: Bits | None = None, group: int = GROUP
) -> list[PackedTensor]:
    """Round a model's matrices to whole numbers and pack them, in place; says what it did.

    Projections get `bits`, routed experts `experts_bits` (`bits` unless given), an untied head 8. Routers, norms, the
    embedding, and matrices that layers read otherwise than as a product (MLA's second expansion) stay as they are.
    Raises ConfigError for other bits.
    """
    for value in (bits, experts_bits or bits):
        if value not in BITS:
            raise ConfigError(f"{value} bits; known: {', '.join(map(str, BITS))}")
    packed = []
    if model.head is None:  # a tied table is looked up as it is, and multiplied from a packed copy
        table = nn.Linear(1, 1, bias=False, device="meta")
        table.weight = model.embedding.weight
        model.head = table
    for parent, name, module in list(_replaceable(model)):
        full_name = f"{parent}.{name}".lstrip(".")
        owner = model.get_submodule(parent)
        if isinstance(module, GroupedExperts):
            stand_in, told = _packed_experts(full_name, module, experts_bits or bits, group)
        else:
            stand_in, told = _packed_linear(full_name, module, HEAD_BITS if module is model.head else bits, group)
        setattr(owner, name, stand_in)
        packed += told
    return packed


# Read as tensors by their layers, not called: see LatentAttention, CompressedAttention, Indexer.
_READ_AS_TENSORS = ("kv_b_proj", "o_a_proj", "head_weights")


def _replaceable(model: LanguageModel) -> Iterator[tuple[str, str, nn.Linear | GroupedExperts]]:
    """(parent's name, own name, module) of what can be packed."""
    for full_name, module in model.named_modules():
        parent, _, name = full_name.rpartition(".")
        if isinstance(module, nn.Linear) and name in (*_READ_AS_TENSORS, "shared_gate"):
            continue
        if isinstance(module, nn.Linear | GroupedExperts):
            yield parent, name, module


def _packed_linear(name: str, linear: nn.Linear, bits: Bits, group: int) -> tuple[PackedLinear, list[PackedTensor]]:
    packed, told = _pack(f"{name}.weight", linear.weight[None], bits, group, paired=False)
    return PackedLinear(packed, linear.bias), [told]


def _packed_experts(
    name: str, experts: GroupedExperts, bits: Bits, group: int
) -> tuple[PackedExperts, list[PackedTensor]]:
    weight, bias = experts.into
    into, first = _pack(f"{name}.{experts.into_name}", weight, bits, group, paired=experts.gated)
    down, second = _pack(f"{name}.down", experts.down, bits, group, paired=False)
    biases = None if bias is None or experts.down_bias is None else (bias.data, experts.down_bias.data)
    return PackedExperts(into, down, experts.activation, biases), [first, second]


def _pack(
    name: str, weight_EOI: Tensor, bits: Bits, group: int, *, paired: bool
) -> tuple[PackedMatrices, PackedTensor]:
    rounded = round_to_ints(weight_EOI, bits, group)
    wide = weight_EOI.float()
    error = float((wide - dequantized(rounded, group)).norm() / wide.norm().clamp_min(1e-30))
    packed = pack_ints(rounded.values, rounded.scales, bits, group=group, paired=paired)
    return packed, PackedTensor(name, weight_EOI.numel(), bits, packed.bits_per_weight, error)
