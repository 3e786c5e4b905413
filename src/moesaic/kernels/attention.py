"""Softmax attention for training: torch's own, with the backward pass of bf16 taken in fp32.

B batch, S queries, N keys, H heads, G key/value heads, A head dim.
"""

from typing import Any

import torch
from torch import Tensor


def attention(
    q_BHSA: Tensor, k_BGNA: Tensor, v_BGNA: Tensor, *, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(A)) v, [B, H, S, A]; a key/value head serves H / G query heads in a row.

    visible: bool, broadcast to [B, H, S, N], what each query sees; or `causal`; or neither: everything.
    """
    groups = q_BHSA.shape[1] // k_BGNA.shape[1]
    if _slow_in_torch(q_BHSA, k_BGNA, v_BGNA):
        if groups > 1:
            k_BGNA, v_BGNA = k_BGNA.repeat_interleave(groups, dim=1), v_BGNA.repeat_interleave(groups, dim=1)
        return _WideBackward.apply(q_BHSA, k_BGNA, v_BGNA, visible, causal)  # pyright: ignore[reportReturnType]
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHSA, k_BGNA, v_BGNA, attn_mask=visible, is_causal=causal, enable_gqa=groups > 1
    )


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
