"""Every balance loss with every router that takes it: the decision a router makes, through the equation in Python."""

import pytest
import torch

from moesaic.config.router import (
    ROUTER_KINDS,
    GroupConfig,
    HashSettings,
    NullSettings,
    RouterConfig,
    SinkhornSettings,
)
from moesaic.layers.router import RouterLayer
from moesaic.routing import TokenFacts
from moesaic.routing.balancers import BALANCE_LOSSES
from moesaic.routing.routers import hash_table
from tests.routing import balance_equations as equations

NUM_TOKENS, NUM_EXPERTS, HIDDEN, VOCABULARY = 12, 6, 5, 20
SETTINGS = {
    "hash": HashSettings(vocab_size=VOCABULARY, weight="softmax"),
    "null_topk": NullSettings(num_null_experts=2),
    "sinkhorn": SinkhornSettings(iterations=5),
}
GROUPS = GroupConfig(num_groups=3, top_groups=2, score="max")

EQUATIONS = {
    "switch": lambda d, k: equations.switch(d["scores"], d["choices"], d["mask"], NUM_EXPERTS),
    "sequence": lambda d, k: equations.sequence(d["scores"], d["documents"], d["mask"], k),
    "importance": lambda d, k: equations.importance(d["weights"], d["choices"], d["mask"], NUM_EXPERTS),
    "load": lambda d, k: equations.load(d["logits"], d["ranked"], d["std"], d["mask"], k),
    "device": lambda d, k: equations.device(d["scores"], d["choices"], d["mask"], NUM_EXPERTS, 3),
    "communication": lambda d, k: equations.communication(d["scores"], d["choices"], d["mask"], NUM_EXPERTS, 3),
    "router_z": lambda d, k: equations.router_z(d["logits"], d["mask"]),
    "entropy": lambda d, k: equations.entropy(d["scores"], d["mask"]),
    "batch_entropy": lambda d, k: equations.batch_entropy(d["scores"], d["mask"], NUM_EXPERTS),
    "similarity": lambda d, k: equations.similarity(d["router"]),
    "orthogonal": lambda d, k: equations.orthogonal(d["router"]),
    "relu_sparsity": lambda d, k: equations.relu_sparsity(d["scores"], d["choices"], d["mask"], NUM_EXPERTS, k),
}
EQUATIONS["global_running"] = EQUATIONS["global_exact"] = EQUATIONS["switch"]  # this batch is all there is


def config_of(name):
    kind = ROUTER_KINDS[name]
    top_k = NUM_EXPERTS if name == "dense" else kind.top_k or 2
    groups = GROUPS if kind.ranks_scores and name != "null_topk" else None
    return RouterConfig(name=name, num_experts=NUM_EXPERTS, top_k=top_k, groups=groups, settings=SETTINGS.get(name))


def decide(config):
    """A layer's decision while training, in fp64, with padding and documents."""
    torch.manual_seed(4)
    layer = RouterLayer(config, HIDDEN).double().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if layer.table is not None:
        layer.table.copy_(hash_table(config))
    facts = TokenFacts(
        token_ids_T=torch.arange(NUM_TOKENS) % VOCABULARY,
        mask_T=torch.arange(NUM_TOKENS) % 5 != 3,
        document_ids_T=torch.arange(NUM_TOKENS) // 5,
    )
    return layer(torch.randn(NUM_TOKENS, HIDDEN, dtype=torch.float64), facts)


def as_lists(decision):
    """The decision as the equations want it."""
    rows = decision.chosen
    choices, weights = [[] for _ in range(NUM_TOKENS)], [[] for _ in range(NUM_TOKENS)]
    for token, expert, weight in zip(
        rows.token_ids_R.tolist(), rows.expert_ids_R.tolist(), rows.weights_R.tolist(), strict=True
    ):
        choices[token].append(expert)
        weights[token].append(weight)
    lists = {
        "logits": decision.logits_TE,
        "scores": decision.scores_TE,
        "ranked": decision.ranked_TE,
        "std": decision.noise_std_TE,
        "mask": decision.mask_T,
        "documents": decision.document_ids_T,
        "router": decision.router_weight_ED,
    }
    found = {name: tensor.tolist() for name, tensor in lists.items() if tensor is not None}
    return {**found, "choices": choices, "weights": weights}


@pytest.mark.parametrize("name", sorted(ROUTER_KINDS))
def test_what_a_router_decided_is_judged_by_the_equation(name):
    config = config_of(name)
    decision = decide(config)
    lists = as_lists(decision)
    taken = [loss for loss in BALANCE_LOSSES.values() if loss.refusal(config) is None]
    for loss in taken:
        found = loss.of(decision)
        assert found.item() == pytest.approx(EQUATIONS[loss.name](lists, config.top_k), rel=1e-11), loss.name
        assert found.requires_grad, loss.name
    assert {"router_z", "entropy"} <= {loss.name for loss in taken}
    assert ("switch" in {loss.name for loss in taken}) == config.kind.balanceable
