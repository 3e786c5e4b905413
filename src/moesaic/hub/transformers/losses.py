"""Balance losses of transformers models as they should be: of each layer by itself, and of the same weight however a
step is cut into micro-batches and over ranks.

transformers 5.23 pools them: counts and probabilities are summed over layers first, so that layers which collapsed
onto different experts look balanced (its load_balancing_loss_func; issues 28255, 31464). And its Trainer, which divides
the cross-entropy by the targets of the whole step, adds the balance loss undivided to every micro-batch on every rank:
its gradient grows with gradient_accumulation_steps and with the number of ranks (issue 48690).

T tokens, E experts, K choices a token.
"""

import inspect
from collections.abc import Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)
IGNORED = -100


def balance_loss(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """E * sum_i f_i P_i of each layer, averaged over layers (Switch, arXiv:2101.03961, eqs. 4-6).

    The signature and the scale of transformers' load_balancing_loss_func: f sums to K, so that perfect balance is K.
    router_logits: [T, E] of each layer. attention_mask: 0 at padding, which counts nowhere. Raises ConfigError for no
    layers.
    """
    if not router_logits:
        raise ConfigError(
            "the balance loss of no layers; give router_logits, as output_router_logits=True returns them"
        )
    return torch.stack([_of_layer(logits, num_experts, top_k, attention_mask) for logits in router_logits]).mean()


def _of_layer(logits_TE: Tensor, num_experts: int, top_k: int, attention_mask: Tensor | None) -> Tensor:
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
    chosen_TK = probabilities_TE.topk(top_k, dim=-1).indices
    if attention_mask is not None:
        is_token_T = attention_mask.reshape(-1).to(logits_TE.device).bool()
        probabilities_TE, chosen_TK = probabilities_TE[is_token_T], chosen_TK[is_token_T]
    num_tokens = max(1, len(chosen_TK))
    used_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts).to(probabilities_TE) / num_tokens
    return num_experts * (used_E * probabilities_TE.sum(0) / num_tokens).sum()


def correct_balance_loss(model: Model) -> Model:
    """Give a transformers model the balance loss that it should have, in place, and return it.

    For models of the package itself that have `router_aux_loss_coef` and `output_router_logits` (Mixtral, Qwen3-MoE,
    OLMoE, gpt-oss, ...). The coefficient keeps its meaning: in a step of one micro-batch on one rank with balanced
    layers nothing changes. In others each micro-batch's balance loss counts by its share of the step's targets, of
    which the Trainer tells the model (`num_items_in_batch`); a Trainer that tells nothing divides by itself.
    Evaluation and generation are as before. Raises ConfigError for models that have no such loss, or do not return it.
    """
    if not isinstance(getattr(model, "router_aux_loss_coef", None), int | float) or not hasattr(model, "num_experts"):
        raise ConfigError(
            f"{type(model).__name__} has no balance loss (router_aux_loss_coef) of its own; give the model that "
            "returns the loss, such as MixtralForCausalLM"
        )
    if not model.config.output_router_logits:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"{type(model).__name__} is trained without its balance loss; set model.config.output_router_logits = True"
        )
    if not hasattr(model, _MARK):
        # A class of its own, as fully_shard makes one: copies of the model stay corrected, which an attribute that
        # holds a closure over this one would not be.
        model.__class__ = _corrected(type(model))  # pyright: ignore[reportAttributeAccessIssue]  a subclass of it
    return model


_MARK = "_moesaic_corrected_class"


@cache
def _corrected(own: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward has our balance loss, under the same name: files that are saved name no other."""

    @wraps(own.forward)  # the Trainer reads its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(own, self, args, kwargs)

    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__, _MARK: own})


def _forward(own: type[nn.Module], self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's own forward without its balance loss, plus ours."""
    return_dict = kwargs.pop("return_dict", None)
    coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
    try:
        outputs = own.forward(self, *args, return_dict=True, **kwargs)
    finally:
        self.router_aux_loss_coef = coefficient
    if outputs.router_logits:
        given = inspect.signature(own.forward).bind(self, *args, **kwargs).arguments
        logits, sizes = outputs.router_logits, (self.num_experts, self.num_experts_per_tok)
        outputs.aux_loss = balance_loss(logits, *sizes, given.get("attention_mask"))
        if outputs.loss is not None:
            share = share_of_step(given.get("labels"), given.get("kwargs", {}))
            outputs.loss = outputs.loss + coefficient * share * outputs.aux_loss.to(outputs.loss.device)
    wants_dict = self.config.return_dict if return_dict is None else return_dict
    return outputs if wants_dict else outputs.to_tuple()


def share_of_step(labels: Tensor | None, told: dict[str, Any]) -> Tensor | float:
    """The share of a step's targets that is in one micro-batch, by what a Trainer tells the model; 1 where nothing.

    Targets are labels, but for the first of each row, which predicts nothing.
    """
    num_items = told.get("num_items_in_batch")
    if num_items is None or labels is None:
        return 1.0
    shifted = told.get("shift_labels")
    targets = labels[..., 1:] if shifted is None else shifted
    return targets.ne(IGNORED).sum() / num_items
