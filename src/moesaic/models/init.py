"""How the weights of a new model are drawn: one table of distributions."""

import math

import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoeConfig
from moesaic.config.router import HashSettings, RouterConfig
from moesaic.routing.routers import hash_table
from moesaic.tensor_spec import TensorSpec

EMBEDDING_STD = 0.02
ROUTER_STD = 0.02


def initial_std(tensor: TensorSpec, num_layers: int) -> float:
    """The standard deviation of a matrix.

    Embedding, head and router: 0.02 (GPT-2). Projections: 1/sqrt(inputs), so that outputs keep the scale of inputs;
    those that write to the residual stream (o_proj, o_b_proj, down) are divided by sqrt(2 L), so that their sum does
    too (GPT-2, sec. 2.3). Relative biases: 0.02. All times the tensor's own gain.
    """
    return tensor.gain * _plain_std(tensor, num_layers)


def _plain_std(tensor: TensorSpec, num_layers: int) -> float:
    if tensor.role in ("embedding", "head") or tensor.name.endswith(".relative_bias.weight"):
        return EMBEDDING_STD
    if tensor.role == "router":
        return ROUTER_STD
    std = 1 / math.sqrt(tensor.shape[-1])
    writes_residual = any(name in tensor.name for name in (".o_proj.", ".o_b_proj.", ".down_proj.", ".experts.down"))
    return std / math.sqrt(2 * num_layers) if writes_residual else std


@torch.no_grad()
def initialize(config: ModelConfig, tensors: dict[str, Tensor], seed: int) -> None:
    """Fill `tensors` (our names) in place. One seed, one set of bits.

    Norms are one, biases zero, matrices normal; what says where it starts does so (a noisy router's matrices at 0,
    statistics, coefficients). Hash tables are drawn by the seeds of their own settings.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = hash_routers(config)
    for spec in config.tensors():
        tensor = tensors[spec.name]
        if spec.name in tables:
            tensor.copy_(hash_table(tables[spec.name]))
        elif spec.start is not None:
            tensor.fill_(spec.start)
        elif spec.role == "norm":
            tensor.fill_(1.0)
        elif len(spec.shape) == 1:
            tensor.zero_()
        else:
            drawn = torch.empty(spec.shape).normal_(0.0, initial_std(spec, len(config.layers)), generator=generator)
            tensor.copy_(drawn)


def hash_routers(config: ModelConfig) -> dict[str, RouterConfig]:
    """The routers that have a table, by its name."""
    routers = {
        f"layers.{index}.feed_forward.router.table": layer.feed_forward.router
        for index, layer in enumerate(config.layers)
        if isinstance(layer.feed_forward, MoeConfig)
    }
    return {name: router for name, router in routers.items() if isinstance(router.settings, HashSettings)}
