"""Listens to routing and counts: rows per expert, rows dropped, tokens and router entropy, over whole steps.

T tokens, E experts, M domains, R routed rows.
"""

from collections.abc import Collection
from typing import Self

import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, RoutingTape, Rows
from moesaic.telemetry.load import Floats, LayerLoad, StepLoad
from moesaic.telemetry.logits import LogitSums


def entropy_sum(scores_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """The sum over tokens of the entropy of their scores, in nats, fp64 scalar on the scores' device.

    Scores are divided by their sum first, so sigmoid scores are judged as shares too:
    H = ln S - sum(s ln s) / S, with S = sum(s). Tokens where `mask_T` is false do not count.
    """
    return score_sums(scores_TE, mask_T)[0]


def score_sums(scores_TE: Tensor, mask_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(`entropy_sum`, the sum over tokens of their scores as shares [E], fp64)."""
    tiny = torch.finfo(scores_TE.dtype).tiny
    total_T = scores_TE.sum(-1).clamp_min(tiny)
    # torch.special.entr says the same and takes four times as long on a CPU: its logarithm is not vectorised.
    entropy_T = total_T.log() - (scores_TE * scores_TE.clamp_min(tiny).log()).sum(-1) / total_T
    parts_T = total_T.reciprocal()
    if mask_T is not None:
        entropy_T, parts_T = entropy_T.masked_fill(~mask_T, 0.0), parts_T.masked_fill(~mask_T, 0.0)
    return entropy_T.sum(dtype=torch.float64), (parts_T @ scores_TE).double()


class _LayerSums:
    """What one layer has heard since the step began."""

    def __init__(self, layer: int, num_experts: int, top_k: int, num_domains: int) -> None:
        self.layer, self.top_k, self.num_domains = layer, top_k, num_domains
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64)
        self.domain_counts_ME: Tensor = torch.zeros(num_domains, num_experts, dtype=torch.int64)
        self.num_tokens: Tensor | int = 0
        self.entropy: Tensor | float = 0.0
        self.dropped_rows = 0
        self.lost_tokens: Tensor | int = 0
        self.scores_E: Tensor | float = 0.0
        self.logits = LogitSums()
        self.has_heard = False

    def add(self, decision: RoutingDecision, domains_T: Tensor | int | None) -> None:
        rows, num_experts = decision.chosen, self.counts_E.numel()
        if rows.num_experts != num_experts:
            raise ConfigError(
                f"layer {self.layer} routes over {rows.num_experts} experts and the recorder was made for "
                f"{num_experts}; make one with LoadRecorder.for_model(model.config)"
            )
        self.has_heard, counts_E = True, rows.counts_E
        self.counts_E += counts_E
        # The sums stay tensors until the step ends: reading a mask here would wait for the device.
        self.num_tokens = self.num_tokens + (rows.num_tokens if decision.mask_T is None else decision.mask_T.sum())
        entropy, scores_E = score_sums(decision.scores_TE, decision.mask_T)
        self.entropy, self.scores_E = self.entropy + entropy, self.scores_E + scores_E
        self.logits.add(decision)
        if decision.before_capacity is not None:
            self.dropped_rows += rows.token_ids_R.numel() - decision.rows.token_ids_R.numel()
            self.lost_tokens = self.lost_tokens + (_has_rows(rows) & ~_has_rows(decision.rows)).sum()
        if isinstance(domains_T, int):
            self.domain_counts_ME[domains_T] += counts_E
        elif domains_T is not None:
            cells_R = domains_T.flatten()[rows.token_ids_R] * num_experts + rows.expert_ids_R
            found = torch.zeros(self.domain_counts_ME.numel(), dtype=torch.int64, device=cells_R.device)
            found.index_add_(0, cells_R, torch.ones_like(cells_R))  # bincount would wait for the device
            self.domain_counts_ME = self.domain_counts_ME.to(found.device) + found.view_as(self.domain_counts_ME)

    def load(self) -> LayerLoad:
        num_tokens = int(self.num_tokens)
        return LayerLoad(
            layer=self.layer,
            top_k=self.top_k,
            counts_E=self.counts_E.numpy().copy(),
            num_tokens=num_tokens,
            router_entropy=float(self.entropy) / num_tokens if num_tokens else float("nan"),
            domain_counts_ME=self.domain_counts_ME.cpu().numpy().copy() if self.num_domains else None,
            dropped_rows=self.dropped_rows,
            lost_tokens=int(self.lost_tokens),
            mean_scores_E=self._mean_scores(num_tokens),
            logits=self.logits.read(),
        )

    def _mean_scores(self, num_tokens: int) -> Floats | None:
        if not num_tokens or not isinstance(self.scores_E, Tensor):
            return None
        return self.scores_E.cpu().numpy() / num_tokens


def _has_rows(rows: Rows) -> Tensor:
    """Whether each token is served at all, [T]."""
    return torch.zeros(rows.num_tokens, dtype=torch.bool, device=rows.token_ids_R.device).index_fill(
        0, rows.token_ids_R, True
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
        if layer not in self._sums:
            known = ", ".join(map(str, self._sums)) or "none"
            raise ConfigError(
                f"layer {layer} routes and the recorder does not know it; it was made for layers: {known}"
            )
        with torch.no_grad():
            self._sums[layer].add(decision, self._domains_T)

    def finish_step(self, step: int | None = None) -> StepLoad:
        """The loads of everything heard since the last call, then start anew. Steps number themselves from 1.

        Optional layers that did not run are not in it.
        """
        self.step = self.step + 1 if step is None else step
        heard = (sums for layer, sums in self._sums.items() if sums.has_heard or layer not in self.optional)
        load = StepLoad(step=self.step, layers=tuple(sums.load() for sums in heard))
        self._reset()
        return load

    def _reset(self) -> None:
        self._sums = {
            layer: _LayerSums(layer, num_experts, self.top_k_by_layer[layer], self.num_domains)
            for layer, num_experts in self.num_experts_by_layer.items()
        }
