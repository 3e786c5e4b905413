"""What the routing of one step looked like: numbers only, ready for JSON. No torch here.

E experts, M domains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import DataError

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerLoad:
    """How one layer's rows fell on its experts, as the router chose: a capacity comes afterwards.

    counts_E: rows of each expert. num_tokens: tokens that were routed (padding is not).
    router_entropy: mean over those tokens of the entropy of the router's scores, in nats; NaN when there were none.
    domain_counts_ME: rows of each domain at each expert, where domains were told apart.
    dropped_rows: of all these rows, those that no expert computed for want of a slot.
    lost_tokens: tokens that lost every row so.
    """

    layer: int
    top_k: int
    counts_E: Counts
    num_tokens: int
    router_entropy: float
    domain_counts_ME: Counts | None = None
    dropped_rows: int = 0
    lost_tokens: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.counts_E)

    @property
    def dropped_share(self) -> float:
        """The part of the rows that a capacity dropped; 0 without rows."""
        return self.dropped_rows / max(1, int(self.counts_E.sum()))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; NaN becomes null."""
        return {
            "layer": self.layer,
            "top_k": self.top_k,
            "counts": self.counts_E.tolist(),
            "num_tokens": self.num_tokens,
            "router_entropy": None if np.isnan(self.router_entropy) else self.router_entropy,
            "domain_counts": None if self.domain_counts_ME is None else self.domain_counts_ME.tolist(),
            "dropped_rows": self.dropped_rows,
            "lost_tokens": self.lost_tokens,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "LayerLoad":
        """The inverse of `to_json`. Loads that do not speak of dropping had none."""
        entropy, domain_counts = tree["router_entropy"], tree.get("domain_counts")
        return cls(
            layer=tree["layer"],
            top_k=tree["top_k"],
            counts_E=np.asarray(tree["counts"], dtype=np.int64),
            num_tokens=tree["num_tokens"],
            router_entropy=float("nan") if entropy is None else entropy,
            domain_counts_ME=None if domain_counts is None else np.asarray(domain_counts, dtype=np.int64),
            dropped_rows=tree.get("dropped_rows", 0),
            lost_tokens=tree.get("lost_tokens", 0),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoad:
    """The loads of all routed layers over one whole step, or over a window that ends with it."""

    step: int
    layers: tuple[LayerLoad, ...]

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
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a recorded load ({error!r}); write loads with StepLoad.to_json") from error


def _sum_layers(loads: tuple[LayerLoad, ...]) -> LayerLoad:
    num_tokens = sum(load.num_tokens for load in loads)
    weighted = [load.router_entropy * load.num_tokens for load in loads if load.num_tokens]
    domains = [load.domain_counts_ME for load in loads if load.domain_counts_ME is not None]
    return LayerLoad(
        layer=loads[0].layer,
        top_k=loads[0].top_k,
        counts_E=np.sum([load.counts_E for load in loads], axis=0),
        num_tokens=num_tokens,
        router_entropy=sum(weighted) / num_tokens if num_tokens else float("nan"),
        domain_counts_ME=np.sum(domains, axis=0) if domains else None,
        dropped_rows=sum(load.dropped_rows for load in loads),
        lost_tokens=sum(load.lost_tokens for load in loads),
    )


def sum_loads(loads: Iterable[StepLoad]) -> StepLoad:
    """One load for a window of steps of the same model, named after the last step. Raises DataError for no steps."""
    steps = tuple(loads)
    if not steps:
        raise DataError("a window of no steps has no load; record at least one step")
    columns = zip(*(load.layers for load in steps), strict=True)
    return StepLoad(step=steps[-1].step, layers=tuple(_sum_layers(column) for column in columns))
