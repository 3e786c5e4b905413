"""Residual streams: several vectors a token, of which parts read a mixture and to all of which they write. No torch.

D hidden, n streams.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checks import require, require_positive
from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class HyperConnectionConfig:
    """Manifold-constrained hyper-connections (mHC, arXiv:2512.24880; DeepSeek-V4, arXiv:2606.19348, sec. 2.2).

    num_streams: n, how many vectors of D numbers a token has between layers. sinkhorn_steps: how often the matrix that
    mixes them is divided by its sums, by rows and columns in turn. eps: what keeps these sums, and the weights of
    streams that a part reads, above 0. norm_eps: of the root mean square by which a token's streams are divided.
    """

    num_streams: int = 4
    sinkhorn_steps: int = 20
    eps: float = 1e-6
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(self, "num_streams", "sinkhorn_steps")
        for name in ("eps", "norm_eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value} in HyperConnectionConfig; it must be above 0 and finite")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """What one part of a layer reads, writes and mixes its streams by."""
        return self._tensors(prefix, hidden_size, self.num_streams * (self.num_streams + 2), num_scales=3)

    def join_tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """What the streams are joined by at the end of the stack."""
        return self._tensors(prefix, hidden_size, self.num_streams, num_scales=1)

    def _tensors(self, prefix: str, hidden_size: int, rows: int, num_scales: int) -> Iterator[TensorSpec]:
        shape = (rows, self.num_streams * hidden_size)
        yield TensorSpec(f"{prefix}.weight", shape, "residual", dtype="float32")
        yield TensorSpec(f"{prefix}.bias", (rows,), "residual", dtype="float32", start=0.0)
        yield TensorSpec(f"{prefix}.scale", (num_scales,), "residual", dtype="float32", start=1.0)
