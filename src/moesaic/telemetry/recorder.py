"""Listens to routing and counts: rows per expert, rows dropped, tokens and router entropy, over whole steps.

B batch, T tokens, E experts, M domains.
"""

from collections.abc import Collection
from typing import Self

import numpy as np
from torch import Tensor

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, RoutingTape, Rows
from moesaic.telemetry.heard import Heard, alike, listen
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.telemetry.logits import LogitSums, facts_of

MOST_HELD = 32  # forwards that are held before they are added up, which waits for the device


class _LayerSums:
    """What one layer has told since the step began."""

    def __init__(self, num_experts: int, num_domains: int) -> None:
        self.counts_E = np.zeros(num_experts, np.int64)
        self.domain_counts_ME = np.zeros((num_domains, num_experts), np.int64)
        self.num_tokens = self.dropped_rows = self.lost_tokens = 0
        self.entropy, self.scores_E = 0.0, np.zeros(num_experts)
        self.logits_7, self.peak = np.zeros(7), 0.0
        self.has_heard = False

    def load(self, layer: int, top_k: int) -> LayerLoad:
        """The sums as the load of a layer; means are over its tokens, NaN or None where there were none."""
        num_tokens = self.num_tokens
        return LayerLoad(
            layer=layer,
            top_k=top_k,
            counts_E=self.counts_E,
            num_tokens=num_tokens,
            router_entropy=self.entropy / num_tokens if num_tokens else float("nan"),
            domain_counts_ME=self.domain_counts_ME if len(self.domain_counts_ME) else None,
            dropped_rows=self.dropped_rows,
            lost_tokens=self.lost_tokens,
            mean_scores_E=self.scores_E / num_tokens if num_tokens else None,
            logits=facts_of(self.logits_7, self.peak),
        )


class LoadRecorder(RoutingTape):
    """A routing tape that adds up loads instead of keeping decisions, until `finish_step`.

    num_experts_by_layer: layer index -> E, for the layers that route. top_k: experts a token, one
    for all layers or one for each. optional: layers that need not run, such as those that predict further tokens.
    num_domains: M > 0 to count domains apart; say whose tokens come next with `set_domains`.
    It only reads: results with and without it are the same bits. It hears each forward once, also where activations
    are computed again in the backward pass (see `train.recompute`).
    """

    def __init__(
        self,
        num_experts_by_layer: dict[int, int],
        top_k: int | dict[int, int],
        *,
        num_domains: int = 0,
        optional: Collection[int] = (),
        replay: dict[int, Rows] | None = None,
    ) -> None:
        super().__init__(replay)
        self.num_experts_by_layer = dict(sorted(num_experts_by_layer.items()))
        self.top_k_by_layer = dict.fromkeys(self.num_experts_by_layer, top_k) if isinstance(top_k, int) else top_k
        self.num_domains, self.optional = num_domains, frozenset(optional)
        self.step = 0
        self._domains_T: Tensor | int | None = None
        self._reset()

    @classmethod
    def for_model(cls, config: ModelConfig, *, num_domains: int = 0) -> Self:
        """A recorder for all routed layers of a model, those that predict further tokens included.

        A dense model's recorder hears nothing.
        """
        routers = {
            index: layer.feed_forward.router
            for index, layer in enumerate(config.every_layer)
            if isinstance(layer.feed_forward, MoeConfig)
        }
        num_experts = {index: router.num_experts for index, router in routers.items()}
        top_k = {index: router.top_k for index, router in routers.items()}
        further = range(len(config.layers), len(config.every_layer))
        return cls(num_experts, top_k, num_domains=num_domains, optional=further)

    def set_domains(self, domains: Tensor | int | None) -> None:
        """Say which domain the next forward's tokens belong to: one id for all, or an integer tensor of B x S ids.

        Holds until the next call; None stops counting domains. Raises ConfigError for a domain that is not there.
        """
        if isinstance(domains, int) and not 0 <= domains < self.num_domains:
            raise ConfigError(f"domain {domains} of {self.num_domains}; use 0 to {self.num_domains - 1}")
        if domains is not None and not self.num_domains:
            raise ConfigError("this recorder counts no domains; make it with num_domains=...")
        self._domains_T = domains

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        """Add one layer's decision to the running step; the decision itself is not kept."""
        self._check(layer, decision)
        self._hold(listen({layer: decision}, self._domains_T, self.num_domains))

    def hear_all(self, decisions: dict[int, RoutingDecision], domain_ids_B: Tensor | None = None) -> None:
        """Add all layers' decisions of a forward: as `hear` of each, in fewer calls.

        domain_ids_B: of each sequence, in place of what `set_domains` said; left alone where no domains are counted.
        Layers may see other numbers of tokens of each: an encoder does, and those that look ahead.
        """
        for layer, decision in decisions.items():
            self._check(layer, decision)
        for group in alike(decisions):
            domains_T = self._domains_T
            if domain_ids_B is not None and self.num_domains:
                num_tokens = next(iter(group.values())).chosen.num_tokens
                domains_T = domain_ids_B.repeat_interleave(num_tokens // len(domain_ids_B), output_size=num_tokens)
            self._hold(listen(group, domains_T, self.num_domains))

    def finish_step(self, step: int | None = None) -> StepLoad:
        """The loads of everything heard since the last call, then start anew. Steps number themselves from 1.

        Optional layers that did not run are not in it.
        """
        self.step = self.step + 1 if step is None else step
        self._add_up()
        loads = (
            sums.load(layer, self.top_k_by_layer[layer])
            for layer, sums in self._sums.items()
            if sums.has_heard or layer not in self.optional
        )
        load = StepLoad(step=self.step, layers=tuple(loads))
        self._reset()
        return load

    def _check(self, layer: int, decision: RoutingDecision) -> None:
        num_experts = self.num_experts_by_layer.get(layer)
        if num_experts is None:
            known = ", ".join(map(str, self._sums)) or "none"
            raise ConfigError(
                f"layer {layer} routes and the recorder does not know it; it was made for layers: {known}"
            )
        if decision.chosen.num_experts != num_experts:
            raise ConfigError(
                f"layer {layer} routes over {decision.chosen.num_experts} experts and the recorder was made for "
                f"{num_experts}; make one with LoadRecorder.for_model(model.config)"
            )

    def _hold(self, heard: Heard) -> None:
        self._held.append(heard)
        self._num_held += len(heard.layers)
        if self._num_held >= MOST_HELD * len(self._sums):
            self._add_up()

    def _add_up(self) -> None:
        for heard in self._held:
            self._add(heard)
        self._held, self._num_held = [], 0

    def _add(self, heard: Heard) -> None:
        num_tokens = int(heard.num_tokens)
        counts_LE, entropies = heard.counts_LE.numpy(), heard.entropy_L.tolist()
        scores_LE = heard.scores_LE.cpu().numpy()
        domains_MLE = None if heard.domain_counts_MLE is None else heard.domain_counts_MLE.cpu().numpy()
        logits = None if heard.sample is None else LogitSums.of(heard.sample)
        for at, layer in enumerate(heard.layers):
            sums = self._sums[layer]
            sums.has_heard = True
            sums.num_tokens += num_tokens
            sums.counts_E += counts_LE[at]
            sums.entropy += entropies[at]
            sums.scores_E += scores_LE[at]
            sums.dropped_rows += heard.dropped_rows.get(layer, 0)
            sums.lost_tokens += int(heard.lost_tokens.get(layer, 0))
            if domains_MLE is not None:
                sums.domain_counts_ME += domains_MLE[:, at]
            if logits is not None:
                sums.logits_7 += logits.sums_L7[at]
                sums.peak = max(sums.peak, float(logits.peak_L[at]))

    def _reset(self) -> None:
        num_experts = self.num_experts_by_layer
        self._held: list[Heard] = []
        self._num_held = 0  # layers of all of these
        self._sums = {layer: _LayerSums(number, self.num_domains) for layer, number in num_experts.items()}
