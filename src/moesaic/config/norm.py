"""What a norm is. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require
from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Normalisation with a learned weight, before a part of a layer.

    kind: "rms" divides by the root mean square (Zhang & Sennrich, arXiv:1910.07467, eq. 4); "layer" takes the mean off
    and divides by the standard deviation (Ba et al., arXiv:1607.06450, eq. 4), and may add a learned `bias`.
    """

    eps: float = 1e-6
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.eps > 0, f"norm eps={self.eps}; it must be above 0")
        require(self.kind in ("rms", "layer"), f"norm kind={self.kind!r}; known: rms, layer")
        require(self.kind == "layer" or not self.bias, 'bias with norm kind="rms", which has none; use kind="layer"')

    def tensors(self, prefix: str, size: int) -> Iterator[TensorSpec]:
        """Its own tensors: a weight, and a bias where there is one."""
        yield TensorSpec(f"{prefix}.weight", (size,), "norm")
        if self.bias:
            yield TensorSpec(f"{prefix}.bias", (size,), "norm", start=0.0)
