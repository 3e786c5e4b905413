import math
from itertools import pairwise

import pytest

from moesaic.errors import ConfigError
from moesaic.train.compare import DEMO_MODEL
from moesaic.train.recipe import Recipe, apply_overrides
from moesaic.train.schedule import learning_rate
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
        ("train.lr=1", "unknown field 'lr' in train; known: balance_losses"),
        ("train.steps=0", "train.steps=0; use 1 or more"),
        ("nonsense", "write table.field=value"),
        ("vocab_size.x=1", "is a value, not a table"),
        ('train.balance_losses=[["switch", -1]]', "use 0 or more"),
    ],
)
def test_impossible_recipes(tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_toml(write(tmp_path), [override])


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
