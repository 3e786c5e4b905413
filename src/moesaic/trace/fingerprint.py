"""Whose rows a trace holds."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import TraceError


class LayerFingerprint(NamedTuple):
    """How one layer routes."""

    layer: int
    router: str
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"layer {self.layer} routing to {self.top_k} of {self.num_experts} experts by {self.router}"


@dataclass(frozen=True)
class Fingerprint:
    """What two models must share for one to take the other's rows. Weights and number formats may differ."""

    family: str
    layers: tuple[LayerFingerprint, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> "Fingerprint":
        """The fingerprint of a model. Raises TraceError for one without layers that route."""
        parts = ((index, layer.feed_forward) for index, layer in enumerate(config.layers))
        layers = tuple(
            LayerFingerprint(index, part.router.name, part.router.num_experts, part.router.top_k)
            for index, part in parts
            if isinstance(part, MoeConfig)
        )
        if not layers:
            raise TraceError(f"this {config.family} model has no layers that route; take one with experts")
        return cls(config.family, layers)

    @property
    def num_experts(self) -> dict[int, int]:
        """E of each layer that routes."""
        return {layer.layer: layer.num_experts for layer in self.layers}

    def difference(self, other: "Fingerprint") -> tuple[str, str] | None:
        """The first thing in which two differ, in the words of each; None when they are equal."""
        if self == other:
            return None
        if self.family != other.family:
            return f"family {self.family}", f"family {other.family}"
        for mine, others in zip(self.layers, other.layers, strict=False):
            if mine != others:
                return str(mine), str(others)
        return f"{len(self.layers)} layers that route", f"{len(other.layers)} layers that route"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"family": self.family, "layers": [layer._asdict() for layer in self.layers]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Fingerprint":
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for a tree that is none."""
        layers = tuple(LayerFingerprint(**layer) for layer in tree["layers"])
        for layer in layers:
            numbers = (layer.layer, layer.num_experts, layer.top_k)
            if not all(isinstance(number, int) for number in numbers) or layer.layer < 0 or layer.num_experts < 1:
                raise ValueError(f"{layer}")
        if not layers or len({layer.layer for layer in layers}) < len(layers):
            raise ValueError("no layers, or one of them twice")
        return cls(str(tree["family"]), layers)
