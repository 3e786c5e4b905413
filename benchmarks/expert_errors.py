"""What rounding does to each expert: to its weights, and to its outputs on the tokens that it gets.

L layers, E experts, R routed rows, D hidden, T tokens, K choices a token.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from token_losses import run
from torch import Tensor

from moesaic.data.held_out import HeldOutBatch
from moesaic.experts.grouped import GroupedExperts
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape


class Served(NamedTuple):
    """Rows that an unrounded model sent through the experts of a layer, and what came out."""

    x_RD: Tensor
    expert_offsets: Tensor
    out_RD: Tensor


class ExpertErrors(NamedTuple):
    """Relative errors: the root of (squares of what changed / squares of what was). None (nan) without any rows."""

    weights_LE: Tensor
    outputs_LE: Tensor


def expert_layers(model: Decoder) -> dict[str, GroupedExperts]:
    """By name, in the order of the layers; none in a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupedExperts)}


@torch.no_grad()
def serve(model: Decoder, batches: Iterable[HeldOutBatch]) -> dict[str, list[Served]]:
    """Send text through the model and keep what its experts saw and said, by layer."""
    served: dict[str, list[Served]] = {name: [] for name in expert_layers(model)}
    with _heard(model, served):
        for batch in batches:
            run(model, batch)
    return served


@contextmanager
def _heard(model: Decoder, served: dict[str, list[Served]]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(partial(_keep, served[name])) for name, module in expert_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(rows: list[Served], _: GroupedExperts, seen: tuple[Tensor, Tensor], out_RD: Tensor) -> None:
    rows.append(Served(*seen, out_RD))


@torch.no_grad()
def expert_errors(model: Decoder, exact: dict[str, Tensor], served: dict[str, list[Served]]) -> ExpertErrors:
    """Of the model's experts as they are now, against their weights in `exact` and what they said in `served`."""
    weights, outputs = [], []
    for name, module in expert_layers(model).items():
        pairs = [(now.detach(), exact[f"{name}.{key}"]) for key, now in module.named_parameters()]
        weights.append(_relative([((now - was).flatten(1), was.flatten(1)) for now, was in pairs]))
        changes = [(module(rows.x_RD, rows.expert_offsets) - rows.out_RD, rows) for rows in served[name]]
        outputs.append(
            _relative([(_by_expert(change, rows), _by_expert(rows.out_RD, rows)) for change, rows in changes])
        )
    return ExpertErrors(torch.stack(weights), torch.stack(outputs))


def _by_expert(out_RD: Tensor, rows: Served) -> Tensor:
    """The length of each expert's rows, all of them one vector: [E, 1]."""
    counts_E = rows.expert_offsets.diff()
    expert_ids_R = torch.arange(len(counts_E)).repeat_interleave(counts_E)
    return torch.zeros(len(counts_E)).index_add(0, expert_ids_R, out_RD.square().sum(-1)).sqrt()[:, None]


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[E] of differences and originals [E, anything], part by part."""
    changed = sum((change.square().sum(-1) for change, _ in pairs), torch.zeros(()))
    return (changed / sum((was.square().sum(-1) for _, was in pairs), torch.zeros(()))).sqrt()


def loads(served: dict[str, list[Served]]) -> Tensor:
    """How many rows each expert got, [L, E]."""
    return torch.stack(
        [sum((each.expert_offsets.diff() for each in rows), torch.zeros(())) for rows in served.values()]
    )


def quarters(loads_LE: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts are the rarest quarter of their layer and which the busiest: two masks [L, E]."""
    ranks_LE = loads_LE.argsort(dim=-1, stable=True).argsort(-1)
    num_experts = loads_LE.shape[-1]
    return ranks_LE < num_experts // 4, ranks_LE >= num_experts - num_experts // 4


@torch.no_grad()
def rare_choices(model: Decoder, batches: Iterable[HeldOutBatch], rare_LE: Tensor) -> Tensor:
    """How many of each scored token's choices, in all layers together, are experts of the mask: [N]."""
    counts = []
    for batch in batches:
        run(model, batch, tape := RoutingTape())
        ids_LTK = [tape.decisions[layer].rows.as_topk()[0] for layer in sorted(tape.decisions)]
        rare_T = torch.stack([rare_E[ids_TK] for rare_E, ids_TK in zip(rare_LE, ids_LTK, strict=True)]).sum((0, 2))
        counts.append(rare_T[torch.from_numpy(batch.mask_BS).flatten()])
    return torch.cat(counts)
