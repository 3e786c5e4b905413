"""Our expert compute in transformers' experts registry: `model.set_experts_implementation("moesaic")`.

The weights are read where they are: nothing is packed, copied or kept beside them, but those that are narrowed on
request, in their place. Gradients work as everywhere in
moesaic. T tokens, K choices a token, R rows sorted by expert, E experts, F expert inner, D hidden.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moesaic.errors import ConfigError
from moesaic.experts import dispatch
from moesaic.hub.transformers.modules import as_experts, experts_by_layer
from moesaic.kernels import ops
from moesaic.routing import Rows

NAME = "moesaic"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Model = TypeVar("Model", bound=nn.Module)


def use_moesaic_experts(model: Model, *, narrow: bool = False) -> Model:
    """Have a model's experts computed by moesaic, and return it; `set_experts_implementation` undoes it.

    On CPUs, in fp32 and bf16, for inference and training, with logits that differ from transformers' by rounding only.

    narrow: for inference with a model in fp32. Experts' weights that are all bf16 values, as in checkpoints that were
    released in bf16, are held in bf16 from now on, which is half the memory and half of what decoding reads.
    Activations stay in fp32 and so do products and sums: results are those of the weights in fp32, bit for bit
    wherever our own kernels multiply (`moesaic.kernels.backend.describe()`). A
    tensor with any other value stays in fp32. Other implementations refuse such a model; `model.float()` undoes it,
    exactly. Where gradients are wanted, each call widens the weights for its own time; do not train the weights
    themselves so, whose steps would be rounded.
    Raises ConfigError for a model without experts, or with experts that cannot be read as they are stored.
    """
    experts = experts_by_layer(model)
    for module in experts.values():
        _refuse_unfit(module)
    model.set_experts_implementation(NAME)  # pyright: ignore[reportCallIssue]  of PreTrainedModel
    if narrow:
        for module in experts.values():
            _narrow(module)
    return model


def moesaic_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What `self.experts` gives for T tokens and their choices: y_TD in the dtype of `hidden_states`."""
    experts = as_experts(self)
    _refuse_unfit(self)
    into: Tensor = self.gate_up_proj if experts.has_gate else self.up_proj  # pyright: ignore[reportAssignmentType]
    down: Tensor = self.down_proj  # pyright: ignore[reportAssignmentType]
    rows = _rows(top_k_index, top_k_weights, experts.num_experts, experts._is_expert_parallel)
    x_TD = hidden_states.to(torch.promote_types(hidden_states.dtype, into.dtype))
    inner_RF = _inner(self, dispatch.gather(x_TD, rows), _beside(into, x_TD.dtype), rows)
    out_RD = ops.grouped_linear(inner_RF, _beside(down, x_TD.dtype), rows.expert_offsets)
    out_RD = _plus_bias(self, out_RD, "down_proj_bias", rows)
    if experts.has_post_expert_norm:
        out_RD = self.post_expert_norm(out_RD)  # pyright: ignore[reportCallIssue]
    return dispatch.combine(out_RD, rows).to(hidden_states.dtype)


def _beside(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it can stand beside activations of a dtype: narrow where the kernels widen it in passing."""
    if (weight.dtype, dtype) == (torch.bfloat16, torch.float32) and not torch.is_grad_enabled():
        return weight
    return weight.to(dtype)


def _narrow(self: nn.Module) -> None:
    """Hold in bf16 what is in fp32 and has bf16 values alone: weights, of which a call reads much."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        weight = getattr(self, name, None)
        if isinstance(weight, nn.Parameter) and weight.dtype == torch.float32:
            narrow = weight.detach().bfloat16()
            if all(torch.equal(part.float(), whole) for part, whole in zip(narrow, weight.detach(), strict=True)):
                weight.data = narrow


ALL_EXPERTS_FUNCTIONS.register(NAME, moesaic_experts_forward)


def _rows(expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, is_parallel: bool) -> Rows:
    """Rows sorted by expert. Over several ranks, a choice of another rank's expert is number E: it is left out."""
    if is_parallel:
        expert_ids_TK = torch.where(expert_ids_TK < num_experts, expert_ids_TK, -1)
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    return Rows.from_topk(expert_ids_TK.long(), weights_TK, num_experts, fixed_top_k=not is_parallel)


def _inner(self: nn.Module, x_RD: Tensor, into: Tensor, rows: Rows) -> Tensor:
    """Each row's inner activations [R, F]; gated SiLU, which nearly all have, in one pass with its product."""
    experts = as_experts(self)
    if _is_gated_silu(self):
        return ops.grouped_gated(x_RD, into, rows.expert_offsets)
    name = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
    inner = _plus_bias(self, ops.grouped_linear(x_RD, into, rows.expert_offsets), name, rows)
    return self._apply_gate(inner) if experts.has_gate else self.act_fn(inner)  # pyright: ignore[reportCallIssue]


def _is_gated_silu(self: nn.Module) -> bool:
    experts = as_experts(self)
    plain = experts.has_gate and experts.is_concatenated and not experts.has_bias
    is_default = getattr(type(self), "_apply_gate", None) is _default_apply_gate
    return plain and is_default and type(self.act_fn) in (nn.SiLU, SiLUActivation)


def _plus_bias(self: nn.Module, y_RO: Tensor, name: str, rows: Rows) -> Tensor:
    if not as_experts(self).has_bias:
        return y_RO
    bias_EO: Tensor = getattr(self, name)
    return y_RO + bias_EO[rows.expert_ids_R].to(y_RO.dtype)


def _refuse_unfit(self: nn.Module) -> None:
    experts, weight = as_experts(self), next(self.parameters())
    name = type(self).__name__
    keep = 'keep model.set_experts_implementation("grouped_mm")'
    if experts.is_transposed:
        raise ConfigError(f"{name} stores its weights [experts, in, out] and moesaic reads [experts, out, in]; {keep}")
    if weight.dtype not in DTYPES:
        raise ConfigError(f"{name} has weights in {weight.dtype}; moesaic computes float32 and bfloat16: {keep}")
    if weight.device.type != "cpu":
        raise ConfigError(f"{name} is on {weight.device}; these experts are computed on CPUs: {keep}")
