"""Routing by a fixed table from token id to experts.

T tokens, E experts, K choices a token, V vocabulary. z are the logits.
"""

import numpy as np
import torch
from torch import Tensor

from moesaic.config.router import HashSettings, RouterConfig
from moesaic.errors import ConfigError
from moesaic.routing.routers.router import ROUTERS, Choice, RouterInput, weigh
from moesaic.routing.routers.topk import sqrt_softplus

_SCORES = {
    "softmax": (lambda logits_TE: torch.softmax(logits_TE, dim=-1), 0.0),
    "sigmoid": (torch.sigmoid, 1e-20),
    "sqrt_softplus": (sqrt_softplus, 1e-20),
}
_ROWS_AT_ONCE = 8192


@ROUTERS.register("hash")
def hash_experts(seen: RouterInput, settings: RouterConfig) -> Choice:
    """The experts that a table gives the token's id (Hash Layers, arXiv:2106.04426; DeepSeek-V4, arXiv:2606.19348).

    chosen = table[id]; g = 1/K and s = g where chosen, else 0 (weight "uniform"); or s = softmax(z), sigmoid(z) or
    sqrt(softplus(z)) and g = s[chosen] / their sum (+ 1e-20 but for softmax). Raises ConfigError without token ids,
    for ids outside the table and for a table that names no experts.
    """
    own = settings.settings
    assert isinstance(own, HashSettings)
    expert_ids_TK = _look_up(seen, settings) if seen.dictated_TM is None else seen.dictated_TM
    if own.weight == "uniform":
        shares_TK = (expert_ids_TK >= 0).to(seen.logits_TE.dtype) / settings.top_k
        scores_TE = torch.zeros_like(seen.logits_TE).scatter_add(1, expert_ids_TK.clamp(min=0), shares_TK)
        return Choice(expert_ids_TK, shares_TK * settings.scaling_factor, scores_TE)
    score, tiny = _SCORES[own.weight]
    scores_TE = score(seen.logits_TE)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings, tiny), scores_TE)


def _look_up(seen: RouterInput, settings: RouterConfig) -> Tensor:
    if seen.token_ids_T is None:
        raise ConfigError("hash routing needs the ids of the tokens; hand TokenFacts(token_ids_T=...) to the layer")
    assert seen.table_VK is not None
    vocab_size, ids_T = seen.table_VK.shape[0], seen.token_ids_T
    if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < vocab_size:
        raise ConfigError(
            f"token ids {int(ids_T.min())} to {int(ids_T.max())} for a hash table of {vocab_size} ids; "
            "give its settings the model's vocab_size"
        )
    expert_ids_TK = seen.table_VK[ids_T].long()
    if ids_T.numel() and not 0 <= int(expert_ids_TK.min()) <= int(expert_ids_TK.max()) < settings.num_experts:
        raise ConfigError(
            f"a hash table with experts {int(expert_ids_TK.min())} to {int(expert_ids_TK.max())} of "
            f"{settings.num_experts}; load one, or make it with Decoder.initialize or hash_table"
        )
    return expert_ids_TK


def hash_table(settings: RouterConfig) -> Tensor:
    """A new table_VK, int32: K different experts for each id, drawn by the seed of its settings.

    "random" draws them alike; "balanced" gives each id, in their order, to the experts with the fewest ids so far,
    drawing among equals: no two experts ever differ by more than one id.
    """
    own = settings.settings
    assert isinstance(own, HashSettings)
    fill = _balanced_table if own.table == "balanced" else _random_table
    table_VK = fill(np.random.default_rng(own.seed), own.vocab_size, settings.num_experts, settings.top_k)
    return torch.tensor(table_VK.astype(np.int32))


def _random_table(generator: np.random.Generator, vocab_size: int, num_experts: int, top_k: int) -> np.ndarray:
    """The first K of a random order of all experts, for each id."""
    starts = range(0, vocab_size, _ROWS_AT_ONCE)
    drawn = (generator.random((min(_ROWS_AT_ONCE, vocab_size - start), num_experts)) for start in starts)
    return np.concatenate([np.argsort(each, axis=1)[:, :top_k] for each in drawn])


def _balanced_table(generator: np.random.Generator, vocab_size: int, num_experts: int, top_k: int) -> np.ndarray:
    """All experts in random order, again and again, dealt out K at a time."""
    rounds: list[np.ndarray] = []
    open_ids = np.empty(0, dtype=np.int64)  # the experts of an id that one round began and the next must complete
    for _ in range(-(-vocab_size * top_k // num_experts)):
        order = generator.permutation(num_experts)
        is_taken = np.isin(order, open_ids)
        missing = -len(open_ids) % top_k
        order = np.concatenate([order[~is_taken][:missing], order[is_taken], order[~is_taken][missing:]])
        rounds.append(order)
        so_far = np.concatenate([open_ids, order])
        open_ids = so_far[len(so_far) - len(so_far) % top_k :]
    return np.concatenate(rounds)[: vocab_size * top_k].reshape(vocab_size, top_k)
