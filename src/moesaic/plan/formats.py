"""How many bits a weight or a cached number takes, and in what products it is multiplied, by part of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from moesaic.config import MlaConfig, ModelConfig
from moesaic.errors import ConfigError
from moesaic.plan.hardware import Number
from moesaic.registry import unknown_name
from moesaic.tensor_spec import ROLES, Role, TensorSpec


class Packing(NamedTuple):
    """Bits of a weight, scales included; what its products are made of."""

    bits: float
    products: Number


PACKINGS: dict[str, Packing] = {
    "fp32": Packing(32, "fp32"),
    "bf16": Packing(16, "bf16"),
    "fp8": Packing(8 + 32 / 128**2, "fp8"),
    "fp8-128": Packing(8.25, "bf16"),
    "int8": Packing(8.5, "int8"),
    "int6": Packing(6.5, "int8"),
    "int4": Packing(4.5, "int8"),
    "int4-128": Packing(4.125, "bf16"),
    "uneven4": Packing(4.5, "int8"),
    "mxfp4": Packing(4.25, "fp4"),
}
"""fp8: e4m3 with an fp32 scale for each 128 x 128 block (DeepSeek-V3, arXiv:2412.19437, sec. 3.3); fp8-128: for each
128 weights of an output, as moesaic's engine holds it. int8, int6, int4: as moesaic packs them, an fp16 scale for each
32 weights; int4-128: for each 128 (GPTQ, AWQ), multiplied in bf16. uneven4: moesaic's sixteen uneven values, two scales
in 16 bits for each 32. mxfp4: an exponent of 8 bits for each 32 (gpt-oss)."""

_MATRICES: tuple[Role, ...] = ("experts", "shared_experts", "attention", "mlp")
"""Roles that a narrow format is meant for: embeddings, heads, routers and norms stay as they are, in the files of
DeepSeek-V3 (sec. 3.3.1) and gpt-oss, and in GPTQ's and AWQ's."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """The packing of each role's matrices, and how numbers of the cache are kept (CACHE_BYTES).

    Vectors, and the biases of experts, are kept in 16 bits whatever the matrices have. bits: of a weight, where files
    say so, in place of the packing's.
    """

    name: str
    by_role: Mapping[Role, str]
    cache: str = "bf16"
    bits: Mapping[Role, float] = field(default_factory=dict)

    @cached_property
    def _packings(self) -> dict[Role, Packing]:
        found: dict[Role, Packing] = {}
        for role in self.by_role:
            packing = PACKINGS[self.by_role[role]]
            found[role] = packing._replace(bits=self.bits.get(role, packing.bits))
        return found

    def of(self, role: Role) -> Packing:
        return self._packings[role]

    def tensor_bytes(self, spec: TensorSpec) -> float:
        """What a tensor takes."""
        if spec.dtype is not None:
            return 4.0 * spec.numel
        if len(spec.shape) == 1 or spec.name.endswith("bias"):
            return spec.numel * min(2.0, PACKINGS[self.by_role["norm"]].bits / 8)
        return spec.numel * self.of(spec.role).bits / 8

    def state_bytes(self, config: ModelConfig, num_tokens: int) -> float:
        """All layers' keys and values, or what stands for them, after `num_tokens` tokens of one text."""
        return sum(layer_state_bytes(layer.attention, num_tokens, self.cache) for layer in config.decoder.layers) + sum(
            layer.cross_attention.state().num_bytes(num_tokens, 1) * CACHE_BYTES[self.cache]
            for layer in config.decoder.layers
            if layer.cross_attention
        )


CACHE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1 + 2 / 32}
"""Of a number. int8: as moesaic's engine keeps it, a scale in bf16 for each 32 numbers of a token."""


def layer_state_bytes(attention, num_tokens: int, cache: str) -> float:
    """What one layer keeps of one text.

    Latents in FP8 are kept as DeepSeek does: an fp32 scale for each 128 numbers, the shared key in bf16 (656 bytes a
    token for 512 and 64 numbers; FlashMLA's format).
    """
    if cache == "fp8" and isinstance(attention, MlaConfig):
        latent = attention.latent_rank + 4 * -(-attention.latent_rank // 128) + 2 * attention.rope_dim
        index = attention.state().elements_per_token - attention.latent_rank - attention.rope_dim
        return num_tokens * float(latent + index + 4 * (index > 0))
    spec = attention.state()
    fixed = spec.fixed_bytes if num_tokens else 0  # of a recurrent state, which has formats of its own
    return (spec.num_bytes(num_tokens, 1) - fixed) * CACHE_BYTES[cache] + fixed


def named(name: str, cache: str = "bf16") -> Formats:
    """Formats by a name ("bf16", "fp8", "int8", "int4", "mxfp4") or a list, "fp8,experts=mxfp4,head=bf16".

    A narrow format alone is for experts and other matrices, and "mxfp4" for experts only, as it is released (gpt-oss);
    the rest stays in bf16. Raises ConfigError for what is not known.
    """
    if cache not in CACHE_BYTES:
        raise unknown_name("cache format", cache, list(CACHE_BYTES))
    first, *others = [word.strip() for word in name.lower().split(",")]
    if first not in PACKINGS:
        raise unknown_name("format", first, list(PACKINGS))
    wide = first if first in ("fp32", "bf16") else "bf16"
    roles: dict[Role, str] = dict.fromkeys(ROLES, wide)
    roles |= dict.fromkeys(("experts",) if first == "mxfp4" else _MATRICES, first)
    for word in others:
        role, _, packing = word.partition("=")
        if role not in ROLES or packing not in PACKINGS:
            known = f"{', '.join(ROLES)} = {', '.join(PACKINGS)}"
            raise ConfigError(f"format {name!r}: {word!r} is not ROLE=FORMAT; known: {known}")
        roles[role] = packing
    return Formats(name=name, by_role=roles, cache=cache)


def engine_formats(bits: int | None, experts_bits: int | None = None, *, files: str = "bf16") -> Formats:
    """What moesaic's own engine makes of `bits`: the head gets 6 bits where others get 4, embeddings stay as they are.

    files: the format of the weights in the files, which stays without `bits` ("bf16", "fp32", "fp8", "mxfp4").
    """
    base = named(files)
    if bits is None and experts_bits is None:
        return base
    roles = dict(base.by_role)
    if bits is not None:
        roles |= dict.fromkeys(_MATRICES, f"int{bits}")
        roles["head"] = "int6" if bits == 4 else f"int{bits}"
    if experts_bits or bits:
        roles["experts"] = f"int{experts_bits or bits}"
    return Formats(name=f"int{bits or experts_bits}", by_role=roles)


def weight_bytes(tensors: Iterable[TensorSpec], formats: Formats) -> dict[Role, float]:
    """Bytes of tensors, by role."""
    total: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    for spec in tensors:
        total[spec.role] += formats.tensor_bytes(spec)
    return total


def total_bytes(config: ModelConfig, formats: Formats, *, mtp: bool = False) -> float:
    """All weights of a model, once. mtp: with the layers that predict further tokens."""
    return sum(map(formats.tensor_bytes, chain(config.parameters(), config.mtp_parameters() if mtp else ())))


def as_released(family: str) -> str:
    """The format that a family's weights are published in."""
    return _RELEASED.get(family, "bf16")


_RELEASED = {
    "deepseek_v3": "fp8",
    "deepseek_v32": "fp8",
    "deepseek_v4": "fp8,experts=mxfp4",
    "gpt_oss": "mxfp4",
}
