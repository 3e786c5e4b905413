"""Where a NaN starts: the first weight, output or gradient of a model that is not finite.

B batch, S sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.models.build import Model
from moesaic.routing import RoutingDecision
from moesaic.train.micro_batches import Source


class _NotFiniteError(Exception):
    """Ends the forward pass at the first thing that is not finite; the text says what and where."""


@torch.no_grad()
def first_nonfinite(
    model: Model,
    inputs_BS: Tensor,
    document_ids_BS: Tensor | None = None,
    *,
    mask_BS: Tensor | None = None,
    source: Source | None = None,
) -> str:
    """Names, in order of execution, the first module of which a weight or an output is not finite.

    For example "layers.3.feed_forward.experts: weight gate_up is nan" or "layers.2.attention: output is inf". Where
    all are finite it names the gradient (as the backward pass left it) nearest to the loss that is not; where those
    are finite too, the loss. Runs the model once, without gradients; its hooks are gone when it returns.
    """
    try:
        with _checked(model):
            beside: dict[str, Any] = {"document_ids_BS": document_ids_BS} if source is None else source._asdict()
            hidden_BSD = model.hidden(inputs_BS, mask_BS, **beside)
        _check("the head", "weight", model.head_weight)
        for row_SD in hidden_BSD:
            _check("the head", "output", model.logits(row_SD))
    except _NotFiniteError as found:
        return str(found)
    # Outputs may hide a broken weight: an expert that no token reached, or one behind a kernel that skips hooks.
    return _first_weight(model) or _first_gradient(model) or "the loss: every weight, output and gradient is finite"


@contextmanager
def _checked(model: Model) -> Iterator[None]:
    names = dict(model.named_modules())
    handles = []
    for name, module in names.items():
        handles.append(module.register_forward_pre_hook(_weights_check(name)))
        handles.append(module.register_forward_hook(_output_check(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights_check(name: str) -> Any:
    def check(module: nn.Module, _: Any) -> None:
        _check_weights(name, module, recurse=False)

    return check


def _output_check(name: str) -> Any:
    def check(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, RoutingDecision):
            output = output.logits_TE
        if isinstance(output, Tensor) and _fault(output):
            _check_weights(name, module, recurse=True)  # a part that was called past its hooks
            _check(name, "output", output)

    return check


def _check_weights(name: str, module: nn.Module, *, recurse: bool) -> None:
    for kind, tensors in (
        ("weight", module.named_parameters(recurse=recurse)),
        ("buffer", module.named_buffers(recurse=recurse)),
    ):
        for tensor_name, tensor in tensors:
            parent, _, leaf = tensor_name.rpartition(".")
            _check(".".join(filter(None, (name, parent))), f"{kind} {leaf}", tensor)


def _check(where: str, what: str, tensor: Tensor) -> None:
    fault = _fault(tensor)
    if fault:
        raise _NotFiniteError(f"{where or 'the model'}: {what} is {fault}")


def _fault(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or torch.isfinite(tensor).all():
        return None
    return "nan" if torch.isnan(tensor).any() else "inf"


def _first_weight(model: Model) -> str | None:
    try:
        _check_weights("", model, recurse=True)
    except _NotFiniteError as found:
        return str(found)
    return None


def _first_gradient(model: Model) -> str | None:
    """The last parameter of the model with a broken gradient: backward came there first."""
    for name, parameter in reversed(list(model.named_parameters())):
        for gradient in (parameter.grad, getattr(parameter, "grad_buffer", None)):
            fault = _fault(gradient) if gradient is not None else None
            if fault:
                return f"the gradient of {name} is {fault}"
    return None
