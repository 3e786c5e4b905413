"""The experts that every MoE layer chooses are those that transformers' model chooses, but for near-ties."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.models.base import LanguageModel
from moesaic.routing import RoutingDecision, RoutingTape
from tests.families.decoder_oracle import choice_ids

NEAR_TIE = 1e-6


@torch.no_grad()
def test_every_layer_chooses_the_same_experts(oracle: Any, record_property: Callable[[str, object], None]) -> None:
    model, tape = oracle.ours, RoutingTape()
    model(choice_ids(), tape=tape)
    theirs = oracle.answer("choices").long()
    assert len(theirs) == len(tape.decisions) == len(model.config.moe_layers)
    near_ties = 0
    for (layer, decision), their_ids_TK in zip(sorted(tape.decisions.items()), theirs, strict=True):
        ids_TK, _ = decision.rows.as_topk()
        differs_T = (ids_TK.sort(-1).values != their_ids_TK.sort(-1).values).any(-1)
        near_T = margins(_ranked(model, layer, decision), ids_TK.shape[1]) < NEAR_TIE
        assert not (differs_T & ~near_T).any(), (
            f"layer {layer}: tokens {(differs_T & ~near_T).nonzero()[:, 0].tolist()}"
        )
        near_ties += int(differs_T.sum())
    record_property("near_ties", near_ties)
    assert near_ties <= 1, "one token of 68 may stand between two experts; more are no accident"


def _ranked(model: LanguageModel, layer: int, decision: RoutingDecision) -> Tensor:
    """What the choice is made by; groups may leave out some of the best, whose near-ties are not looked for."""
    ranked_TE = decision.scores_TE if decision.ranked_TE is None else decision.ranked_TE
    bias_E = model.state_dict().get(f"layers.{layer}.feed_forward.router.selection_bias")
    return ranked_TE if bias_E is None else ranked_TE + bias_E


def margins(ranked_TE: Tensor, top_k: int) -> Tensor:
    """How far each token is from another choice, among what its router ranks; infinite where it takes all."""
    if top_k >= ranked_TE.shape[1]:
        return torch.full((len(ranked_TE),), float("inf"))
    best = ranked_TE.sort(-1, descending=True).values
    return best[:, top_k - 1] - best[:, top_k]
