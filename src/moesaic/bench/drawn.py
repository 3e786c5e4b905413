"""Weights of a model that exists only as a configuration: drawn as they are asked for, so that they can be timed."""

import zlib

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.hub.codes import CodedTensor
from moesaic.models.init import hash_routers, initial_std
from moesaic.routing.routers import hash_table


class DrawnWeights:
    """See engine.weights.Weights. Each tensor in bf16, drawn by its name; no more than one is in memory at a time.

    Routers choose almost evenly with them, and kernels take as long as with trained ones.
    """

    dtype = torch.bfloat16

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._specs = {spec.name: spec for spec in config.tensors()}
        self._tables = hash_routers(config)

    def coded(self, name: str) -> CodedTensor | None:
        return None

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """The tensor, or what one expert has of it."""
        spec = self._specs[name]
        shape = spec.shape if expert is None else spec.shape[1:]
        if name in self._tables:
            return hash_table(self._tables[name])
        dtype = torch.float32 if spec.dtype == "float32" else self.dtype
        if spec.start is not None or len(shape) == 1:
            value = spec.start if spec.start is not None else float(spec.role == "norm")
            return torch.full(shape, value, dtype=dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {expert}".encode()))
        std = initial_std(spec, len(self.config.layers))
        return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)
