"""Trades time for memory: a layer's activations are not kept for the backward pass but computed again in it.

The recomputation never routes: it takes the experts that the forward chose and only weighs them anew, so that a
selection bias that has moved meanwhile, or a score that rounds otherwise, cannot send a token elsewhere.

B batch, S sequence, D hidden.
"""

from dataclasses import replace
from types import MethodType
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.layers.attention import Sight
from moesaic.layers.compressed_state import CompressedState
from moesaic.layers.kv_cache import LayerState
from moesaic.models.build import Model
from moesaic.models.decoder import DecoderLayer
from moesaic.routing import RoutingDecision, RoutingTape, TokenFacts


class _FirstHearing(RoutingTape):
    """Passes a layer's decision on to the listener, and dictates its choices to every later run of that layer."""

    def __init__(self, listener: RoutingTape | None) -> None:
        super().__init__(listener.replay if listener else None, choices=dict(listener.choices) if listener else None)
        self.listener = listener

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        # Without the weights: their graph would keep what the recomputation is there to let go.
        self.choices[layer] = replace(decision.chosen, weights_R=decision.chosen.weights_R.detach())
        if self.listener is not None:
            self.listener.hear(layer, decision)


def _forward(
    self: DecoderLayer,
    x_BSD: Tensor,
    sight: Sight,
    state: LayerState | CompressedState | None,
    facts: TokenFacts,
    tape: RoutingTape | None,
) -> Tensor:
    """DecoderLayer.forward, remembering its inputs and choices only. A cache's state is written once, so never here."""
    plain = type(self).forward
    if not self.training or not torch.is_grad_enabled() or state is not None:
        return plain(self, x_BSD, sight, state, facts, tape)
    first = _FirstHearing(tape)
    y_BSD = checkpoint(plain, self, x_BSD, sight, None, facts, first, use_reentrant=False)
    # Heard once; and a tape keeps decisions, whose graph keeps `first`: a circle that no garbage collector sees.
    first.listener = None
    return y_BSD  # pyright: ignore[reportReturnType]


class Recomputation:
    """That a model recomputes its layers, until `remove` or the end of a `with` block."""

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self._layers = layers

    def remove(self) -> None:
        """Give every layer its ordinary forward back."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def recompute_layers(model: Model) -> Recomputation:
    """Keep only each layer's input while training, and compute its activations again in backward (arXiv:1604.06174).

    Results and gradients are the same bits; routing is neither chosen nor heard a second time. Names in the
    state dict do not change, and a copy of the model recomputes its own layers.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, DecoderLayer)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # a bound method: deepcopy binds it to the copy
    return Recomputation(layers)
