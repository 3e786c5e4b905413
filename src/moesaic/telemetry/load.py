"""What the routing of one step looked like: numbers only, ready for JSON. No torch here.

E experts, M domains.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import DataError

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LogitFacts:
    """What a router's logits tell, of tokens taken evenly from each forward.

    rms: root mean square of the logits. peak: the largest magnitude. margin: mean over tokens of the least chosen logit
    less the greatest that was not chosen; negative where a selection bias decides. flips_bf16, flips_noise: the part of
    the choices that change when logits are rounded to bf16, and under normal noise of 1 % of their rms.
    """

    num_sampled: int
    rms: float
    peak: float
    margin: float
    flips_bf16: float
    flips_noise: float

    @classmethod
    def sum(cls, parts: "Sequence[LogitFacts]") -> "LogitFacts | None":
        """Those of a window; None of no tokens."""
        parts = [part for part in parts if part.num_sampled]
        total = sum(part.num_sampled for part in parts)
        if not total:
            return None
        weights = [part.num_sampled / total for part in parts]

        def mean(name: str) -> float:
            return sum(weight * getattr(part, name) for weight, part in zip(weights, parts, strict=True))

        return cls(
            num_sampled=total,
            rms=math.sqrt(sum(weight * part.rms**2 for weight, part in zip(weights, parts, strict=True))),
            peak=max(part.peak for part in parts),
            margin=mean("margin"),
            flips_bf16=mean("flips_bf16"),
            flips_noise=mean("flips_noise"),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerLoad:
    """How one layer's rows fell on its experts, as the router chose: a capacity comes afterwards.

    counts_E: rows of each expert. num_tokens: tokens that were routed (padding is not).
    router_entropy: mean over those tokens of the entropy of the router's scores, in nats; NaN when there were none.
    domain_counts_ME: rows of each domain at each expert, where domains were told apart.
    dropped_rows: of all these rows, those that no expert computed for want of a slot.
    lost_tokens: tokens that lost every row so.
    mean_scores_E: mean over tokens of the scores, each token's divided by their sum: the P of balance losses.
    logits: of the tokens that were looked at more closely; None for routers without logits.
    """

    layer: int
    top_k: int
    counts_E: Counts
    num_tokens: int
    router_entropy: float
    domain_counts_ME: Counts | None = None
    dropped_rows: int = 0
    lost_tokens: int = 0
    mean_scores_E: Floats | None = None
    logits: LogitFacts | None = None

    @property
    def num_experts(self) -> int:
        return len(self.counts_E)

    @property
    def dropped_share(self) -> float:
        """The part of the rows that a capacity dropped; 0 without rows."""
        return self.dropped_rows / max(1, int(self.counts_E.sum()))

    @property
    def average_entropy(self) -> float:
        """The entropy of the mean scores, in nats: ln E where all experts are wanted alike. NaN where unknown."""
        if self.mean_scores_E is None or not self.mean_scores_E.any():
            return math.nan
        shares_E = self.mean_scores_E[self.mean_scores_E > 0] / self.mean_scores_E.sum()
        return float(-(shares_E * np.log(shares_E)).sum())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; NaN becomes null. Mean scores keep six digits."""
        scores_E = self.mean_scores_E
        return {
            "layer": self.layer,
            "top_k": self.top_k,
            "counts": self.counts_E.tolist(),
            "num_tokens": self.num_tokens,
            "router_entropy": None if np.isnan(self.router_entropy) else self.router_entropy,
            "domain_counts": None if self.domain_counts_ME is None else self.domain_counts_ME.tolist(),
            "dropped_rows": self.dropped_rows,
            "lost_tokens": self.lost_tokens,
            "mean_scores": None if scores_E is None else [float(f"{score:.6g}") for score in scores_E.tolist()],
            "logits": None if self.logits is None else dict(vars(self.logits)),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "LayerLoad":
        """The inverse of `to_json`. Loads that do not speak of dropping had none.

        Raises KeyError, TypeError, ValueError or OverflowError for a tree that is none.
        """
        entropy, domain_counts = tree["router_entropy"], tree.get("domain_counts")
        mean_scores, logits = tree.get("mean_scores"), tree.get("logits")
        counts_E = _counts(tree["counts"])
        num_experts = len(counts_E)
        if counts_E.ndim != 1 or not num_experts:
            raise ValueError(f"counts of shape {counts_E.shape}")
        return cls(
            layer=_whole(tree["layer"]),
            top_k=_whole(tree["top_k"], least=1),
            counts_E=counts_E,
            num_tokens=_whole(tree["num_tokens"]),
            router_entropy=float("nan") if entropy is None else float(entropy),
            domain_counts_ME=None if domain_counts is None else _counts(domain_counts).reshape(-1, num_experts),
            dropped_rows=_whole(tree.get("dropped_rows", 0)),
            lost_tokens=_whole(tree.get("lost_tokens", 0)),
            mean_scores_E=None if mean_scores is None else np.asarray(mean_scores, np.float64).reshape(num_experts),
            logits=None if logits is None else LogitFacts(**{name: _number(fact) for name, fact in logits.items()}),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoad:
    """The loads of all routed layers over one whole step, or over a window that ends with it."""

    step: int
    layers: tuple[LayerLoad, ...]

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Number and experts of each layer: what loads that are added up share."""
        return tuple((layer.layer, layer.num_experts) for layer in self.layers)

    @property
    def dropped_share(self) -> float:
        """The part of all layers' rows that a capacity dropped; 0 without rows."""
        num_rows = sum(int(layer.counts_E.sum()) for layer in self.layers)
        return sum(layer.dropped_rows for layer in self.layers) / max(1, num_rows)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"step": self.step, "layers": [layer.to_json() for layer in self.layers]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "StepLoad":
        """The inverse of `to_json`. Raises DataError for a tree that is not a load."""
        try:
            return cls(step=tree["step"], layers=tuple(LayerLoad.from_json(layer) for layer in tree["layers"]))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"not a recorded load ({error!r}); write loads with StepLoad.to_json") from error


def _whole(value: Any, least: int = 0) -> int:
    """A count as JSON has it. Raises ValueError for anything else, and OverflowError for one that no array holds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} where a number from {least} on should be")
    return int(np.int64(value))


def _number(value: Any) -> Any:
    """A number as it is. Raises TypeError, ValueError or OverflowError for anything else."""
    float(value)
    return value


def _counts(values: Any) -> Counts:
    counts = np.asarray(values, dtype=np.int64)
    if counts.size and int(counts.min()) < 0:
        raise ValueError("negative counts")
    return counts


def _sum_layers(loads: tuple[LayerLoad, ...]) -> LayerLoad:
    num_tokens = sum(load.num_tokens for load in loads)
    weighted = [load.router_entropy * load.num_tokens for load in loads if load.num_tokens]
    domains = [load.domain_counts_ME for load in loads if load.domain_counts_ME is not None]
    scores = [load.mean_scores_E * load.num_tokens for load in loads if load.mean_scores_E is not None]
    return LayerLoad(
        layer=loads[0].layer,
        top_k=loads[0].top_k,
        counts_E=np.sum([load.counts_E for load in loads], axis=0),
        num_tokens=num_tokens,
        router_entropy=sum(weighted) / num_tokens if num_tokens else float("nan"),
        domain_counts_ME=np.sum(domains, axis=0) if domains else None,
        dropped_rows=sum(load.dropped_rows for load in loads),
        lost_tokens=sum(load.lost_tokens for load in loads),
        mean_scores_E=np.sum(scores, axis=0) / num_tokens if scores and num_tokens else None,
        logits=LogitFacts.sum([load.logits for load in loads if load.logits is not None]),
    )


def sum_loads(loads: Iterable[StepLoad]) -> StepLoad:
    """One load for a window of steps of the same model, named after the last step.

    Raises DataError for no steps, and for steps of models whose layers or experts are others.
    """
    steps = tuple(loads)
    if not steps:
        raise DataError("a window of no steps has no load; record at least one step")
    if len({step.shape for step in steps}) > 1:
        raise DataError("a window of steps that route in other layers or over other numbers of experts; split it there")
    columns = zip(*(load.layers for load in steps), strict=True)
    return StepLoad(step=steps[-1].step, layers=tuple(_sum_layers(column) for column in columns))
