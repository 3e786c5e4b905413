"""Compiled routing: the routers of moesaic.routing.routers outside of training, and their choices sorted by expert.

Importing this fails where the kernels were not built. T tokens, E experts, C what a token chooses from (experts and
null experts), K choices a token, M columns of choices, R rows sorted by expert, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.config.router import (
    ROUTER_KINDS,
    HashSettings,
    NullSettings,
    RouterConfig,
    SparseMixerSettings,
    TopPSettings,
)
from moesaic.errors import ConfigError
from moesaic.kernels.native import _array, _native, _threads

NATIVE_ROUTERS = tuple(name for name in ROUTER_KINDS if name != "expert_choice")
"""What `NativeRouter` takes: all but the one whose experts choose among the tokens of a batch."""


class RouterTensors(NamedTuple):
    """What a router has learned or counted beside its matrix: fp32, but the hash `table` [V, K], int32.

    bias, running_mean, running_var: [C]. selection_bias: [E].
    """

    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    selection_bias: Tensor | None = None
    table: Tensor | None = None


class SortedChoices(NamedTuple):
    """R rows in the order of their experts. row_of_TM: the row of each choice, -1 where there is none."""

    offsets: Tensor
    token_ids_R: Tensor
    weights_R: Tensor
    row_of_TM: Tensor


class NativeRouter:
    """One router, for logits [T, C] in fp32 as its matrix gives them: without bias, not normalised.

    A token's answer has the same bits whatever stands beside it, and for any number of threads.
    Raises ConfigError for a router that is not in `NATIVE_ROUTERS`.
    """

    def __init__(self, config: RouterConfig, tensors: RouterTensors) -> None:
        if config.name not in NATIVE_ROUTERS:
            raise ConfigError(
                f"router {config.name!r} chooses over a whole batch, which no step of generation has; "
                f"use one of: {', '.join(NATIVE_ROUTERS)}"
            )
        own, groups = config.settings, config.groups
        num_null = own.num_null_experts if isinstance(own, NullSettings) else 0
        arrays = {
            name: None if tensor is None else _array(tensor.detach().contiguous())
            for name, tensor in tensors._asdict().items()
        }
        self.native = _native.Router(
            config.name,
            (config.num_experts, num_null, config.top_k),
            renormalize=bool(config.renormalize),
            scaling_factor=config.scaling_factor,
            groups=(groups.num_groups, groups.top_groups) if groups else (0, 0),
            group_score=groups.score if groups else "max",
            hash_weight=own.weight if isinstance(own, HashSettings) else "uniform",
            p=own.p if isinstance(own, TopPSettings) else 0.0,
            gap=own.gap if isinstance(own, SparseMixerSettings) else 0.0,
            **arrays,
        )

    def route(self, logits_TC: Tensor | None, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """expert_ids_TM, int64, -1 where a token has no such choice, and weights_TM, fp32, 0 there.

        A hash router needs token_ids_T; one of uniform weights needs no logits.
        """
        seen = logits_TC if logits_TC is not None else token_ids_T
        tokens = 0 if seen is None else len(seen)
        ids_TM = torch.empty(tokens, self.native.columns, dtype=torch.int64)
        weights_TM = torch.empty(tokens, self.native.columns)
        self.native.route(_optional(logits_TC), _optional(token_ids_T), _array(ids_TM), _array(weights_TM), _threads())
        return ids_TM, weights_TM

    def weigh_choices(self, logits_TC: Tensor | None, expert_ids_TM: Tensor) -> Tensor:
        """weights_TM of experts that were chosen before; -1 where a token has no M-th, whose weight is 0."""
        weights_TM = torch.empty(expert_ids_TM.shape)
        self.native.weigh_choices(
            _optional(logits_TC), _array(expert_ids_TM.contiguous()), _array(weights_TM), _threads()
        )
        return weights_TM


def sort_by_expert(expert_ids_TM: Tensor, weights_TM: Tensor, num_experts: int) -> SortedChoices:
    """Choices sorted by expert, keeping the order of tokens; those of -1 are no rows."""
    offsets = torch.empty(num_experts + 1, dtype=torch.int64)
    token_ids = torch.empty(expert_ids_TM.numel(), dtype=torch.int64)
    weights, row_of_TM = torch.empty(expert_ids_TM.numel()), torch.empty_like(expert_ids_TM)
    inputs = (expert_ids_TM.contiguous(), weights_TM.contiguous())
    rows = _native.sort_by_expert(*map(_array, (*inputs, offsets, token_ids, weights, row_of_TM)))
    return SortedChoices(offsets, token_ids[:rows], weights[:rows], row_of_TM)


def _optional(tensor: Tensor | None) -> object:
    return None if tensor is None else _array(tensor.contiguous())
