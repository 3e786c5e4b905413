"""Where a step's gradients are added up: in fp32, in memory that is kept from step to step.

During a step a parameter may carry `grad_buffer` (fp32, of its shape) and `grad_buffer_fresh` (true until the step's
first gradient is in the buffer, whose contents are left over from earlier until then). Operations that know the
attribute write there themselves and give autograd nothing; what autograd does deliver is added by a hook.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moesaic.errors import NonFiniteError
from moesaic.train.precision import Weight


class Gradients:
    """The gradients of one step. Outside of `collecting` the model's parameters are plain ones.

    Buffers are for the large ones whose operations write there (experts, the head), and for everything that the model
    holds in bf16: sums of bf16 gradients over micro-batches would lose what is small beside the sum.
    """

    def __init__(self, weights: Sequence[Weight], written_in_place: Sequence[nn.Parameter]) -> None:
        in_place = set(written_in_place)
        self.weights = tuple(weights)
        self._buffers = {
            weight.parameter: torch.empty_like(weight.master)
            for weight in weights
            if weight.is_rounded or weight.parameter in in_place
        }

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Gradients of backward passes in this block are added up, from nothing.

        They are gone after it, except after a NonFiniteError, whose reason they show: then they are in `.grad`.
        """
        hooks = []
        for parameter, buffer in self._buffers.items():
            vars(parameter).update(grad_buffer=buffer, grad_buffer_fresh=True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_move_to_buffer))
        self._drop()
        try:
            yield
        except NonFiniteError:
            self._show()
            raise
        else:
            self._drop()
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self._buffers:
                del vars(parameter)["grad_buffer"], vars(parameter)["grad_buffer_fresh"]

    def of(self, weight: Weight) -> Tensor | None:
        """The sum so far, None when no gradient has come. The caller may change it: it is not read again."""
        attributes = vars(weight.parameter)
        if "grad_buffer" not in attributes:
            return weight.parameter.grad
        return None if attributes["grad_buffer_fresh"] else attributes["grad_buffer"]

    def norm(self) -> Tensor:
        """The joint 2-norm, as torch.nn.utils.clip_grad_norm_ counts it."""
        found = [gradient for gradient in map(self.of, self.weights) if gradient is not None]
        return nn.utils.get_total_norm(found, foreach=True)

    def _show(self) -> None:
        for weight in self.weights:
            gradient = self.of(weight)
            weight.parameter.grad = None if gradient is None else gradient.to(weight.parameter.dtype)

    def _drop(self) -> None:
        for weight in self.weights:
            weight.parameter.grad = None


def has_buffer(tensor: Tensor) -> bool:
    """Whether its gradient is to be added with `add_gradient`."""
    return "grad_buffer" in vars(tensor)


@torch.no_grad()
def add_gradient(parameter: Tensor, gradient: Tensor, scale: Tensor | float = 1.0) -> None:
    """Add `scale` * `gradient` to the buffer of a parameter that has one."""
    buffer = vars(parameter)["grad_buffer"]
    if vars(parameter)["grad_buffer_fresh"]:
        torch.mul(gradient, scale, out=buffer)
        vars(parameter)["grad_buffer_fresh"] = False
    else:
        buffer.addcmul_(gradient, torch.as_tensor(scale, dtype=buffer.dtype, device=buffer.device))


def _move_to_buffer(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:
        return
    attributes = vars(parameter)
    if attributes["grad_buffer_fresh"]:
        attributes["grad_buffer"].copy_(gradient)
        attributes["grad_buffer_fresh"] = False
    else:
        attributes["grad_buffer"].add_(gradient)
    parameter.grad = None
