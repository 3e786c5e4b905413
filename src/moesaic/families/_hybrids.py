"""Hybrids: state-space or linear attention layers beside attention, described from their configurations.

Shapes are those of transformers 5's modules, which a test compares.
"""

import math
from collections.abc import Iterator
from typing import Any

from moesaic.config import AbsentConfig, LayerConfig, MlpConfig, OutlinedMla, OutlinedModel
from moesaic.config.outline import Outlined
from moesaic.errors import ConfigError
from moesaic.families import _outlines as outlines
from moesaic.families._common import HfFields
from moesaic.fields import shown

_LINEAR, _FULL = "linear_attention", "full_attention"


def qwen3_next(hf: HfFields) -> OutlinedModel:
    """Three of four layers are gated DeltaNet (arXiv:2412.06464), the fourth gated attention; MoE nearly everywhere."""
    interval = hf.size("full_attention_interval", default=4)
    number = hf.size("num_hidden_layers")
    usual = [_LINEAR if (index + 1) % interval else _FULL for index in range(number)]
    kinds = usual if hf.get("layer_types") is None else outlines.layer_kinds(hf, (_LINEAR, _FULL), "layer_types")
    delta = outlines.gated_delta(
        hf,
        key_heads=hf.size("linear_num_key_heads", default=16),
        key=hf.size("linear_key_head_dim", default=128),
        value_heads=hf.size("linear_num_value_heads", default=32),
        value=hf.size("linear_value_head_dim", default=128),
        kernel=hf.size("linear_conv_kernel_dim", default=4),
    )
    attention = outlines.attention(hf, gated=True, normed=True, biased=True)
    gate: tuple[Outlined, ...] = (("shared_gate.weight", (1, hf.size("hidden_size")), "shared_experts"),)
    moe = outlines.moe(
        hf, hf.size("num_experts", default=512), hf.size("num_experts_per_tok", default=10),
        hf.size("moe_intermediate_size"), shared=hf.size("shared_expert_intermediate_size"), more=gate,
    )  # fmt: skip
    step, dense = hf.size("decoder_sparse_step", default=1), hf.get("mlp_only_layers", default=[])

    def layers() -> Iterator[LayerConfig]:
        for index, kind in enumerate(kinds):
            routes = index not in dense and (index + 1) % step == 0
            block = moe if routes else MlpConfig(intermediate_size=hf.size("intermediate_size"))
            yield LayerConfig(attention=delta if kind == _LINEAR else attention, feed_forward=block)

    return outlines.model(hf, layers(), context=32768)


def jamba(hf: HfFields) -> OutlinedModel:
    """Mamba (arXiv:2312.00752), attention every eighth layer, MoE every second (Jamba, arXiv:2403.19887)."""
    size = hf.size("hidden_size")
    rank = None if hf.get("mamba_dt_rank") == "auto" else hf.get("mamba_dt_rank")
    mamba = outlines.mamba(
        hf,
        inner=hf.size("mamba_expand", default=2) * size,
        state=hf.size("mamba_d_state", default=16),
        kernel=hf.size("mamba_d_conv", default=4),
        rank=math.ceil(size / 16) if rank is None else hf.size("mamba_dt_rank"),
        conv_bias=hf.flag("mamba_conv_bias", default=True),
        bias=hf.flag("mamba_proj_bias"),
    )
    attention = outlines.attention(hf)
    block = MlpConfig(intermediate_size=hf.size("intermediate_size"))
    numbers = hf.size("num_experts", default=16), hf.size("num_experts_per_tok", default=2)
    moe = outlines.moe(hf, *numbers, block.intermediate_size) if numbers[0] > 1 else block
    attends = hf.size("attn_layer_period", default=8), hf.get("attn_layer_offset", default=4)
    routes = hf.size("expert_layer_period", default=2), hf.get("expert_layer_offset", default=1)
    layers = (
        LayerConfig(
            attention=attention if index % attends[0] == attends[1] else mamba,
            feed_forward=moe if index % routes[0] == routes[1] else block,
        )
        for index in range(hf.size("num_hidden_layers"))
    )
    return outlines.model(hf, layers, context=262_144)


def granitemoehybrid(hf: HfFields) -> OutlinedModel:
    """Granite 4: Mamba-2 and a few layers of attention, each followed by routed experts and a shared MLP."""
    known = ("mamba", "attention", _LINEAR, _FULL)
    kinds = outlines.layer_kinds(hf, known, "layer_types", "layers_block_type")
    heads, head = hf.size("mamba_n_heads", default=128), hf.get("mamba_d_head", default="auto")
    mamba = outlines.mamba2(
        hf,
        heads=heads,
        head=hf.size("mamba_expand", default=2) * hf.size("hidden_size") // heads
        if head == "auto"
        else hf.size("mamba_d_head"),
        state=hf.size("mamba_d_state", default=256),
        groups=hf.size("mamba_n_groups", default=1),
        kernel=hf.size("mamba_d_conv", default=4),
        conv_bias=hf.flag("mamba_conv_bias", default=True),
        bias=hf.flag("mamba_proj_bias"),
    )
    attention = outlines.attention(hf, biased=True)
    shared = hf.size("shared_intermediate_size", default=1024)
    if hf.get("num_local_experts", default=8) == 0:
        block: Any = MlpConfig(intermediate_size=shared)
    else:
        numbers = hf.size("num_local_experts", default=8), hf.size("num_experts_per_tok", default=2)
        block = outlines.moe(hf, *numbers, hf.size("intermediate_size"), shared=shared)
    layers = (
        LayerConfig(attention=mamba if kind in ("mamba", _LINEAR) else attention, feed_forward=block) for kind in kinds
    )
    return outlines.model(hf, layers, context=131_072)


_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def nemotron_h(hf: HfFields) -> OutlinedModel:
    """Nemotron-H (arXiv:2504.03624) with experts: one part a layer, as a list names them or a pattern of letters does.

    Its MLPs have two matrices (squared ReLU); experts may work at a width of their own, with a way there and back.
    """
    known = (*_LETTERS.values(), _LINEAR, _FULL)
    kinds = outlines.layer_kinds(
        hf, known, "layers_block_type", "layer_types", "hybrid_override_pattern", letters=_LETTERS
    )
    bias = [name for name in ("mlp_bias",) if hf.flag(name)]
    if bias:
        raise ConfigError(f"{bias[0]}=true is not known of this architecture; leave it out")
    parts: dict[str, Any] = {}
    if {"mamba", _LINEAR} & set(kinds):
        parts["mamba"] = parts[_LINEAR] = outlines.mamba2(
            hf,
            heads=hf.size("mamba_num_heads"),
            head=hf.size("mamba_head_dim"),
            state=hf.size("ssm_state_size", "mamba_d_state", default=128),
            groups=hf.size("n_groups", "mamba_n_groups", default=8),
            kernel=hf.size("conv_kernel", "mamba_d_conv", default=4),
            conv_bias=hf.flag("use_conv_bias", default=True),
            bias=hf.flag("use_bias"),
        )
    if {"attention", _FULL} & set(kinds):
        parts["attention"] = parts[_FULL] = outlines.attention(hf)
    if "mlp" in kinds:
        parts["mlp"] = MlpConfig(intermediate_size=hf.size("intermediate_size"), gated=False)
    if "moe" in kinds:
        parts["moe"] = _nemotron_moe(hf)
    absent = AbsentConfig()
    layers = (
        LayerConfig(attention=absent, feed_forward=parts[kind])
        if kind in ("mlp", "moe")
        else LayerConfig(attention=parts[kind], feed_forward=absent)
        for kind in kinds
    )
    return outlines.model(hf, layers, context=262_144)


def _nemotron_moe(hf: HfFields) -> Any:
    size = hf.size("hidden_size")
    latent = None if hf.get("moe_latent_size") is None else hf.size("moe_latent_size")
    ways: tuple[Outlined, ...] = (
        () if latent is None else (
            ("latent_in.weight", (latent, size), "shared_experts"),
            ("latent_out.weight", (size, latent), "shared_experts"),
        )
    )  # fmt: skip
    shared = hf.get("n_shared_experts", default=1)
    return outlines.moe(
        hf, hf.size("n_routed_experts"), hf.size("num_experts_per_tok"), hf.size("moe_intermediate_size"),
        shared=shared and shared * hf.size("moe_shared_expert_intermediate_size"), gated=False, expert_size=latent,
        more=ways, selection_bias=True,
    )  # fmt: skip


def kimi_linear(hf: HfFields) -> OutlinedModel:
    """Kimi Linear (arXiv:2510.26692): three of four layers Kimi Delta Attention, the fourth latent attention without
    positions. Kimi K3 is one, with gates of full rank and experts at half the width."""
    size, number = hf.size("hidden_size"), hf.size("num_hidden_layers")
    linear = hf.get("linear_attn_config", default={})
    if not isinstance(linear, dict):
        raise ConfigError(f"linear_attn_config={shown(linear)}; it must be a table of settings")
    own = HfFields(hf.raw | {f"linear_{name}": value for name, value in linear.items()})
    delta = outlines.kimi_delta(
        hf,
        heads=own.size("linear_num_heads", default=32),
        head=own.size("linear_head_dim", default=128),
        kernel=own.size("linear_short_conv_kernel_size", "linear_conv_kernel_dim", default=4),
        full_rank=own.flag("linear_use_full_rank_gate"),
    )
    heads, value = hf.size("num_attention_heads"), hf.size("v_head_dim", default=128)
    gate: tuple[Outlined, ...] = (("output_gate.weight", (heads * value, size), "attention"),)
    latent = OutlinedMla(
        num_heads=heads,
        latent_rank=hf.size("kv_lora_rank"),
        nope_dim=hf.size("qk_nope_head_dim", default=128),
        rope_dim=hf.size("qk_rope_head_dim", default=64),
        value_dim=value,
        query_rank=None if hf.get("q_lora_rank") is None else hf.size("q_lora_rank"),
        more=gate if hf.flag("mla_use_output_gate") else (),
    )
    kinds = _kimi_kinds(hf, linear, number)
    dense = MlpConfig(intermediate_size=hf.size("intermediate_size"))
    first, step = hf.get("first_k_dense_replace", default=1), hf.size("moe_layer_freq", default=1)
    sparse = [index >= first and index % step == 0 for index in range(number)]
    if hf.get("mlp_layer_types") is not None:
        sparse = [kind == "sparse" for kind in outlines.layer_kinds(hf, ("dense", "sparse"), "mlp_layer_types")]
    moe = _kimi_moe(hf, size)
    layers = (
        LayerConfig(attention=delta if kind == _LINEAR else latent, feed_forward=moe if routes else dense)
        for kind, routes in zip(kinds, sparse, strict=True)
    )
    return outlines.model(hf, layers, context=1_048_576)


def _kimi_kinds(hf: HfFields, linear: dict[str, Any], number: int) -> list[str]:
    """Which layers attend: a list of their numbers from 1 on, or one of kinds, or every fourth."""
    if isinstance(full := linear.get("full_attn_layers"), list):
        return [_FULL if index in full else _LINEAR for index in range(1, number + 1)]
    if hf.get("layer_types") is not None:
        return outlines.layer_kinds(hf, (_LINEAR, _FULL), "layer_types")
    return [_FULL if index and index % 4 == 0 else _LINEAR for index in range(number)]


def _kimi_moe(hf: HfFields, size: int) -> Any:
    inner = hf.size("moe_intermediate_size")
    latent = None if hf.get("routed_expert_hidden_size") is None else hf.size("routed_expert_hidden_size")
    ways: tuple[Outlined, ...] = ()
    if latent is not None:
        ways = (
            ("latent_in.weight", (latent, size), "shared_experts"),
            ("latent_out.weight", (size, latent), "shared_experts"),
        )
        normed: Outlined = ("latent_norm.weight", (latent,), "norm")
        ways += (normed,) if hf.flag("latent_moe_use_norm") else ()
    return outlines.moe(
        hf, hf.size("num_experts", "num_local_experts", "n_routed_experts"),
        hf.size("num_experts_per_token", "num_experts_per_tok"), inner,
        shared=hf.get("num_shared_experts", "n_shared_experts", default=1) * inner, expert_size=latent, more=ways,
        selection_bias=True,
    )  # fmt: skip


def minimax(hf: HfFields) -> OutlinedModel:
    """MiniMax-01 (arXiv:2501.08313): lightning attention, in every eighth layer softmax attention; MoE everywhere."""
    head = hf.head_dim()
    lightning = outlines.lightning(hf, heads=hf.size("num_attention_heads"), head=head)
    attention = outlines.attention(hf)
    if isinstance(hf.get("attn_type_list"), list):
        kinds = [_FULL if kind else _LINEAR for kind in hf.get("attn_type_list")]
    else:
        kinds = outlines.layer_kinds(hf, (_LINEAR, _FULL), "layer_types")
    moe = outlines.moe(
        hf, hf.size("num_local_experts"), hf.size("num_experts_per_tok", default=2), hf.size("intermediate_size")
    )
    layers = (LayerConfig(attention=lightning if kind == _LINEAR else attention, feed_forward=moe) for kind in kinds)
    return outlines.model(hf, layers, context=1_048_576)
