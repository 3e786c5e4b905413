"""Softmax attention: the compiled kernel for whole causal rows, else torch's, with bf16's backward pass in fp32.

B batch, S queries, N keys, H heads, G key/value heads, A head dim.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import backend, reference


def attention(
    q_BHSA: Tensor, k_BGNA: Tensor, v_BGNA: Tensor, *, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(A)) v, [B, H, S, A]; a key/value head serves H / G query heads in a row.

    visible: bool, broadcast to [B, H, S, N], what each query sees; or `causal`; or neither: everything.
    """
    groups = q_BHSA.shape[1] // k_BGNA.shape[1]
    if causal and visible is None and _kernel_takes(q_BHSA, k_BGNA, v_BGNA):
        q_BSHA, k_BSGA, v_BSGA = (tensor.transpose(1, 2) for tensor in (q_BHSA, k_BGNA, v_BGNA))
        return _Causal.apply(q_BSHA, k_BSGA, v_BSGA).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
    if _slow_in_torch(q_BHSA, k_BGNA, v_BGNA):
        if groups > 1:
            k_BGNA, v_BGNA = k_BGNA.repeat_interleave(groups, dim=1), v_BGNA.repeat_interleave(groups, dim=1)
        return _WideBackward.apply(q_BHSA, k_BGNA, v_BGNA, visible, causal)  # pyright: ignore[reportReturnType]
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHSA, k_BGNA, v_BGNA, attn_mask=visible, is_causal=causal, enable_gqa=groups > 1
    )


def _kernel_takes(q_BHSA: Tensor, *keys_and_values: Tensor) -> bool:
    """Whether the compiled kernel serves these; without it, torch's attention needs less memory than our reference."""
    if torch.compiler.is_compiling() or backend.kernels is reference:
        return False
    if not q_BHSA.is_cpu or q_BHSA.dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(tensor.dtype == q_BHSA.dtype and tensor.shape[2] == q_BHSA.shape[2] for tensor in keys_and_values)


class _Causal(torch.autograd.Function):
    """Causal attention of whole rows by the backend's kernels, heads beside heads: [B, S, H, A]."""

    @staticmethod
    def forward(ctx: Any, q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor) -> Tensor:
        out_BSHA, log_sum_BHS = backend.kernels.causal_attention(q_BSHA, k_BSGA, v_BSGA)
        ctx.save_for_backward(q_BSHA, k_BSGA, v_BSGA, out_BSHA, log_sum_BHS)
        return out_BSHA

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor, ...]:
        return backend.kernels.causal_attention_grad(d_out[0], *ctx.saved_tensors)


def _slow_in_torch(*inputs: Tensor) -> bool:
    """bf16 with a gradient on a CPU: torch's backward pass takes twice as long as its own in fp32 does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if any(tensor.dtype != torch.bfloat16 or not tensor.is_cpu for tensor in inputs):
        return False
    return any(tensor.requires_grad for tensor in inputs)


class _WideBackward(torch.autograd.Function):
    """Forward in bf16, backward in fp32: quicker here, and more exact. As many key/value heads as query heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(visible, q.dtype)
        )
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, out, log_sum, visible)
        return out

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, visible = ctx.saved_tensors
        wide = [tensor.float() for tensor in (d_out[0], q, k, v, out)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, log_sum, 0.0, ctx.causal, attn_mask=_additive(visible, torch.float32)
        )
        return *(gradient.to(q.dtype) for gradient in gradients), None, None


def _additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
