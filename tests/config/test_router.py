"""What routers may not be together, with the words in which they say so."""

import re
from dataclasses import replace

import pytest
import torch

from moesaic import generate
from moesaic.config import ModelConfig, MoeConfig, StackConfig
from moesaic.config.router import (
    ROUTER_KINDS,
    GroupConfig,
    HashSettings,
    NoisySettings,
    NullSettings,
    ReluSettings,
    RouterConfig,
    SinkhornSettings,
    SparseMixerSettings,
    TopPSettings,
)
from moesaic.errors import ConfigError
from moesaic.layers.kv_cache import KeyValueCache
from tests.tiny import lively, tiny_config

HASH = HashSettings(vocab_size=9)
RANKING = (
    "leave it out or use one of: softmax_topk, topk_softmax, sigmoid_topk, sqrt_softplus_topk, sigmoid_input, null_topk"
)

IMPOSSIBLE = [
    ({"name": "softmax_topk", "top_k": 9}, "top_k=9 is more than num_experts=8; use 1 to 8"),
    ({"top_k": 0}, "top_k=0 in RouterConfig; it must be a whole number above 0"),
    ({"num_experts": 0}, "num_experts=0 in RouterConfig; it must be a whole number above 0"),
    ({"name": "sofmax_topk"}, "unknown router 'sofmax_topk'; did you mean 'softmax_topk'?"),
    ({"name": "switch"}, "top_k=2 with router 'switch'; it always has 1"),
    ({"name": "base"}, "top_k=2 with router 'base'; it always has 1"),
    ({"name": "gshard_top2", "top_k": 1}, "top_k=1 with router 'gshard_top2'; it always has 2"),
    ({"name": "dense"}, "top_k=2 with router 'dense'; it always has 8"),
    (
        {"name": "hash", "settings": HASH, "selection_bias": True},
        f"selection_bias with router 'hash', which does not choose by ranked scores alone; {RANKING}",
    ),
    (
        {"name": "expert_choice", "groups": GroupConfig(num_groups=2, top_groups=1)},
        f"groups with router 'expert_choice', which does not choose by ranked scores; {RANKING}",
    ),
    (
        {"groups": GroupConfig(num_groups=3, top_groups=1)},
        "num_groups=3 does not divide num_experts=8; use one of [1, 2, 4, 8]",
    ),
    (
        {"groups": GroupConfig(num_groups=4, top_groups=1), "top_k": 3},
        "top_k=3 of the 2 experts in top_groups=1 groups; raise top_groups or lower top_k",
    ),
    (
        {"groups": GroupConfig(num_groups=8, top_groups=3)},
        'groups.score="top2_sum" with one expert a group (num_groups=8); use "max"',
    ),
    (
        {
            "name": "null_topk",
            "settings": NullSettings(num_null_experts=2),
            "groups": GroupConfig(num_groups=2, top_groups=1),
        },
        "groups with router 'null_topk', whose null experts are on no device; leave them out",
    ),
    (
        {"name": "relu", "gating_dropout": 0.1},
        "gating_dropout with router 'relu', which does not pick K experts for each token; leave it out or use one of:",
    ),
    ({"gating_dropout": 1.0}, "gating_dropout=1.0 in RouterConfig; it must be at least 0 and below 1"),
    ({"scaling_factor": 0.0}, "scaling_factor=0.0; it must be above 0 and finite"),
    ({"scaling_factor": float("nan")}, "scaling_factor=nan; it must be above 0 and finite"),
    ({"jitter": -0.1}, "jitter=-0.1 in RouterConfig; it must be at least 0 and below 1"),
    (
        {"name": "hash", "settings": HASH, "batch_norm": True},
        'jitter, batch_norm, bias or fp32_weight with hash weight="uniform", which learns nothing; leave them out',
    ),
    (
        {"name": "topk_softmax", "renormalize": False},
        "renormalize=False with router 'topk_softmax', which always renormalizes; leave it out",
    ),
    (
        {"name": "switch", "top_k": 1, "renormalize": True},
        "renormalize=True with router 'switch', which never renormalizes; leave it out",
    ),
    ({"name": "hash"}, "router 'hash' needs its HashSettings"),
    ({"name": "null_topk"}, "router 'null_topk' needs its NullSettings"),
    ({"name": "top_p", "settings": HASH}, "with router 'top_p'; give TopPSettings"),
    ({"settings": HASH}, "with router 'softmax_topk', which has none; leave them out"),
]


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE, ids=[message[:40] for _, message in IMPOSSIBLE])
def test_impossible_routers_are_refused_with_what_would_work(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RouterConfig(**{"name": "softmax_topk", "num_experts": 8, "top_k": 2} | fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupConfig(num_groups=2, top_groups=3), "top_groups=3 is more than num_groups=2; use 1 to 2"),
        (lambda: GroupConfig(num_groups=0, top_groups=1), "num_groups=0 in GroupConfig"),
        (lambda: GroupConfig(num_groups=2, top_groups=1, score="sum"), "known: max, top2_sum"),  # pyright: ignore[reportArgumentType]
        (lambda: NoisySettings(noise_epsilon=-1), "noise_epsilon=-1; use 0 or more"),
        (lambda: HashSettings(vocab_size=0), "vocab_size=0 in HashSettings"),
        (lambda: HashSettings(vocab_size=3, seed=-1), "hash seed=-1; it must be a whole number, 0 or more"),
        (lambda: HashSettings(vocab_size=3, table="even"), "known: random, balanced"),  # pyright: ignore[reportArgumentType]
        (lambda: HashSettings(vocab_size=3, weight="relu"), "known: uniform, softmax, sigmoid, sqrt_softplus"),  # pyright: ignore[reportArgumentType]
        (lambda: SparseMixerSettings(gap=0), "gap=0; it must be above 0"),
        (lambda: SinkhornSettings(iterations=0), "iterations=0 in SinkhornSettings"),
        (lambda: ReluSettings(start=0), "start=0; it must be above 0"),
        (lambda: ReluSettings(factor=1), "factor=1; it must be above 1"),
        (lambda: TopPSettings(p=0), "p=0; it must be above 0 and at most 1"),
        (lambda: TopPSettings(p=1.1), "p=1.1; it must be above 0 and at most 1"),
        (lambda: NullSettings(num_null_experts=0), "num_null_experts=0 in NullSettings"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_a_hash_table_without_the_whole_vocabulary_is_refused():
    config = routed_by("hash")
    message = "layer 1 has a hash table for fewer ids than the model's vocab_size=62; give its settings that vocab_size"
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(config, vocab_size=62)


# --- seeing the future ------------------------------------------------------------------------------------------------


def routed_by(name) -> ModelConfig:
    kind = ROUTER_KINDS[name]
    own = {"hash": HashSettings(vocab_size=61), "null_topk": NullSettings(num_null_experts=1)}.get(name)
    top_k = 5 if name == "dense" else kind.top_k or 2
    router = RouterConfig(name=name, num_experts=5, top_k=top_k, settings=own)
    config = tiny_config(windows=(None, None))
    layer = replace(config.layers[0], feed_forward=MoeConfig(router=router, intermediate_size=5))
    return replace(config, decoder=StackConfig(layers=(config.layers[1], layer)))


def test_those_that_leak_are_known():
    assert {name for name in ROUTER_KINDS if routed_by(name).leaks_future} == {"expert_choice", "base"}


@pytest.mark.parametrize("name", ["expert_choice", "base"])
def test_a_model_that_leaks_refuses_to_write(name):
    message = (
        f"layer 1 has router '{name}', where tokens see later ones, so this model cannot write on token by token; "
    )
    message += 'score whole texts with it, or train one with another router, such as "softmax_topk" or "sigmoid_topk"'
    model = lively(routed_by(name))
    model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match=re.escape(message)):
        generate(model, [1, 2, 3], 2)


@pytest.mark.parametrize("name", [name for name in ROUTER_KINDS if not ROUTER_KINDS[name].leaks])
def test_all_others_write_token_by_token_what_they_would_at_once(name):
    model = lively(routed_by(name))
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(model.config, batch_size=2, max_length=9)
    steps = [model(ids[:, i : i + 1], cache=cache) for i in range(9)]
    assert torch.allclose(torch.cat(steps, dim=1), model(ids), atol=1e-4)
