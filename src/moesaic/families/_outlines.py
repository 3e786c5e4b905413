"""Parts of models that are described before they run, from a config.json: what `_hybrids` and `_further` share.

D hidden, N numbers of a state for each channel.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    MoeConfig,
    NormConfig,
    OutlinedAttention,
    OutlinedModel,
    OutlinedMoe,
    RecurrentConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.config.outline import Outlined
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields
from moesaic.fields import shown


def model(
    hf: HfFields, layers: Iterable[LayerConfig], *, context: int, norm: NormConfig | None = None
) -> OutlinedModel:
    """The whole; context: where the configuration says nothing."""
    return OutlinedModel(
        family=hf.raw["model_type"],
        vocab_size=hf.size("vocab_size"),
        hidden_size=hf.size("hidden_size"),
        context_length=hf.size("max_position_embeddings", default=context),
        tie_word_embeddings=hf.flag("tie_word_embeddings"),
        decoder=StackConfig(layers=tuple(layers), final_norm=NormConfig()),
    )


def attention(hf: HfFields, *, gated: bool = False, normed: bool = False, biased: bool = False) -> AttentionConfig:
    """Grouped-query attention. biased: where `attention_bias` says so.

    gated: the queries' matrix also makes a gate of the output, as wide as that.
    """
    heads, head = hf.size("num_attention_heads"), hf.head_dim()
    bias = biased and hf.flag("attention_bias")
    gate: tuple[Outlined, ...] = (("output_gate.weight", (heads * head, hf.size("hidden_size")), "attention"),)
    return OutlinedAttention(
        num_heads=heads,
        num_key_value_heads=hf.size("num_key_value_heads", default=heads),
        head_dim=head,
        qkv_bias=bias,
        output_bias=bias,
        head_norm=NormConfig() if normed else None,
        more=gate if gated else (),
    )


def moe(
    hf: HfFields,
    num_experts: int,
    top_k: int,
    inner: int,
    *,
    shared: int = 0,
    gated: bool = True,
    expert_size: int | None = None,
    more: tuple[Outlined, ...] = (),
    selection_bias: bool = False,
) -> MoeConfig:
    """A router and experts of width `inner`, with a shared one of width `shared`."""
    if top_k > num_experts:
        raise ConfigError(f"num_experts_per_tok={top_k} of {num_experts} experts; choose 1 to {num_experts}")
    return OutlinedMoe(
        router=RouterConfig(
            name="sigmoid_topk" if selection_bias else "softmax_topk",
            num_experts=num_experts,
            top_k=top_k,
            selection_bias=selection_bias,
        ),
        intermediate_size=inner,
        shared=MlpConfig(intermediate_size=shared, gated=gated) if shared else None,
        gated=gated,
        expert_size=expert_size,
        more=more,
    )


def layer_kinds(hf: HfFields, known: Sequence[str], *names: str, letters: dict[str, str] | None = None) -> list[str]:
    """What each layer is, from the first of these fields that is there: a list of names, or a text of letters."""
    kinds: Any = hf.get(*names)
    if isinstance(kinds, str) and letters:
        kinds = [letters.get(letter, letter) for letter in kinds]
    if not isinstance(kinds, list) or not kinds or not all(kind in known for kind in kinds):
        raise ConfigError(f"{' or '.join(names)} is {shown(kinds)}; it must list every layer: {', '.join(known)}")
    return kinds


def mamba(hf: HfFields, *, inner: int, state: int, kernel: int, rank: int, conv_bias: bool, bias: bool) -> Any:
    """Mamba (arXiv:2312.00752, alg. 2) with norms of what it selects by (Jamba, arXiv:2403.19887, sec. 3.1).

    Each of `inner` channels has a state of N numbers: times exp(dt A), plus dt B x, then C times it: 6 a number.
    """
    size = hf.size("hidden_size")
    weights: list[Outlined] = [
        ("in_proj.weight", (2 * inner, size), "attention"),
        ("conv.weight", (inner, kernel), "attention"),
        ("x_proj.weight", (rank + 2 * state, inner), "attention"),
        ("dt_proj.weight", (inner, rank), "attention"),
        ("dt_proj.bias", (inner,), "attention"),
        ("a_log", (inner, state), "attention"),
        ("d", (inner,), "attention"),
        ("out_proj.weight", (size, inner), "attention"),
        ("norms", (rank + 2 * state,), "norm"),
    ]
    if conv_bias:
        weights.append(("conv.bias", (inner,), "attention"))
    if bias:
        weights += _biases(2 * inner, size)
    return RecurrentConfig(
        num_heads=inner,
        head_dim=1,
        weights=tuple(weights),
        state_size=inner * state,
        conv_size=inner * (kernel - 1),
        state_flops=6 * inner * state,
    )


def mamba2(
    hf: HfFields, *, heads: int, head: int, state: int, groups: int, kernel: int, conv_bias: bool, bias: bool
) -> RecurrentConfig:
    """Mamba-2 (arXiv:2405.21060, sec. 7): one projection in, a convolution, three vectors of heads, a norm, one out.

    Each head's state of `head` times N numbers: times a decay, plus B x, then C times it: 5 a number.
    """
    size, inner = hf.size("hidden_size"), heads * head
    convolved = inner + 2 * groups * state
    weights: list[Outlined] = [
        ("in_proj.weight", (inner + convolved + heads, size), "attention"),
        ("conv.weight", (convolved, kernel), "attention"),
        ("dt_bias", (heads,), "attention"),
        ("a_log", (heads,), "attention"),
        ("d", (heads,), "attention"),
        ("norm.weight", (inner,), "norm"),
        ("out_proj.weight", (size, inner), "attention"),
    ]
    if conv_bias:
        weights.append(("conv.bias", (convolved,), "attention"))
    if bias:
        weights += _biases(inner + convolved + heads, size)
    return RecurrentConfig(
        num_heads=heads,
        head_dim=head,
        weights=tuple(weights),
        state_size=inner * state,
        conv_size=convolved * (kernel - 1),
        state_flops=5 * inner * state,
    )


def _biases(into: int, out: int) -> list[Outlined]:
    return [("in_proj.bias", (into,), "attention"), ("out_proj.bias", (out,), "attention")]


def gated_delta(
    hf: HfFields, *, key_heads: int, key: int, value_heads: int, value: int, kernel: int
) -> RecurrentConfig:
    """Gated DeltaNet (arXiv:2412.06464, eq. 10), with a gate of the output.

    Each value head's state of `key` times `value` numbers: times a decay, times the key, plus the outer product of key
    and what was missing, then times the query: 7 a number.
    """
    size, keys, values = hf.size("hidden_size"), key_heads * key, value_heads * value
    weights: tuple[Outlined, ...] = (
        ("in_proj.weight", (2 * keys + 2 * values + 2 * value_heads, size), "attention"),
        ("conv.weight", (2 * keys + values, kernel), "attention"),
        ("dt_bias", (value_heads,), "attention"),
        ("a_log", (value_heads,), "attention"),
        ("norm.weight", (value,), "norm"),
        ("out_proj.weight", (size, values), "attention"),
    )
    return RecurrentConfig(
        num_heads=value_heads,
        head_dim=value,
        weights=weights,
        state_size=value_heads * key * value,
        conv_size=(2 * keys + values) * (kernel - 1),
        state_flops=7 * value_heads * key * value,
    )


def kimi_delta(hf: HfFields, *, heads: int, head: int, kernel: int, full_rank: bool) -> RecurrentConfig:
    """Kimi Delta Attention (arXiv:2510.26692, eq. 1): Gated DeltaNet with a decay for each of a key's channels.

    full_rank: the gate of the output has one matrix (Kimi K3), else two with `head` numbers between them, as decays do.
    """
    size, inner = hf.size("hidden_size"), heads * head
    gate: tuple[Outlined, ...] = (
        ("g_a_proj.weight", (head, size), "attention"),
        ("g_b_proj.weight", (inner, head), "attention"),
    )
    weights: tuple[Outlined, ...] = (
        ("qkv_proj.weight", (3 * inner, size), "attention"),
        ("conv.weight", (3 * inner, kernel), "attention"),
        ("dt_bias", (inner,), "attention"),
        ("a_log", (heads,), "attention"),
        ("f_a_proj.weight", (head, size), "attention"),
        ("f_b_proj.weight", (inner, head), "attention"),
        ("b_proj.weight", (heads, size), "attention"),
        *((("g_proj.weight", (inner, size), "attention"),) if full_rank else gate),
        ("norm.weight", (head,), "norm"),
        ("out_proj.weight", (size, inner), "attention"),
    )
    return RecurrentConfig(
        num_heads=heads,
        head_dim=head,
        weights=weights,
        state_size=heads * head * head,
        conv_size=3 * inner * (kernel - 1),
        state_flops=7 * heads * head * head,
    )


def lightning(hf: HfFields, *, heads: int, head: int) -> RecurrentConfig:
    """Lightning attention (MiniMax-01, arXiv:2501.08313, sec. 2.2): a state of key times value for each head.

    Times a decay, plus the outer product of key and value, then times the query: 5 a number.
    """
    size, inner = hf.size("hidden_size"), heads * head
    weights: tuple[Outlined, ...] = (
        ("qkv_proj.weight", (3 * inner, size), "attention"),
        ("output_gate.weight", (inner, size), "attention"),
        ("norm.weight", (inner,), "norm"),
        ("out_proj.weight", (size, inner), "attention"),
    )
    return RecurrentConfig(
        num_heads=heads,
        head_dim=head,
        weights=weights,
        state_size=inner * head,
        conv_size=0,
        state_flops=5 * inner * head,
    )
