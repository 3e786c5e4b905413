"""Our own family: every model of our parts is written and read, a mistake is one line, and it lives a whole life."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import families
from moesaic.cli.main import main
from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RopeConfig,
    SoftMoeConfig,
    StackConfig,
)
from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import ROUTER_KINDS, GroupConfig, HashSettings, NullSettings, RouterConfig
from moesaic.errors import ConfigError
from moesaic.hub import load, read_config, save
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import check_weight_map

RAW: dict[str, Any] = {
    "model_type": "moesaic",
    "vocab_size": 61,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 48,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 13,
}

NEEDED: dict[str, dict[str, Any]] = {"null_topk": {"num_null_experts": 3}, "hash": {"vocab_size": 61}}


def top_k_of(router: str, num_experts: int, otherwise: int = 2) -> int:
    return num_experts if router == "dense" else ROUTER_KINDS[router].top_k or otherwise


def layers_of(**changes: Any) -> tuple[LayerConfig, ...]:
    return families.from_hf(RAW | changes).layers


def router_of(router: Any, **changes: Any) -> RouterConfig:
    moe = layers_of(router=router, **changes)[0].feed_forward
    assert isinstance(moe, MoeConfig)
    return moe.router


def test_what_is_left_out_has_its_default() -> None:
    layer = layers_of()[0]
    attention = AttentionConfig(num_heads=4, num_key_value_heads=4, head_dim=6, head_norm=NormConfig())
    moe = MoeConfig(router=RouterConfig(name="softmax_topk", num_experts=6, top_k=2), intermediate_size=13)
    assert layer == LayerConfig(attention=attention, feed_forward=moe)


@pytest.mark.parametrize("name", ROUTER_KINDS)
def test_every_router_by_its_name_and_by_a_table(name: str) -> None:
    top_k = top_k_of(name, 6)
    table = {"name": name, **NEEDED.get(name, {})}
    config = families.from_hf(RAW | {"router": table, "num_experts_per_tok": top_k})
    assert families.from_hf(json.loads(json.dumps(families.to_hf(config)))) == config
    if name != "null_topk":
        assert router_of(name, num_experts_per_tok=top_k) == router_of(table, num_experts_per_tok=top_k)


def test_a_routers_own_settings_stand_beside_those_of_any() -> None:
    groups = {"num_groups": 3, "top_groups": 2, "score": "max"}
    assert router_of({"name": "sigmoid_topk", "selection_bias": True, "groups": groups}) == RouterConfig(
        name="sigmoid_topk",
        num_experts=6,
        top_k=2,
        selection_bias=True,
        groups=GroupConfig(num_groups=3, top_groups=2, score="max"),
    )
    hashed = router_of({"name": "hash", "table": "random", "seed": 3, "scaling_factor": 2})
    assert hashed.settings == HashSettings(vocab_size=61, table="random", seed=3)
    assert hashed.scaling_factor == 2.0 and isinstance(hashed.scaling_factor, float)
    null = router_of({"name": "null_topk", "num_null_experts": 3, "renormalize": False})
    assert null.settings == NullSettings(num_null_experts=3) and null.renormalize is False


def test_layers_may_differ() -> None:
    first, second, third = layers_of(
        first_dense_layers=1,
        intermediate_size=17,
        shared_intermediate_size=7,
        capacity={"factor": 1.25},
        overrides=[{"layers": [2], "router": "hash", "capacity": None, "sliding_window": 5}],
    )
    assert first.feed_forward == MlpConfig(intermediate_size=17)
    assert isinstance(second.feed_forward, MoeConfig) and isinstance(third.feed_forward, MoeConfig)
    assert second.feed_forward.capacity == CapacityConfig(factor=1.25) and third.feed_forward.capacity is None
    assert (second.feed_forward.router.name, third.feed_forward.router.name) == ("softmax_topk", "hash")
    assert isinstance(second.attention, AttentionConfig) and isinstance(third.attention, AttentionConfig)
    assert (second.attention.window, third.attention.window) == (None, 5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm_topk_prob": True}, "unknown field 'norm_topk_prob' in the configuration; known: .*router"),
        ({"num_expert": 4}, "unknown field 'num_expert' in the configuration; did you mean 'num_experts'"),
        ({"router": "softmax"}, "unknown router 'softmax'"),
        ({"router": 3}, "router=3; it must be a name or a table with one: softmax_topk"),
        ({"router": {"jitter": 0.1}}, "it must be a name or a table with one"),
        ({"router": {"name": "hash", "tabel": 1}}, "unknown field 'tabel' in router 'hash'; did you mean 'table'"),
        ({"router": {"name": "sigmoid_topk", "jitter": "a"}}, "router 'sigmoid_topk'.jitter='a'; it must be a number"),
        ({"router": {"name": "sigmoid_topk", "groups": 3}}, "groups=3; it must be a table of settings"),
        ({"router": {"name": "sigmoid_topk", "groups": {"num_groups": 3}}}, "groups without top_groups; give it there"),
        ({"router": "null_topk"}, "router 'null_topk' without num_null_experts; give it there"),
        ({"router": "switch"}, "top_k=2 with router 'switch'; it always has 1"),
        ({"router": {"name": "hash", "selection_bias": True}}, "selection_bias with router 'hash'"),
        ({"num_experts_per_tok": 7}, "top_k=7 is more than num_experts=6; use 1 to 6"),
        ({"capacity": 1.25}, "capacity=1.25; it must be a table of settings"),
        ({"capacity": {"factor": 0}}, "capacity factor=0.0; it must be above 0"),
        ({"capacity": {"factor": 1, "drop": "random"}}, "capacity.drop='random'; it must be one of 'position'"),
        ({"capacity": {"factor": 1, "overflow": "shared"}}, 'overflow="shared" without a shared expert'),
        ({"overrides": {"layers": [0]}}, "overrides=.*; it must be a list of tables"),
        ({"overrides": [{"layers": [3]}]}, r"overrides: layers=\[3\]; it must be a list of layers from 0 to 2"),
        ({"overrides": [{"layers": [0], "hidden_size": 4}]}, "unknown field 'hidden_size' in overrides"),
        ({"first_dense_layers": 1}, "the configuration has no intermediate_size"),
        ({"first_dense_layers": 4}, "first_dense_layers=4; use a whole number from 0 to 3"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
        ({"soft_slots_per_expert": 2, "router": "hash"}, "with soft_slots_per_expert: a Soft MoE routes nothing"),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        families.from_hf(RAW | changes)
    assert "\n" not in str(caught.value)


def test_a_shared_expert_with_another_activation_cannot_be_written() -> None:
    config = families.from_hf(RAW | {"shared_intermediate_size": 7})
    moe = config.layers[0].feed_forward
    assert isinstance(moe, MoeConfig)
    odd = MoeConfig(router=moe.router, intermediate_size=13, shared=MlpConfig(intermediate_size=7, activation="gelu"))
    layer = LayerConfig(attention=config.layers[0].attention, feed_forward=odd)
    model = ModelConfig(
        family="moesaic", vocab_size=61, hidden_size=20, context_length=48, decoder=StackConfig(layers=(layer,))
    )
    with pytest.raises(ConfigError, match="cannot be written as moesaic"):
        families.to_hf(model)


def test_another_familys_activation_cannot_be_written() -> None:
    config = dataclasses.replace(families.find_preset("gpt-oss-20b"), family="moesaic")
    with pytest.raises(ConfigError) as caught:
        families.to_hf(config)
    said = str(caught.value)
    assert said.startswith("this model cannot be written as moesaic: hidden_act=ClampedSwiglu(limit=7.0")
    assert said.endswith("known: silu; choose another family or change the model")


norms = st.sampled_from([NormConfig(), NormConfig(eps=1e-5), NormConfig(eps=3e-4)])
attentions = st.builds(
    AttentionConfig,
    num_heads=st.sampled_from([4, 6]),
    num_key_value_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([6, 10]),
    rope=st.builds(RopeConfig, theta=st.sampled_from([1e4, 5e5])),
    window=st.none() | st.integers(1, 9),
    qkv_bias=st.booleans(),
    output_bias=st.booleans(),
    head_norm=st.none() | norms,
)
mlps = st.builds(MlpConfig, intermediate_size=st.integers(1, 40), bias=st.booleans())
capacities = st.builds(
    CapacityConfig,
    factor=st.sampled_from([0.5, 1.0, 1.25]),
    minimum=st.integers(0, 4),
    rounding=st.sampled_from(["ceil", "floor", "round"]),
    drop=st.sampled_from(["position", "probability", "batch_prioritized"]),
    group_size=st.none() | st.integers(1, 64),
    pad=st.booleans(),
)


@st.composite
def routed(draw: st.DrawFn) -> MoeConfig:
    name = draw(st.sampled_from(sorted(ROUTER_KINDS)))
    kind, num_experts = ROUTER_KINDS[name], draw(st.sampled_from([4, 6]))
    needed = NEEDED.get(name)
    ranks = kind.ranks_scores
    router = RouterConfig(
        name=name,
        num_experts=num_experts,
        top_k=top_k_of(name, num_experts, draw(st.integers(1, 3))),
        renormalize=draw(st.booleans()) if kind.renormalize is None else None,
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        selection_bias=ranks and draw(st.booleans()),
        groups=draw(st.none() | st.just(GroupConfig(num_groups=2, top_groups=2)))
        if ranks and name != "null_topk"
        else None,
        settings=kind.settings(**needed) if kind.settings is not None and needed else None,
        jitter=0.0 if name == "hash" else draw(st.sampled_from([0.0, 0.01])),
    )
    return MoeConfig(
        router=router,
        intermediate_size=draw(st.integers(1, 20)),
        shared=draw(st.none() | mlps),
        capacity=draw(st.none() | capacities) if kind.takes_capacity else None,
        expert_dropout=draw(st.sampled_from([0.0, 0.2])),
    )


softs = st.builds(
    SoftMoeConfig,
    num_experts=st.integers(1, 5),
    slots_per_expert=st.integers(1, 4),
    intermediate_size=st.integers(1, 20),
    expert_dropout=st.sampled_from([0.0, 0.2]),
)
layers_of_any = st.builds(LayerConfig, attention=attentions, feed_forward=mlps | softs | routed(), norm=norms)


@given(
    layers=st.lists(layers_of_any, min_size=1, max_size=6),
    final_norm=norms,
    tied=st.booleans(),
    eos=st.lists(st.integers(0, 60), max_size=2, unique=True),
)
@settings(max_examples=40)
def test_every_decoder_of_our_parts_reads_back(
    layers: list[LayerConfig], final_norm: NormConfig, tied: bool, eos: list[int]
) -> None:
    config = ModelConfig(
        family="moesaic",
        vocab_size=61,
        hidden_size=20,
        context_length=48,
        decoder=StackConfig(layers=tuple(layers), final_norm=final_norm),
        tie_word_embeddings=tied,
        eos_token_ids=tuple(eos),
    )
    own = families.family("moesaic")
    assert families.from_hf(json.loads(json.dumps(families.to_hf(config)))) == config
    check_weight_map(config.tensors(), own.weight_map(config))


def test_most_layers_are_flat_fields_and_the_others_overrides() -> None:
    written = families.to_hf(
        families.from_hf(RAW | {"overrides": [{"layers": [0], "router": {"name": "hash", "seed": 2}}]})
    )
    assert written["router"] == {"name": "softmax_topk"}
    assert written["overrides"] == [{"layers": [0], "router": {"name": "hash", "vocab_size": 61, "seed": 2}}]


STATEFUL = {
    "selection_bias": {"router": {"name": "sigmoid_topk", "selection_bias": True}},
    "table": {"router": {"name": "hash", "table": "random"}},
    "penalty_coefficient": {"router": "relu"},
    "running_var": {"router": {"name": "softmax_topk", "batch_norm": True}},
    "noise_weight": {"router": "noisy_topk"},
}


@torch.no_grad()
@pytest.mark.parametrize("tensor", STATEFUL)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_a_router_keeps_is_saved(tensor: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = Decoder(families.from_hf(RAW | STATEFUL[tensor])).initialize(1)
    for name, value in model.state_dict().items():
        if name.endswith(tensor) and value.is_floating_point():
            value.add_(0.001)  # is lost in bf16
    save(model, tmp_path)
    loaded, before = load(tmp_path, dtype=dtype).state_dict(), model.state_dict()
    kept = [name for name in before if name.endswith(f"router.{tensor}")]
    assert len(kept) == 3
    for name in kept:
        if tensor != "noise_weight":
            assert loaded[name].dtype == before[name].dtype
            assert torch.equal(loaded[name], before[name])


RECIPE = """
vocab_size = 300

[model]
model_type = "moesaic"
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_experts = 6
num_experts_per_tok = 2
moe_intermediate_size = 8
shared_intermediate_size = 8
router = { name = "sigmoid_topk", selection_bias = true, groups = { num_groups = 3, top_groups = 2 } }
capacity = { factor = 1.25, overflow = "shared" }

[[model.overrides]]
layers = [0]
router = { name = "hash", table = "random" }

[train]
steps = 4
batch_size = 2
sequence_length = 16
evaluate_tokens = 16
checkpoint_every = 2
balance_losses = [["switch", 0.01]]
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for domain, words in {"one": "the cat sat on a mat", "two": "ein Hund lief durch den Wald"}.items():
        (tmp_path / "text" / domain).mkdir(parents=True)
        lines = itertools.islice(itertools.cycle(itertools.permutations(words.split())), 400)
        (tmp_path / "text" / domain / "a.txt").write_text("\n\n".join(" ".join(line) for line in lines))
    return tmp_path / "text"


def test_a_recipe_lives_a_whole_life(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "run.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    common = ["train", "--config", str(recipe), "--corpus", str(corpus), "--out"]
    assert main([*common, str(out), "--json"]) == 0
    whole = load(out / "model").state_dict()
    config = read_config(out / "model")
    assert [layer.feed_forward.router.name for layer in config.layers if isinstance(layer.feed_forward, MoeConfig)] == [
        "hash",
        "sigmoid_topk",
    ]
    assert whole["layers.1.feed_forward.router.selection_bias"].any()
    assert whole["layers.0.feed_forward.router.table"].dtype == torch.int32
    capsys.readouterr()

    # The same run from its first checkpoint ends in the same bits.
    last = sorted((out / "checkpoints").iterdir())[-1]
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last.rmdir()
    assert main(["train", "--out", str(out), "--resume", "--json"]) == 0
    again = load(out / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    capsys.readouterr()

    assert main(["count", str(out / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == config.total
    assert main(["generate", str(out / "model"), "--prompt", "the cat", "--max-new-tokens", "4", "--json"]) == 0
    assert capsys.readouterr().out
