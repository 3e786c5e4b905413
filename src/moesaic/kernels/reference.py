"""Every hot operation in plain torch: the definition of correct. Slow where plainness costs speed.

Sums and activations of bf16 rows are computed in fp32 and rounded once, at the end.

T tokens, R rows sorted by expert, E experts, K choices, I inputs, O outputs, F expert inner, D hidden.
B batch, S tokens of a row, H heads, G key/value heads, A head dim.
`offsets` is int64 [E+1] on the CPU: expert e owns rows offsets[e] to offsets[e+1].
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from moesaic.config.activation import Activation, ClampedSwiglu
from moesaic.kernels.adam import AdamStep
from moesaic.kernels.blocks import ExpertRows, PackedExperts, PackedMatrices, unpack, whole_numbers
from moesaic.kernels.paged import PagedCache, PagedTokens, round_numbers


def select_topk(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids of each token's `top_k` best experts, best first; among equals the lower id wins. int64 [T, K]."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def sort_rows(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids_R, choice_R, offsets): the pairs (token, choice) sorted by expert, stably. Expert -1 means no row."""
    top_k = expert_ids_TK.shape[1]
    flat = expert_ids_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    order = order[int((flat < 0).sum()) :]
    counts = torch.bincount(flat[order], minlength=num_experts).cpu()
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    return order // top_k, order % top_k, offsets


def gather_rows(x_TD: Tensor, token_ids_R: Tensor) -> Tensor:
    """x_RD: each row's token."""
    return x_TD[token_ids_R]


def combine_rows(out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    """y_TD: each token's rows, times their weights, summed in the order of `row_ids_R` (see Rows.by_token)."""
    counts_T = token_offsets.diff()
    wide = torch.promote_types(out_RD.dtype, weights_R.dtype)
    y_TD = out_RD.new_zeros(counts_T.numel(), out_RD.shape[1], dtype=wide)
    for choice in range(int(counts_T.max()) if counts_T.numel() else 0):
        tokens = (counts_T > choice).nonzero()[:, 0]
        rows = row_ids_R[token_offsets[tokens] + choice]
        y_TD[tokens] += out_RD[rows].to(wide) * weights_R[rows, None].to(wide)
    return y_TD.to(out_RD.dtype)


def combine_rows_grad(dy_TD: Tensor, out_RD: Tensor, weights_R: Tensor, token_ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """(d_out_RD, d_weights_R) of combine_rows."""
    wide = torch.promote_types(out_RD.dtype, weights_R.dtype)
    dy_RD = dy_TD[token_ids_R].to(wide)
    d_out_RD = dy_RD * weights_R[:, None].to(wide)
    return d_out_RD.to(out_RD.dtype), (dy_RD * out_RD.to(wide)).sum(-1).to(weights_R.dtype)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """y_RO: each expert's rows times its own matrix, x @ W[e].T. Weights may be narrower than x: they are widened."""
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    for expert, (start, end) in enumerate(_spans(offsets)):
        if end > start:
            torch.mm(x_RI[start:end], weight_EOI[expert].to(x_RI.dtype).T, out=y_RO[start:end])
    return y_RO


def grouped_linear_input_grad(dy_RO: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """dx_RI: dy @ W[e]."""
    dx_RI = dy_RO.new_empty(dy_RO.shape[0], weight_EOI.shape[2])
    for expert, (start, end) in enumerate(_spans(offsets)):
        if end > start:
            torch.mm(dy_RO[start:end], weight_EOI[expert], out=dx_RI[start:end])
    return dx_RI


def grouped_linear_weight_grad(dy_RO: Tensor, x_RI: Tensor, offsets: Tensor) -> Tensor:
    """dW_EOI: dy.T @ x over each expert's rows; exact zeros for an expert without rows."""
    dw_EOI = dy_RO.new_empty(offsets.numel() - 1, dy_RO.shape[1], x_RI.shape[1])
    for expert, (start, end) in enumerate(_spans(offsets)):
        if end > start:
            torch.mm(dy_RO[start:end].T, x_RI[start:end], out=dw_EOI[expert])
        else:
            dw_EOI[expert].zero_()
    return dw_EOI


def add_grouped_linear_weight_grad(
    dy_RO: Tensor, x_RI: Tensor, offsets: Tensor, sum_EOI: Tensor, accumulate: bool
) -> None:
    """Write dW_EOI into `sum_EOI` (fp32 or wider), or add it to what is there, without rounding it to dy's dtype."""
    wide = sum_EOI.dtype
    dw_EOI = grouped_linear_weight_grad(dy_RO.to(wide), x_RI.to(wide), offsets)
    if accumulate:
        sum_EOI += dw_EOI
    else:
        sum_EOI.copy_(dw_EOI)


def grouped_gated(x_RI: Tensor, gate_up_EGI: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(y_RF, gate_up_RG): silu(gate) * up of each expert's rows times its matrix, and that product, gate then up."""
    gate_up_RG = grouped_linear(x_RI, gate_up_EGI, offsets)
    return silu_mul(gate_up_RG), gate_up_RG


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds gate then up, F each (SwiGLU, arXiv:2002.05202, eq. 6)."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def silu_mul_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    """d_gate_up of silu_mul."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, dy * gate * sigmoid], dim=-1).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """losses_N, -log softmax at the target, in at least fp32; the logits become the gradient of their sum.

    A negative target does not count: its loss and its row become 0.
    """
    ignored_N1 = (targets_N < 0)[:, None]
    targets_N1 = targets_N[:, None].clamp(min=0)
    log_p_NV = torch.log_softmax(_wide(logits_NV), -1)
    log_p_N1 = log_p_NV.gather(1, targets_N1)
    # p - 1 without cancellation where p is near 1
    slope_NV = log_p_NV.exp_().scatter_(1, targets_N1, log_p_N1.expm1())
    logits_NV.copy_(slope_NV.masked_fill_(ignored_N1, 0.0))
    return -log_p_N1.masked_fill(ignored_N1, 0.0)[:, 0]


def causal_attention(q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BSHA, log_sum_BHS): softmax(q k^T / sqrt(A)) v of the tokens up to each, a key/value head for H / G heads.

    `log_sum_BHS` is the logarithm of each softmax's divisor, in at least fp32: what the gradient needs.
    """
    scores_BHSS, (_, _, v) = _causal_scores(q_BSHA, k_BSGA, v_BSGA)
    log_sum_BHS = scores_BHSS.logsumexp(-1)
    out_BHSA = (scores_BHSS - log_sum_BHS[..., None]).exp() @ v
    return out_BHSA.transpose(1, 2).to(q_BSHA.dtype).contiguous(), log_sum_BHS


def causal_attention_grad(
    d_out_BSHA: Tensor, q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor, out_BSHA: Tensor, log_sum_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of causal_attention."""
    scores_BHSS, (q, k, v) = _causal_scores(q_BSHA, k_BSGA, v_BSGA)
    d_out, out = (_wide(tensor).transpose(1, 2) for tensor in (d_out_BSHA, out_BSHA))
    p = (scores_BHSS - log_sum_BHS[..., None]).exp()
    slope = p * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    groups = k_BSGA.shape[2]
    dq, *shared = slope @ k, slope.mT @ q, p.mT @ d_out
    dk, dv = (gradient.unflatten(1, (groups, -1)).sum(2) for gradient in shared)
    dq, dk, dv = (gradient.transpose(1, 2).to(q_BSHA.dtype).contiguous() for gradient in (dq, dk, dv))
    return dq, dk, dv


def _causal_scores(q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(scores_BHSS, wide q, k, v [B, H, S, A]): minus infinity where a token would see a later one."""
    shared = q_BSHA.shape[2] // k_BSGA.shape[2]
    q, k, v = (_wide(tensor).transpose(1, 2) for tensor in (q_BSHA, k_BSGA, v_BSGA))
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, float("-inf")), (q, k, v)


def attention_with_sinks(
    q_BHSA: Tensor,
    k_BGNA: Tensor,
    v_BGNA: Tensor,
    sinks_H: Tensor,
    *,
    visible: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax of [scale q k^T, sink], without the sink's probability, times v, [B, H, S, A]; see kernels/attention."""
    num_queries = q_BHSA.shape[2]
    q, k, v = _wide(q_BHSA), _wide(k_BGNA), _wide(v_BGNA)

    def times(x_BHSX: Tensor, y_BGXY: Tensor) -> Tensor:  # the heads of a group in a row: nothing is copied for them
        together = x_BHSX.unflatten(1, (y_BGXY.shape[1], -1)).flatten(2, 3) @ y_BGXY
        return together.unflatten(2, (-1, num_queries)).flatten(1, 2)

    scores_BHSN = times(q, k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        visible = torch.ones(scores_BHSN.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        scores_BHSN = scores_BHSN.masked_fill(~visible, float("-inf"))
    sinks_BHS1 = sinks_H.to(q.dtype)[:, None, None].expand(*scores_BHSN.shape[:-1], 1)
    p_BHSN = torch.cat([scores_BHSN, sinks_BHS1], dim=-1).softmax(-1)[..., :-1]
    return times(p_BHSN, v).to(q_BHSA.dtype)


def write_cache(cache: PagedCache, tokens: PagedTokens, k_TGA: Tensor, v_TGV: Tensor | None) -> None:
    """Put the keys and values of new tokens where their tables say; v_TGV is None where the cache shares them."""
    ids_T, slots_T = tokens.places()
    if cache.keys.dtype == torch.uint8:
        _write_rounded(cache, (ids_T, slots_T), k_TGA, v_TGV)
        return
    if cache.values is None:
        cache.keys[ids_T, slots_T, : cache.key_dim] = k_TGA[:, 0].to(cache.keys.dtype)
        return
    assert v_TGV is not None, "values"
    cache.keys[ids_T, :, :, slots_T] = k_TGA.to(cache.keys.dtype)
    cache.values[ids_T, :, slots_T, : cache.value_dim] = v_TGV.to(cache.values.dtype)


def _write_rounded(cache: PagedCache, places: tuple[Tensor, Tensor], k_TGA: Tensor, v_TGV: Tensor | None) -> None:
    ids_T, slots_T = places
    keys, key_scales_NGCS = cache.rounded_keys
    k_TGA, key_scales_NGCS[ids_T, :, :, slots_T] = round_numbers(k_TGA)
    if cache.values is None:
        keys[ids_T, :, slots_T, : cache.key_dim] = k_TGA
        return
    assert v_TGV is not None, "values"
    keys[ids_T, :, :, slots_T] = k_TGA
    values_NGSV, value_scales_NGCS = cache.rounded_values
    v_TGV, value_scales_NGCS[ids_T, :, :, slots_T] = round_numbers(v_TGV)
    values_NGSV[ids_T, :, slots_T, : cache.value_dim] = v_TGV


def paged_attention(
    q_THA: Tensor,
    cache: PagedCache,
    tokens: PagedTokens,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """out_THV: softmax attention of each token to what its sequence has cached up to its own position.

    Of these to the last `window`, or to those of its own chunk; scale and sinks_H: see kernels/attention. What the
    tokens themselves bring must have been written.
    """
    out_THV = q_THA.new_empty(*q_THA.shape[:2], cache.value_dim)
    for token, q_HA in enumerate(_wide(q_THA)):
        places = tokens.seen_by(token, window=window, chunk=chunk)
        k_NGA, v_NGV = cache.keys_at(*places).to(q_HA.dtype), cache.values_at(*places).to(q_HA.dtype)
        scores_HN = torch.einsum("gha,nga->ghn", q_HA.unflatten(0, (cache.num_groups, -1)), k_NGA).flatten(0, 1) * scale
        if sinks_H is not None:
            scores_HN = torch.cat([scores_HN, sinks_H[:, None].to(scores_HN.dtype)], dim=-1)
        p_HN = scores_HN.softmax(-1)[:, : len(k_NGA)]
        out_THV[token] = torch.einsum("ghn,ngv->ghv", p_HN.unflatten(0, (cache.num_groups, -1)), v_NGV).flatten(0, 1)
    return out_THV


def rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin) of each head's halves x1, x2; cos and sin are [B or 1, S, 1, A].

    sign: -1 turns back. Products of bf16 heads are taken in fp32 and rounded once.
    """
    half = x_BSHA.shape[-1] // 2
    wide, cos, sin = _wide(x_BSHA), _wide(cos), _wide(sin)[..., :half] * sign
    first, second = wide[..., :half], wide[..., half:]
    turned = torch.cat([first * cos[..., :half] - second * sin, second * cos[..., half:] + first * sin], dim=-1)
    return turned.to(x_BSHA.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, inverse): x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467, eq. 4).

    `inverse` is what each row was multiplied by, in at least fp32 [...], and what the gradient needs.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * inverse[..., None] * weight.to(wide.dtype)).to(x.dtype), inverse


def rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, d_weight) of rms_norm."""
    wide, d_wide = x.to(inverse.dtype), dy.to(inverse.dtype)
    scaled = wide * inverse[..., None]
    d_scaled = d_wide * weight.to(inverse.dtype)
    dx = (d_scaled - scaled * (d_scaled * scaled).mean(-1, keepdim=True)) * inverse[..., None]
    d_weight = (d_wide * scaled).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), d_weight.to(weight.dtype)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamStep,
    *,
    rounded: Tensor | None = None,
    average: Tensor | None = None,
) -> None:
    """Move an fp32 weight and its moments in place by AdamW (arXiv:1711.05101, alg. 2); see AdamStep.

    Where given, `rounded` becomes the moved weight in its own dtype and `average` takes it in.
    """
    first, second = moments
    slope = gradient * step.clip
    first.lerp_(slope, step.fresh1)
    second.mul_(step.beta2).addcmul_(slope, slope, value=step.fresh2)
    root = (second.sqrt() / step.second_root).add_(step.eps)
    weight.mul_(step.kept).addcdiv_(first, root, value=-step.rate)
    if rounded is not None:
        rounded.copy_(weight)
    if average is not None:
        average.lerp_(weight, step.newest)


def packed_linear(x_RI: Tensor, packed: PackedMatrices, offsets: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    """y_RO in fp32: each expert's rows (fp32) times its own packed matrix, and its bias.

    bf16 and fp8 weights multiply rows rounded to bf16, numbers of few bits (int8, int4, mxfp4, uneven4) rows rounded to
    8 bits; both are summed in fp32, whole numbers exactly within a group. A row with a number that is not finite
    becomes NaN.
    """
    y_RO = _packed_product(x_RI, packed, offsets)
    return y_RO if bias_EO is None else y_RO + bias_EO.repeat_interleave(offsets.diff(), dim=0)


def add_packed_linear(
    x_RI: Tensor,
    packed: PackedMatrices,
    offsets: Tensor,
    sum_RO: Tensor,
    multiplier: float,
    bias_EO: Tensor | None = None,
) -> None:
    """sum_RO += multiplier * packed_linear(...)."""
    sum_RO.add_(packed_linear(x_RI, packed, offsets, bias_EO), alpha=multiplier)


def packed_experts(
    x_TD: Tensor, experts: PackedExperts, rows: ExpertRows | None, out_TD: Tensor, multiplier: float = 1.0
) -> None:
    """out_TD += multiplier * what the experts make of each token (fp32), choices added in their order.

    Without rows every token is a row of the one expert, with weight 1. Weights multiply what comes out of an expert, or
    with `weight_on_input` what goes in (Llama 4).
    """
    tokens = torch.arange(len(x_TD))[:, None]
    if rows is None:
        rows = ExpertRows(torch.tensor([0, len(x_TD)]), x_TD.new_ones(len(x_TD)), tokens)
    chosen_TK = rows.row_of_TK >= 0
    row_ids = rows.row_of_TK[chosen_TK]
    x_RD = x_TD.new_zeros(len(rows.weights_R), x_TD.shape[1])
    x_RD[row_ids] = x_TD[tokens.expand_as(chosen_TK)[chosen_TK]]
    if rows.weight_on_input:
        x_RD *= rows.weights_R[:, None]
    into_RG = packed_linear(x_RD, experts.into, rows.offsets, experts.into_bias_EG)
    h_RF = _activated(into_RG, experts.activation, gated=experts.into.shape.paired)
    y_RD = packed_linear(h_RF, experts.down, rows.offsets, experts.down_bias_ED)
    if not rows.weight_on_input:
        y_RD *= rows.weights_R[:, None]
    sum_TD = torch.zeros_like(x_TD)
    for row_of_T, chosen_T in zip(rows.row_of_TK.T, chosen_TK.T, strict=True):
        sum_TD[chosen_T] += y_RD[row_of_T[chosen_T]]
    out_TD.add_(sum_TD, alpha=multiplier)


def _activated(x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """The activation, or its product with the second half of the last dimension."""
    if isinstance(activation, ClampedSwiglu):
        gate, up = x.chunk(2, dim=-1)
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + activation.shift) * gate * torch.sigmoid(activation.alpha * gate)
    function = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_new": partial(torch.nn.functional.gelu, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda wide: torch.relu(wide).square(),
    }[activation]
    if not gated:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up


def _packed_product(x_RI: Tensor, packed: PackedMatrices, offsets: Tensor) -> Tensor:
    shape = packed.shape
    if shape.format in ("fp32", "bf16", "fp8"):
        rows = x_RI if shape.format == "fp32" else x_RI.bfloat16().float()
        return grouped_linear(rows, unpack(packed), offsets)
    numbers_EOI, scales_EOG = whole_numbers(packed)
    bytes_RI, scales_RG = rounded_rows(x_RI, shape.scale_group)
    y_RO = x_RI.new_empty(len(x_RI), shape.outputs)
    for expert, (start, end) in enumerate(_spans(offsets)):
        total = x_RI.new_zeros(end - start, shape.outputs)
        for group, first in enumerate(range(0, shape.inputs, shape.scale_group)):
            inputs = slice(first, first + shape.scale_group)
            exact = bytes_RI[start:end, inputs].double() @ numbers_EOI[expert, :, inputs].double().T
            total += exact.float() * (scales_EOG[expert, :, group] * scales_RG[start:end, group, None])
        y_RO[start:end] = total
    return y_RO


def rounded_rows(x_RI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows as int8 [R, I] and a scale for each `group` of inputs [R, G]: the largest magnitude becomes 127.

    Rounded to the nearest, ties to even. The scale of a group with a number that is not finite is NaN.
    """
    padded = torch.nn.functional.pad(x_RI, (0, -x_RI.shape[1] % group)).unflatten(1, (-1, group))
    largest = padded.abs().amax(-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    values = (padded * inverse[..., None]).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    scales = largest / 127.0 + (padded * 0.0).sum(-1)
    return values.flatten(1)[:, : x_RI.shape[1]], scales


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(pairwise(bounds))
