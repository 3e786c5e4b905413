"""Positions that are not rotations: biases of scores by distance, and waves added to embeddings. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checks import require, require_positive
from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class RelativeBiasConfig:
    """A learned number for each head and bucket of distances, added to attention's scores (T5, arXiv:1910.10683, 2.1).

    Half of the buckets are for one distance each, the others for ever longer stretches of them, up to `max_distance`;
    what is further away shares the last. Where tokens see later ones, half of all buckets are for these.
    """

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        require_positive(self, "num_buckets", "max_distance")
        require(
            self.num_buckets >= 4 and self.num_buckets % 2 == 0,
            f"num_buckets={self.num_buckets} in RelativeBiasConfig; it must be even and at least 4",
        )
        require(
            self.max_distance > self.num_buckets // 2,
            f"max_distance={self.max_distance} in RelativeBiasConfig; with num_buckets={self.num_buckets} it must be "
            f"above {self.num_buckets // 2}",
        )

    def tensors(self, prefix: str, num_heads: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}.weight", (self.num_buckets, num_heads), "attention")


@dataclass(frozen=True, kw_only=True)
class SinusoidConfig:
    """Sines, then cosines of each position, added to embeddings (arXiv:1706.03762, sec. 3.5, as tensor2tensor has it).

    Wave lengths grow geometrically from 2 pi to `base` * 2 pi. first: what the first position is called (fairseq counts
    on from the id of padding).
    """

    first: int = 0
    base: float = 10_000.0

    def __post_init__(self) -> None:
        require(self.first >= 0, f"first={self.first} in SinusoidConfig; it must be 0 or more")
        require(self.base > 1, f"base={self.base} in SinusoidConfig; it must be above 1")
