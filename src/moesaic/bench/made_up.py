"""Models that nobody trained, small and of sizes that no released model has, for timing kernels one by one."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlaConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.engine.engine import Engine
from moesaic.hub.codes import CodedTensor, Codes, CodesFormat
from moesaic.kernels.rounding import Bits
from moesaic.tensor_spec import TensorSpec


class Sizes(NamedTuple):
    """Of a made-up model."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Of all experts of a layer."""
        return 3 * self.experts * self.hidden * self.inner

    def near(self) -> "Sizes":
        """The same matrices, but so few that a cache holds them; every token goes to every expert."""
        return self._replace(experts=2, top_k=2, vocabulary=1024)


WIDE = Sizes(hidden=896, inner=448, experts=16, top_k=4, vocabulary=8192)
NARROW = Sizes(hidden=448, inner=160, experts=64, top_k=8, vocabulary=24_576)
LONGEST = 2048
ATTENTIONS: dict[str, AttentionConfig | MlaConfig] = {
    "1": AttentionConfig(num_heads=8, num_key_value_heads=8, head_dim=64),
    "4": AttentionConfig(num_heads=8, num_key_value_heads=2, head_dim=64),
    "latent": MlaConfig(num_heads=8, latent_rank=256, nope_dim=64, rope_dim=32, value_dim=64, query_rank=192),
}
"""By how many query heads share a key."""


def made_up_config(attention: str = "4", layers: int = 1, sizes: Sizes = WIDE, *, dense: bool = False) -> ModelConfig:
    """So many layers, all the same: an attention of ATTENTIONS, and experts, or a narrow dense block. Before them is
    one more, always of the latter kind, in which threads wake up that have slept since the step before."""
    router = RouterConfig(name="softmax_topk", num_experts=sizes.experts, top_k=sizes.top_k)
    moe = MoeConfig(router=router, intermediate_size=sizes.inner)
    first = LayerConfig(attention=ATTENTIONS[attention], feed_forward=MlpConfig(intermediate_size=64))
    layer = first if dense else replace(first, feed_forward=moe)
    return ModelConfig(
        family="qwen3_moe",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        context_length=LONGEST,
        decoder=StackConfig(layers=(first, *(layer,) * layers)),
    )


class MadeUpWeights:
    """See engine.weights.Weights. Tensors of one shape are one and the same, so that drawing them takes no time;
    packed, each has memory of its own. codes: the format of experts, and for "fp8" of all projections, too."""

    dtype = torch.bfloat16

    def __init__(self, config: ModelConfig, codes: CodesFormat | None = None) -> None:
        self.config = config
        self.codes: CodesFormat | None = codes
        self._specs = {spec.name: spec for spec in config.tensors()}
        self._drawn: dict[tuple[int, ...], Tensor] = {}
        self._codes: dict[tuple[int, ...], Codes] = {}

    def coded(self, name: str) -> CodedTensor | None:
        spec = self._specs[name]
        roles = {"mxfp4": ("experts",), "fp8": ("experts", "attention")}.get(self.codes or "", ())
        if self.codes is None or spec.role not in roles or len(spec.shape) < 2:
            return None
        format_ = self.codes

        def read(expert: int | None) -> Codes:
            shape = _shape(spec, expert)
            if shape not in self._codes:
                self._codes[shape] = _codes(format_, shape)
            return self._codes[shape]

        return CodedTensor(format_, read)

    def read(self, name: str, expert: int | None = None) -> Tensor:
        spec = self._specs[name]
        shape = _shape(spec, expert)
        if len(shape) == 1:
            return torch.full(shape, float(spec.role == "norm"), dtype=self.dtype)
        if shape not in self._drawn:
            std = shape[-1] ** -0.5
            self._drawn[shape] = torch.empty(shape, dtype=self.dtype).normal_(0.0, std, generator=_generator())
        return self._drawn[shape]


def _codes(format_: CodesFormat, shape: tuple[int, ...]) -> Codes:
    group, largest = (128, 0x50) if format_ == "fp8" else (32, 16)
    values = torch.randint(0, largest, shape, dtype=torch.uint8, generator=_generator())
    grouped = (*shape[:-1], -(-shape[-1] // group))
    scales = torch.full(grouped, 1e-3) if format_ == "fp8" else torch.full(grouped, 118, dtype=torch.uint8)
    return Codes(values, scales)


def _shape(spec: TensorSpec, expert: int | None) -> tuple[int, ...]:
    return spec.shape if expert is None else spec.shape[1:]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made_up_engine(
    config: ModelConfig, *, bits: Bits | None = None, codes: CodesFormat | None = None, threads: int | None = None
) -> Engine:
    """An engine of such a model."""
    return Engine(MadeUpWeights(config, codes), bits=bits, threads=threads, max_length=LONGEST)


def in_turn(num_tokens: int, sizes: Sizes) -> Tensor:
    """Experts [T, K] for tokens such that each expert gets as many rows as any other."""
    return (torch.arange(num_tokens)[:, None] * sizes.top_k + torch.arange(sizes.top_k)) % sizes.experts
