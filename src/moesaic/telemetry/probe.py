"""Asks every expert the same questions: what each layer's experts answer for the same tokens, chosen or not.

B batch, S sequence, T tokens, P tokens of a probe, D hidden, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layers.moe import MoeLayer
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision, RoutingTape
from moesaic.telemetry.likeness import Duplicate, duplicates

PROBE_TOKENS = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProbe:
    """One layer at a batch: what its router saw, x_TD (tokens that count only), and what it decided for the batch."""

    layer: int
    module: MoeLayer
    x_TD: Tensor
    decision: RoutingDecision

    @torch.no_grad()
    def outputs(self, num_tokens: int = PROBE_TOKENS) -> Tensor:
        """What every expert gives for the same tokens, evenly taken, [E, P, D] in fp32."""
        x_PD = self.x_TD[:: max(1, -(-len(self.x_TD) // num_tokens))]
        experts, num_experts = self.module.experts, self.module.router.config.num_experts
        offsets = torch.arange(num_experts + 1) * len(x_PD)
        was_training = experts.training
        experts.eval()
        out_RD = experts(x_PD.repeat(num_experts, 1), offsets)
        experts.train(was_training)
        return out_RD.view(num_experts, len(x_PD), -1).float()

    def duplicates(self) -> tuple[Duplicate, ...]:
        """Experts that answer the same (see `likeness.duplicates`)."""
        weight = self.module.router.weight
        router_ED = None if weight is None else weight.detach()[: self.module.router.config.num_experts].float()
        return duplicates(self.outputs().cpu().numpy(), None if router_ED is None else router_ED.cpu().numpy())


@torch.no_grad()
def probe(model: Decoder, token_ids_BS: Tensor, mask_BS: Tensor | None = None, **places: Any) -> dict[int, LayerProbe]:
    """Run the model over a batch as in evaluation, and keep what each routed layer saw. places: as `Decoder.hidden`."""
    was_training, tape = model.training, RoutingTape()
    model.eval()
    try:
        with _listening(model) as seen:
            model.hidden(token_ids_BS, mask_BS, tape=tape, **places)
    finally:
        model.train(was_training)
    kept = None if mask_BS is None else mask_BS.reshape(-1)
    return {
        module.layer: LayerProbe(
            layer=module.layer,
            module=module,
            x_TD=x_TD if kept is None else x_TD[kept],
            decision=tape.decisions[module.layer],
        )
        for module, x_TD in seen.items()
    }


def routed_layers(model: nn.Module) -> dict[int, MoeLayer]:
    """The layers that route, by their number."""
    return {module.layer: module for module in model.modules() if isinstance(module, MoeLayer)}


@contextmanager
def _listening(model: nn.Module) -> Iterator[dict[MoeLayer, Tensor]]:
    """What each routed layer is given in this block, [T, D], by layer."""
    seen: dict[MoeLayer, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, MoeLayer)
        seen[module] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

    handles = [layer.register_forward_pre_hook(keep) for layer in routed_layers(model).values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
