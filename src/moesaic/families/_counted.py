"""Hybrids with state-space or linear attention layers: counted from their configurations, and not run yet.

Each architecture is a function from a config.json to the tensors of the model, as for the families that run; the part
that mixes tokens has the role "attention", whatever it is. Shapes are those of transformers 5's modules of it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moesaic.errors import ConfigError
from moesaic.families._common import HfFields, Preset
from moesaic.families._multimodal import TEXT, has_text_part, text_part
from moesaic.fields import shown
from moesaic.registry import unknown_name
from moesaic.tensor_spec import ROLES, Role, TensorSpec

Tensors = Iterator[TensorSpec]
NOT_YET = "counted from its configuration only: its state-space or linear attention layers do not run yet"


class CountedModel(NamedTuple):
    """The tensors of a model that is only counted; `total`, `active_all` and `active_gemm` as ModelConfig has them."""

    family: str
    tensors: tuple[TensorSpec, ...]
    num_layers: int
    moe_layers: int
    experts: str
    tied: bool

    @property
    def total(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def active_all(self) -> int:
        return sum(tensor.active_numel for tensor in self.tensors)

    @property
    def active_gemm(self) -> int:
        looked_up = 0 if self.tied else sum(each.numel for each in self.tensors if each.role == "embedding")
        return self.active_all - looked_up

    @property
    def roles(self) -> dict[Role, int]:
        return {role: sum(each.numel for each in self.tensors if each.role == role) for role in ROLES}

    @property
    def active_roles(self) -> dict[str, int]:
        return {role: sum(each.active_numel for each in self.tensors if each.role == role) for role in ROLES}


def count(raw: dict[str, Any]) -> CountedModel:
    """A model from its config.json. Raises ConfigError for an architecture that is not known here."""
    raw = text_part(raw) if has_text_part(raw) else raw
    family = raw.get("model_type", "")
    if family not in ARCHITECTURES:
        raise unknown_name("model_type", family, list(ARCHITECTURES))
    hf = HfFields(raw)
    tied = hf.flag("tie_word_embeddings")
    table = (hf.size("vocab_size"), hf.size("hidden_size"))
    layers = tuple(ARCHITECTURES[family](hf))
    tensors = [TensorSpec("embedding.weight", table, "embedding"), *layers]
    tensors.append(TensorSpec("final_norm.weight", table[1:], "norm"))
    if not tied:
        tensors.append(TensorSpec("head.weight", table, "head"))
    routed = {(each.name.split(".")[1], each.top_k_of) for each in tensors if each.top_k_of}
    kinds = sorted({kind for _, kind in routed if kind})
    has_shared = any(each.role == "shared_experts" for each in tensors)
    experts = " and ".join(f"{top_k} of {number}" for top_k, number in kinds) + (" + shared" if has_shared else "")
    num_layers = len({each.name.split(".")[1] for each in layers})
    return CountedModel(family, tuple(tensors), num_layers, len({layer for layer, _ in routed}), experts, tied)


def knows(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of an architecture that is only counted."""
    name = (raw[TEXT] if has_text_part(raw) else raw).get("model_type")
    return isinstance(name, str) and name in ARCHITECTURES


class _Layer:
    """The tensors of one layer, by role."""

    def __init__(self, hf: HfFields, index: int) -> None:
        self.hf, self.index, self.width = hf, index, hf.size("hidden_size")

    def one(self, name: str, role: Role, *shape: int, top_k_of: tuple[int, int] | None = None) -> TensorSpec:
        return TensorSpec(f"layers.{self.index}.{name}", shape, role, top_k_of=top_k_of)

    def norms(self, count: int) -> Tensors:
        yield self.one("norms", "norm", count, self.width)

    def attention(self, *, gated: bool = False, normed: bool = False) -> Tensors:
        """Grouped-query attention; gated: q_proj emits a gate of the output, too."""
        num_heads, groups = self.hf.size("num_attention_heads"), self.hf.size("num_key_value_heads")
        head = self.hf.head_dim()
        yield self.one("attention.q", "attention", (2 if gated else 1) * num_heads * head, self.width)
        yield self.one("attention.kv", "attention", 2 * groups * head, self.width)
        yield self.one("attention.o", "attention", self.width, num_heads * head)
        if normed:
            yield self.one("attention.qk_norm", "norm", 2, head)

    def mlp(self, inner: int, role: Role = "mlp", matrices: int = 3) -> Tensors:
        yield self.one(role, role, matrices, inner, self.width)

    def experts(
        self, num_experts: int, top_k: int, inner: int, *, matrices: int = 3, width: int | None = None
    ) -> Tensors:
        """A router and routed experts, of `matrices` each, that work at `width` where that is not the model's."""
        yield self.one("router", "router", num_experts, self.width)
        shape = (num_experts, matrices, inner, width or self.width)
        yield self.one("experts", "experts", *shape, top_k_of=(top_k, num_experts))

    def mamba2(self, heads: int, head: int, state: int, groups: int, kernel: int) -> Tensors:
        """Mamba-2 (arXiv:2405.21060): one projection in, a convolution with bias, three vectors, a norm, one out."""
        inner = heads * head
        convolved = inner + 2 * groups * state
        yield self.one("mamba.in", "attention", inner + convolved + heads, self.width)
        yield self.one("mamba.conv", "attention", convolved, kernel + 1)
        yield self.one("mamba.dt_a_d", "attention", 3, heads)
        yield self.one("mamba.norm", "norm", inner)
        yield self.one("mamba.out", "attention", self.width, inner)


def _qwen3_next(hf: HfFields) -> Tensors:
    """Three of four layers are gated DeltaNet (arXiv:2412.06464), the fourth gated attention; MoE everywhere."""
    interval = hf.size("full_attention_interval", default=4)
    key = hf.size("linear_num_key_heads", default=16) * hf.size("linear_key_head_dim", default=128)
    value_heads, value_head = (
        hf.size("linear_num_value_heads", default=32),
        hf.size("linear_value_head_dim", default=128),
    )
    value = value_heads * value_head
    for index in range(hf.size("num_hidden_layers")):
        layer = _Layer(hf, index)
        if (index + 1) % interval == 0:
            yield from layer.attention(gated=True, normed=True)
        else:
            yield layer.one("delta.in", "attention", 2 * key + 2 * value + 2 * value_heads, layer.width)
            yield layer.one("delta.conv", "attention", 2 * key + value, hf.size("linear_conv_kernel_dim", default=4))
            yield layer.one("delta.dt_a", "attention", 2, value_heads)
            yield layer.one("delta.norm", "norm", value_head)
            yield layer.one("delta.out", "attention", layer.width, value)
        yield from layer.experts(
            hf.size("num_experts"), hf.size("num_experts_per_tok"), hf.size("moe_intermediate_size")
        )
        yield from layer.mlp(hf.size("shared_expert_intermediate_size"), "shared_experts")
        yield layer.one("shared_gate", "shared_experts", 1, layer.width)
        yield from layer.norms(2)


def _jamba(hf: HfFields) -> Tensors:
    """Mamba (arXiv:2312.00752) with norms of its inner parts, attention every eighth layer, MoE every second."""
    inner = hf.size("mamba_expand", default=2) * hf.size("hidden_size")
    state, kernel = hf.size("mamba_d_state", default=16), hf.size("mamba_d_conv", default=4)
    rank = hf.size("mamba_dt_rank", default=math.ceil(hf.size("hidden_size") / 16))
    for index in range(hf.size("num_hidden_layers")):
        layer = _Layer(hf, index)
        if index % hf.size("attn_layer_period", default=8) == hf.get("attn_layer_offset", default=4):
            yield from layer.attention()
        else:
            yield layer.one("mamba.in", "attention", 2 * inner, layer.width)
            yield layer.one("mamba.conv", "attention", inner, kernel + 1)
            yield layer.one("mamba.x", "attention", rank + 2 * state, inner)
            yield layer.one("mamba.dt", "attention", inner, rank + 1)
            yield layer.one("mamba.a_d", "attention", inner, state + 1)
            yield layer.one("mamba.out", "attention", layer.width, inner)
            yield layer.one("mamba.norms", "norm", rank + 2 * state)
        if index % hf.size("expert_layer_period", default=2) == hf.get("expert_layer_offset", default=1):
            numbers = hf.size("num_experts", default=16), hf.size("num_experts_per_tok", default=2)
            yield from layer.experts(*numbers, hf.size("intermediate_size"))
        else:
            yield from layer.mlp(hf.size("intermediate_size"))
        yield from layer.norms(2)


_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def _kinds(hf: HfFields, known: tuple[str, ...], *names: str) -> list[str]:
    """What each layer is, from the first of these fields that is there: a list of names, or a text of letters."""
    kinds: Any = hf.get(*names)
    if isinstance(kinds, str):
        kinds = [_LETTERS.get(letter, letter) for letter in kinds]
    if not isinstance(kinds, list) or not kinds or not all(kind in known for kind in kinds):
        raise ConfigError(f"{' or '.join(names)} is {shown(kinds)}; it must list every layer: {', '.join(known)}")
    return kinds


def _granitemoehybrid(hf: HfFields) -> Tensors:
    """Granite 4: Mamba-2 and a few layers of attention, each followed by routed experts and a shared MLP."""
    for index, kind in enumerate(_kinds(hf, ("mamba", "attention"), "layer_types", "layers_block_type")):
        layer = _Layer(hf, index)
        if kind == "mamba":
            yield from layer.mamba2(
                hf.size("mamba_n_heads"),
                hf.size("mamba_d_head"),
                hf.size("mamba_d_state"),
                hf.size("mamba_n_groups", default=1),
                hf.size("mamba_d_conv", default=4),
            )
        else:
            yield from layer.attention()
        numbers = hf.size("num_local_experts"), hf.size("num_experts_per_tok")
        yield from layer.experts(*numbers, hf.size("intermediate_size"))
        yield from layer.mlp(hf.size("shared_intermediate_size"), "shared_experts")
        yield from layer.norms(2)


def _nemotron_h(hf: HfFields) -> Tensors:
    """Nemotron-H (arXiv:2504.03624) with experts: one part a layer, as a list names them or a pattern of letters does.

    Its MLPs have two matrices (squared ReLU); experts may work at a width of their own, with a way there and back.
    """
    for index, kind in enumerate(_kinds(hf, tuple(_LETTERS.values()), "layers_block_type", "hybrid_override_pattern")):
        layer = _Layer(hf, index)
        yield from layer.norms(1)
        if kind == "mamba":
            yield from layer.mamba2(
                hf.size("mamba_num_heads"),
                hf.size("mamba_head_dim"),
                hf.size("ssm_state_size"),
                hf.size("n_groups"),
                hf.size("conv_kernel", default=4),
            )
        elif kind == "attention":
            yield from layer.attention()
        elif kind == "mlp":
            yield from layer.mlp(hf.size("intermediate_size"), matrices=2)
        else:
            latent = hf.get("moe_latent_size")
            numbers = hf.size("n_routed_experts"), hf.size("num_experts_per_tok")
            yield from layer.experts(*numbers, hf.size("moe_intermediate_size"), matrices=2, width=latent)
            shared = hf.size("moe_shared_expert_intermediate_size")
            yield from layer.mlp(hf.size("n_shared_experts") * shared, "shared_experts", matrices=2)
            if latent:
                yield layer.one("latent", "experts", 2, latent, layer.width)


ARCHITECTURES: dict[str, Callable[[HfFields], Tensors]] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe_text": _qwen3_next,
    "jamba": _jamba,
    "granitemoehybrid": _granitemoehybrid,
    "nemotron_h": _nemotron_h,
}


def _granite(num_layers: int, **sizes: int) -> dict[str, Any]:
    attends = (5, 15, 25, 35)
    kinds = ["attention" if index in attends else "mamba" for index in range(num_layers)]
    common = {"model_type": "granitemoehybrid", "vocab_size": 100352, "tie_word_embeddings": True, "layer_types": kinds}
    return common | {"mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1} | sizes


def _qwen(model_type: str, **sizes: int) -> dict[str, Any]:
    attention = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
    experts = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
    return {"model_type": model_type, "hidden_size": 2048, **attention, **experts, **sizes}


PRESETS = {
    "qwen3-next-80b-a3b": Preset(
        _qwen("qwen3_next", num_hidden_layers=48, num_experts=512, num_experts_per_tok=10, vocab_size=151936),
        licence="Apache-2.0",
        source="Qwen/Qwen3-Next-80B-A3B-Instruct",
    ),
    "qwen3.5-35b-a3b": Preset(
        _qwen("qwen3_5_moe_text", num_hidden_layers=40, num_experts=256, num_experts_per_tok=8, vocab_size=248320),
        licence="Apache-2.0",
        source="Qwen/Qwen3.5-35B-A3B; its text part",
    ),
    "jamba-v0.1": Preset(
        {
            "model_type": "jamba",
            "vocab_size": 65536,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        licence="Apache-2.0",
        source="ai21labs/Jamba-v0.1; arXiv:2403.19887",
    ),
    "granite-4.0-h-small": Preset(
        _granite(
            40, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_local_experts=72,
            num_experts_per_tok=10, intermediate_size=768, shared_intermediate_size=1536, mamba_n_heads=128,
        ),
        licence="Apache-2.0",
        source="ibm-granite/granite-4.0-h-small",
        is_verified=False,
    ),
    "granite-4.0-h-tiny": Preset(
        _granite(
            40, hidden_size=1536, num_attention_heads=12, num_key_value_heads=4, num_local_experts=64,
            num_experts_per_tok=6, intermediate_size=512, shared_intermediate_size=1024, mamba_n_heads=48,
        ),
        licence="Apache-2.0",
        source="ibm-granite/granite-4.0-h-tiny",
        is_verified=False,
    ),
    "nemotron-3-nano-30b-a3b": Preset(
        {
            "model_type": "nemotron_h",
            "vocab_size": 131072,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 3712,
        },
        licence="NVIDIA Open Model License",
        source="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    ),
    "nemotron-3-super-120b-a12b": Preset(
        {
            "model_type": "nemotron_h",
            "vocab_size": 131072,
            "hidden_size": 4096,
            "hybrid_override_pattern": (
                "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
            ),
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "n_routed_experts": 512,
            "num_experts_per_tok": 22,
            "moe_intermediate_size": 2688,
            "moe_latent_size": 1024,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 5376,
        },
        licence="NVIDIA Open Model License",
        source="nvidia/NVIDIA-Nemotron-3-Super-120B-A12B",
    ),
}  # fmt: skip
