"""Softmax attention: the compiled kernel for whole causal rows, else torch's, with bf16's backward pass in fp32.

A head's sink is a logit that takes part in its softmax and stands for no value. It multiplies the outputs by its
complement's share; with these outputs and the larger divisor, the backward passes are right as they are.

B batch, S queries, N keys, H heads, G key/value heads, A head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.kernels import backend, reference


def attention(
    q_BHSA: Tensor,
    k_BGNA: Tensor,
    v_BGNA: Tensor,
    *,
    visible: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    bias_BHSN: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v, [B, H, S, A]; a key/value head serves H / G query heads in a row.

    visible: bool, broadcast to [B, H, S, N], what each query sees; or `causal`; or neither: everything.
    scale: None is 1/sqrt(A). sinks_H: a further logit of each head, which takes its share of the softmax and adds
    nothing (gpt-oss, arXiv:2508.10925). Values may be wider or narrower than keys, and so is what comes out.
    bias_BHSN: added to the scores; B is 1 where all rows share it.
    """
    if bias_BHSN is not None:
        assert sinks_H is None, "sinks beside a bias"
        return _biased(q_BHSA, k_BGNA, v_BGNA, bias_BHSN, visible=visible, causal=causal, scale=scale)
    if k_BGNA.shape[-1] != v_BGNA.shape[-1]:
        return _of_unlike_widths(q_BHSA, k_BGNA, v_BGNA, visible=visible, causal=causal, scale=scale, sinks_H=sinks_H)
    groups = q_BHSA.shape[1] // k_BGNA.shape[1]
    if causal and visible is None and _kernel_takes(q_BHSA, k_BGNA, v_BGNA) and _is_exact(scale, q_BHSA):
        q_BHSA = q_BHSA if scale is None else q_BHSA * (scale * math.sqrt(q_BHSA.shape[-1]))
        q_BSHA, k_BSGA, v_BSGA = (tensor.transpose(1, 2) for tensor in (q_BHSA, k_BGNA, v_BGNA))
        out_BSHA: Any = _Causal.apply(q_BSHA, k_BSGA, v_BSGA, sinks_H)
        return out_BSHA.transpose(1, 2)
    on_cpu = q_BHSA.is_cpu and not torch.compiler.is_compiling()
    if (sinks_H is not None and on_cpu) or _slow_in_torch(q_BHSA, k_BGNA, v_BGNA):
        k_BHNA, v_BHNA = _for_every_head(k_BGNA, groups), _for_every_head(v_BGNA, groups)
        out_BHSA: Any = _WideBackward.apply(q_BHSA, k_BHNA, v_BHNA, sinks_H, visible, causal, scale)
        return out_BHSA
    if sinks_H is not None:
        return reference.attention_with_sinks(
            q_BHSA, k_BGNA, v_BGNA, sinks_H, visible=visible, causal=causal, scale=scale
        )
    if (
        q_BHSA.is_cuda and visible is not None
    ):  # torch's only kernel with masks knows no shared heads, and would be slow
        k_BGNA, v_BGNA, groups = _for_every_head(k_BGNA, groups), _for_every_head(v_BGNA, groups), 1
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHSA, k_BGNA, v_BGNA, attn_mask=visible, is_causal=causal, enable_gqa=groups > 1, scale=scale
    )


def _for_every_head(x_BGNA: Tensor, groups: int) -> Tensor:
    """Each head G repeated for `groups` query heads; a single one is not copied for that."""
    if x_BGNA.shape[1] == 1:
        return x_BGNA.expand(-1, groups, -1, -1)
    return x_BGNA.repeat_interleave(groups, dim=1) if groups > 1 else x_BGNA


def _biased(
    q_BHSA: Tensor,
    k_BGNA: Tensor,
    v_BGNA: Tensor,
    bias_BHSN: Tensor,
    *,
    visible: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """By torch's attention, to which a bias is a mask with a gradient."""
    if causal:
        visible = torch.ones(bias_BHSN.shape[-2:], dtype=torch.bool, device=bias_BHSN.device).tril()
    if visible is not None:
        bias_BHSN = bias_BHSN.masked_fill(~visible, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHSA,
        k_BGNA,
        v_BGNA,
        attn_mask=bias_BHSN.to(q_BHSA.dtype),
        enable_gqa=q_BHSA.shape[1] != k_BGNA.shape[1],
        scale=scale,
    )


def _of_unlike_widths(
    q_BHSA: Tensor, k_BGNA: Tensor, v_BGNA: Tensor, *, scale: float | None, **settings: Any
) -> Tensor:
    """Zeros fill the narrower of keys and values: kernels that keep no S * N scores know one width only."""
    key_dim, value_dim = k_BGNA.shape[-1], v_BGNA.shape[-1]
    width = max(key_dim, value_dim)
    q, k, v = (pad(part, (0, width - part.shape[-1])) for part in (q_BHSA, k_BGNA, v_BGNA))
    scale = key_dim**-0.5 if scale is None and width > key_dim else scale
    return attention(q, k, v, scale=scale, **settings)[..., :value_dim]


def _kernel_takes(q_BHSA: Tensor, *keys_and_values: Tensor) -> bool:
    """Whether the compiled kernel serves these; without it, torch's attention needs less memory than our reference."""
    if torch.compiler.is_compiling() or backend.kernels is reference:
        return False
    if not q_BHSA.is_cpu or q_BHSA.dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(tensor.dtype == q_BHSA.dtype and tensor.shape[2] == q_BHSA.shape[2] for tensor in keys_and_values)


def _is_exact(scale: float | None, q_BHSA: Tensor) -> bool:
    """Whether queries can be brought to the kernel's own scale, 1/sqrt(A), without rounding them anew.

    fp32 may: its rounding is that of any product. bf16 may by powers of two.
    """
    if scale is None or q_BHSA.dtype != torch.bfloat16:
        return True
    return math.frexp(scale * math.sqrt(q_BHSA.shape[-1]))[0] == 0.5


class _Causal(torch.autograd.Function):
    """Causal attention of whole rows by the backend's kernels, heads beside heads: [B, S, H, A]."""

    @staticmethod
    def forward(ctx: Any, q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor, sinks_H: Tensor | None) -> Tensor:
        out_BSHA, log_sum_BHS = backend.kernels.causal_attention(q_BSHA, k_BSGA, v_BSGA)
        if sinks_H is not None:
            out_BHSA, log_sum_BHS = _sink(out_BSHA.transpose(1, 2), log_sum_BHS, sinks_H)
            out_BSHA = out_BHSA.transpose(1, 2).contiguous()
        ctx.save_for_backward(q_BSHA, k_BSGA, v_BSGA, out_BSHA, log_sum_BHS, sinks_H)
        return out_BSHA

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks_H = ctx.saved_tensors
        gradients = backend.kernels.causal_attention_grad(d_out[0], *saved)
        if sinks_H is None:
            return *gradients, None
        *_, out_BSHA, log_sum_BHS = saved
        return *gradients, _sinks_grad(d_out[0].transpose(1, 2), out_BSHA.transpose(1, 2), log_sum_BHS, sinks_H)


def _sink(out_BHSA: Tensor, log_sum_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and the logarithms of the softmaxes' divisors, once the sinks have taken their share."""
    with_sink_BHS = torch.logaddexp(log_sum_BHS, sinks_H.to(log_sum_BHS.dtype)[:, None])
    share_BHS = (log_sum_BHS - with_sink_BHS).exp()
    return (out_BHSA * share_BHS[..., None]).to(out_BHSA.dtype), with_sink_BHS


def _sinks_grad(d_out_BHSA: Tensor, out_BHSA: Tensor, log_sum_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """d_sinks_H: a larger sink scales every output down by its probability."""
    wide = log_sum_BHS.dtype
    probability_BHS = (sinks_H.to(wide)[:, None] - log_sum_BHS).exp()
    along_BHS = (d_out_BHSA.to(wide) * out_BHSA.to(wide)).sum(-1)
    return -(probability_BHS * along_BHS).sum((0, 2)).to(sinks_H.dtype)


def _slow_in_torch(*inputs: Tensor) -> bool:
    """bf16 with a gradient on a CPU: torch's backward pass takes twice as long as its own in fp32 does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if any(tensor.dtype != torch.bfloat16 or not tensor.is_cpu for tensor in inputs):
        return False
    return any(tensor.requires_grad for tensor in inputs)


class _WideBackward(torch.autograd.Function):
    """Forward in bf16, backward in fp32: quicker here, and more exact. As many key/value heads as query heads.

    fp32 and fp64 stay what they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        visible: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        """out [B, H, S, A] in bf16; what backward needs is kept."""
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(visible, q.dtype), scale=scale
        )
        if sinks_H is not None:
            out, log_sum = _sink(out, log_sum, sinks_H)
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(q, k, v, out, log_sum, sinks_H, visible)
        return out

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, sinks_H, visible = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(tensor.to(wide) for tensor in (d_out[0], q, k, v, out)),
            log_sum,
            0.0,
            ctx.causal,
            attn_mask=_additive(visible, wide),
            scale=ctx.scale,
        )
        d_sinks_H = None if sinks_H is None else _sinks_grad(d_out[0], out, log_sum, sinks_H)
        return *(gradient.to(q.dtype) for gradient in gradients), d_sinks_H, None, None, None


def _additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
