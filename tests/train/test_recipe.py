import json
import math
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.train.compare import DEMO_MODEL
from moesaic.train.recipe import DataSettings, Recipe, TrainSettings, apply_overrides, read_toml, with_values
from moesaic.train.schedule import learning_rate
from moesaic.train.sweep import Point, axes_of_table, points_of
from moesaic.train.toml_text import to_toml
from moesaic.train.twins import dense_twin

TOML = """
vocab_size = 300
[model]
model_type = "qwen3_moe"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 24
intermediate_size = 48
[train]
steps = 7
balance_losses = [["switch", 0.01], ["router_z", 0.001]]
"""


def write(tmp_path, text=TOML):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_toml_with_overrides_and_back(tmp_path):
    recipe = Recipe.from_toml(write(tmp_path), ["train.learning_rate=3e-4", "model.num_experts=8"])
    assert recipe.train.learning_rate == 3e-4
    assert recipe.train.balance_losses == (("switch", 0.01), ("router_z", 0.001))
    config = recipe.model_config(vocab_size=290, eos_token_id=0)
    assert (config.vocab_size, config.eos_token_ids, config.family) == (290, (0,), "qwen3_moe")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=1", "unknown field 'lr' in train; known: async_checkpoints, balance_losses"),
        ("train.learning_rte=1", "unknown field 'learning_rte' in train; did you mean 'learning_rate'?"),
        ("epochs=1", "unknown field 'epochs' in the recipe; known: data, model, train, vocab_size"),
        ("train.steps=0", "train.steps=0; use 1 or more"),
        ("nonsense", "write table.field=value"),
        ("vocab_size.x=1", "is a value, not a table"),
        ("train=5", "train=5; it must be a table of settings"),
        ("train.steps=many", "train.steps='many'; it must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5; it must be a whole number"),
        ("train.steps=true", "train.steps=True; it must be a whole number"),
        ("train.learning_rate=fast", "train.learning_rate='fast'; it must be a number"),
        ("train.learning_rate=nan", "train.learning_rate=nan; it must be a number"),
        ("train.learning_rate=0", "train.learning_rate=0.0; it must be above 0"),
        (f"train.learning_rate={'9' * 400}", "it must be a number"),
        (f"train.learning_rate={'9' * 5000}", "it must be a number"),
        (f"train.seed={2**63}", f"train.seed={2**63}; use {2**63 - 1} or less"),
        ("model.x=2024-01-01", "model.x=datetime.date(2024, 1, 1); it must be a finite number, a text"),
        ("model.rope_theta=inf", "model.rope_theta=inf; it must be a finite number"),
        ("data.weights.prose=1e308", "data.weights: 'prose' has 1e+308; use 1e+100 or less"),
        ("train.compile=1", "train.compile=1; it must be true or false"),
        ("train.precision=fp16", "train.precision='fp16'; it must be one of 'fp32', 'bf16'"),
        ("train.schedule=linear", "it must be one of 'cosine', 'wsd'"),
        ("train.optimizer=sgd", "it must be one of 'adamw', 'muon'"),
        ("train.recompute=all", "it must be one of 'none', 'layers'"),
        ("train.betas=[0.9]", "train.betas=[0.9]; it must be [a number, a number]"),
        ("train.betas=[0.9, 1.0]", "both must be at least 0 and below 1"),
        ("train.ema_decay=1", "train.ema_decay=1.0; it must be at least 0 and below 1"),
        ("train.muon_momentum=-0.1", "train.muon_momentum=-0.1; it must be at least 0 and below 1"),
        ("train.final_fraction=2", "train.final_fraction=2.0; it must be between 0 and 1"),
        ("train.decay_fraction=0", "it must be above 0 and at most 1"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints=0; use 1 or more"),
        ("train.keep_best=-1", "train.keep_best=-1; use 0 or more"),
        ("train.warmup_steps=7", "train.warmup_steps=7 leaves nothing of train.steps=7; use 0 to 6"),
        ('train.balance_losses=[["switch", -1]]', "'switch' has the value -1.0; use 0 or more"),
        ('train.balance_losses=[["swich", 1]]', "unknown balance loss 'swich'; did you mean 'switch'?"),
        ('train.balance_losses=[["switch", 1], ["switch", 2]]', "names 'switch' twice"),
        ('train.balance_losses=[["switch", []]]', "'switch' has no points"),
        (
            'train.balance_losses=[["switch", [[5, 1], [5, 2]]]]',
            "points at steps [5, 5]; they must be 0 or more and inc",
        ),
        ('train.balance_losses=[["switch", [[0, 1], [5, -2]]]]', "has the value -2.0"),
        ('train.balance_losses="switch"', "it must be a list of [a text, a number or a list of [a whole number, a"),
        ("train.selection_bias_rate=[[9, 1], [3, 1]]", "train.selection_bias_rate has points at steps [9, 3]"),
        ("train.mtp_coefficient=-0.1", "train.mtp_coefficient has the value -0.1; use 0 or more"),
        ("data.weights=equal", "it must be one of 'proportional', 'uniform' or a table of names and a number"),
        ("data.weights={prose=-1}", "data.weights: 'prose' has -1.0; use 0 or more"),
        ("data.weights={prose=0}", "gives no domain anything"),
        ("data.document_attention=maybe", "it must be true or false"),
        ("vocab_size=0", "vocab_size=0; use 1 or more"),
        ("model=7", "model=7; it must be a table of names and values"),
    ],
)
def test_impossible_recipes(tmp_path, override, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        Recipe.from_toml(write(tmp_path), [override])
    assert "\n" not in str(caught.value)


def test_a_warm_up_and_a_decay_that_overlap(tmp_path):
    wsd = ["train.steps=100", "train.schedule=wsd", "train.decay_fraction=0.8", "train.warmup_steps=20"]
    assert Recipe.from_toml(write(tmp_path), wsd).train.schedule == "wsd"
    with pytest.raises(ConfigError, match=r"warmup_steps=21 and the decay over .*=0.8 of train.steps=100 \(80 steps\)"):
        Recipe.from_toml(write(tmp_path), [*wsd, "train.warmup_steps=21"])


def test_weights_and_epochs_exclude_each_other(tmp_path):
    epochs = ["data.epochs={prose=2, code=0.5}"]
    assert Recipe.from_toml(write(tmp_path), epochs).data.epochs == {"prose": 2.0, "code": 0.5}
    with pytest.raises(ConfigError, match=r"data.weights='uniform' and data.epochs=.* leave one of them out"):
        Recipe.from_toml(write(tmp_path), [*epochs, "data.weights=uniform"])


def test_a_sequence_longer_than_the_context(tmp_path):
    recipe = Recipe.from_toml(write(tmp_path), ["model.max_position_embeddings=128", "train.sequence_length=256"])
    with pytest.raises(ConfigError, match=r"sequence_length=256 is more than model.max_position_embeddings=128"):
        recipe.model_config(vocab_size=290, eos_token_id=0)


def test_a_warm_up_that_is_left_open_fits_the_steps():
    assert TrainSettings(steps=2000).warmup_steps == 50
    assert TrainSettings(steps=100).warmup_steps == 10
    assert TrainSettings(steps=1).warmup_steps == 0


def test_lists_and_whole_numbers_become_what_the_fields_say():
    train = TrainSettings(balance_losses=[["switch", [[0, 1], [500, 0]]]], learning_rate=1, betas=[0, 0.5])  # type: ignore[arg-type]
    assert train.balance_losses == (("switch", ((0, 1.0), (500, 0.0))),)
    assert (train.learning_rate, train.betas) == (1.0, (0.0, 0.5))
    assert isinstance(train.learning_rate, float)


shares = st.dictionaries(st.text(min_size=1, max_size=6), st.floats(0.01, 9), min_size=1, max_size=3)
points = st.lists(st.integers(0, 10_000), min_size=1, max_size=4, unique=True).flatmap(
    lambda steps: st.tuples(*(st.tuples(st.just(step), st.floats(0, 1)) for step in sorted(steps)))
)
scheduled = st.one_of(st.floats(0, 1), points)


@st.composite
def recipes(draw):
    steps = draw(st.integers(2, 10_000))
    train = TrainSettings(
        steps=steps,
        warmup_steps=draw(st.integers(0, steps - 1)),
        learning_rate=draw(st.floats(1e-9, 1)),
        balance_losses=tuple(
            (name, draw(scheduled)) for name in draw(st.sets(st.sampled_from(["switch", "router_z"])))
        ),
        selection_bias_rate=draw(scheduled),
        mtp_coefficient=draw(scheduled),
        betas=draw(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))),
        precision=draw(st.sampled_from(["fp32", "bf16"])),
        compile=draw(st.booleans()),
    )
    weighted = draw(st.booleans())
    data = DataSettings(
        weights=draw(st.one_of(st.just("uniform"), shares)) if weighted else "proportional",
        epochs=None if weighted else draw(st.one_of(st.none(), shares)),
    )
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
    model = {"model_type": "qwen3_moe", draw(words): draw(words), "rope_parameters": {draw(words): draw(st.booleans())}}
    return Recipe(model=model, train=train, data=data)


@given(recipes())
def test_recipes_survive_json_and_toml(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    comments = {"train.steps": "why", "model.model_type": "because"}
    assert Recipe.from_dict(tomllib.loads(to_toml(recipe.to_dict(), comments))) == recipe


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").rglob("*.toml")), ids=lambda p: p.name)
def test_every_example_is_a_recipe(path):
    tree = read_toml(path)
    sweep = tree.pop("sweep", {})
    for point in points_of(axes_of_table(sweep)) if sweep else [Point(name="the only one", changes={})]:
        recipe = Recipe.from_dict(with_values(tree, point.changes))
        assert recipe.model_config(recipe.vocab_size, 0).moe_layers


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ConfigError, match="not valid TOML"):
        Recipe.from_toml(write(tmp_path, "steps ="), [])
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        Recipe.from_toml(tmp_path / "none.toml", [])
    with pytest.raises(ConfigError, match=r"without a \[model\] table"):
        Recipe.from_toml(write(tmp_path, "vocab_size = 5"), [])


def test_too_many_choices_are_refused(tmp_path):
    recipe = Recipe.from_toml(write(tmp_path), ["model.num_experts_per_tok=5"])
    with pytest.raises(ConfigError, match="top_k=5 is more than num_experts=4"):
        recipe.model_config(vocab_size=290, eos_token_id=0)


def test_overrides_leave_the_original_alone():
    tree = {"train": {"steps": 1}}
    assert apply_overrides(tree, ["train.steps=2", "model.name=plain words"]) == {
        "train": {"steps": 2},
        "model": {"name": "plain words"},
    }
    assert tree == {"train": {"steps": 1}}


def test_the_schedule_warms_up_peaks_and_falls():
    rates = [learning_rate(s, steps=100, peak=2.0, warmup_steps=10, final_fraction=0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[99] == pytest.approx(0.2)
    assert all(after <= before for before, after in pairwise(rates[10:]))
    assert rates[54] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))


@pytest.mark.parametrize("equal", ["active", "total"])
def test_twins_have_the_parameters_they_are_named_for(equal):
    config = Recipe(model=DEMO_MODEL).model_config(vocab_size=4096, eos_token_id=0)
    twin = dense_twin(config, equal)
    wanted = config.active_all if equal == "active" else config.total
    assert twin.total == pytest.approx(wanted, rel=0.01)
    assert twin.moe_layers == () and twin.family == "qwen3"
    with pytest.raises(ConfigError, match="has no twins"):
        dense_twin(twin, equal)
