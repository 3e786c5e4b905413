"""The Mixture-of-Experts layer: router → rows → experts (+ shared) → sum. The heart, one screen.

B batch, S sequence, T = B*S tokens, D hidden, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from moesaic.config import CapacityConfig, MoeConfig
from moesaic.errors import ConfigError, TraceError
from moesaic.experts import padded
from moesaic.experts.grouped import GroupedExperts
from moesaic.layers.mlp import Mlp
from moesaic.layers.router import RouterLayer
from moesaic.routing import RoutingDecision, RoutingTape, TokenFacts
from moesaic.routing.capacity import limit


class MoeLayer(nn.Module):
    """Sends every token to a few experts and sums their weighted outputs (arXiv:1701.06538, eq. 1).

    A capacity holds while training, and where `capacity_applied` says so; otherwise that of evaluation, if there is
    one.
    """

    def __init__(self, config: MoeConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.capacity, self.evaluation_capacity = config.capacity, config.evaluation_capacity
        self.is_limited_in_evaluation = False
        self.router = RouterLayer(config.router, hidden_size)
        self.experts = GroupedExperts(config, hidden_size)
        self.shared_experts = Mlp(config.shared, hidden_size) if config.shared else None
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if config.shared_gate else None

    def forward(self, x_BSD: Tensor, facts: TokenFacts | None = None, tape: RoutingTape | None = None) -> Tensor:
        """y_BSD. Tokens that `facts` masks reach no routed expert. `tape` hears the decision or dictates it."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        decision = self._decide(x_TD, facts or TokenFacts(), tape)
        if tape is not None:
            tape.hear(self.layer, decision)
        y_TD = self._experts(x_TD, decision)
        if self.shared_experts is not None:
            y_TD = y_TD + self._shared(self.shared_experts, x_TD, decision.shared_weight_T)
        return y_TD.view_as(x_BSD)

    def _decide(self, x_TD: Tensor, facts: TokenFacts, tape: RoutingTape | None) -> RoutingDecision:
        replayed = tape.replay.get(self.layer) if tape is not None else None
        if replayed is not None and replayed.num_tokens != len(x_TD):
            raise TraceError(
                f"layer {self.layer} replays the rows of {replayed.num_tokens} tokens and this batch has {len(x_TD)}; "
                "give the batches that were recorded, in their order"
            )
        choices = tape.choices.get(self.layer) if tape is not None else None
        decision = self.router(x_TD, facts, choices, is_replayed=replayed is not None)
        limits = self._limits
        if replayed is not None:
            if limits is not None and limits.overflow == "shared":
                raise ConfigError(
                    f'layer {self.layer} replays rows with capacity overflow="shared", whose weights rows do not hold; '
                    "replay without a capacity (model.eval()), or dictate what was chosen (RoutingTape(choices=...))"
                )
            # Taken as they are, so there is nothing before a capacity, nor slots to pad.
            return replace(decision, rows=replayed)
        return limit(decision, limits, self.router.config, self.router.selection_bias) if limits else decision

    @property
    def _limits(self) -> CapacityConfig | None:
        """The capacity that holds now."""
        return self.capacity if self.training or self.is_limited_in_evaluation else self.evaluation_capacity

    def _experts(self, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
        if self._limits is not None and self._limits.pad and decision.slots is not None:
            return padded.compute(self.experts, x_TD, decision.rows, decision.slots)
        return self.experts.compute(x_TD, decision.rows)

    def _shared(self, experts: Mlp, x_TD: Tensor, extra_weight_T: Tensor | None) -> Tensor:
        """The shared expert's output, times its gate, and once more as much as overflowed to it."""
        shared_TD = experts(x_TD)
        weight_T1 = 1 if self.shared_gate is None else self.shared_gate(x_TD).sigmoid()
        if extra_weight_T is not None:
            weight_T1 = weight_T1 + extra_weight_T[:, None]
        return shared_TD if isinstance(weight_T1, int) else (shared_TD * weight_T1).to(shared_TD.dtype)


@contextmanager
def capacity_applied(model: nn.Module) -> Iterator[bool]:
    """Evaluation inside the `with` block drops rows as training does. Yields whether any layer has a capacity.

    What this costs is the capacity gap; budgets are those of the batches that are evaluated.
    """
    limited = [module for module in model.modules() if isinstance(module, MoeLayer) and module.capacity is not None]
    before = [layer.is_limited_in_evaluation for layer in limited]
    for layer in limited:
        layer.is_limited_in_evaluation = True
    try:
        yield bool(limited)
    finally:
        for layer, was_limited in zip(limited, before, strict=True):
            layer.is_limited_in_evaluation = was_limited
