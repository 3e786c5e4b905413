"""The dial: what the sizes derive, that wishes win and later rules reckon with them, and that it is all said."""

import math
import tomllib
from itertools import pairwise
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.train.recipe import Recipe
from moesaic.train.size import SIZES, TextFacts, derive
from moesaic.train.toml_text import to_toml


def at(recipe: Recipe, path: str) -> Any:
    tree: Any = recipe.to_dict()
    for name in path.split("."):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("size", SIZES)
def test_every_derived_field_stands_in_the_recipe_with_a_reason(size):
    sized = derive(size, has_fast_bf16=True)
    for row in sized.derived:
        assert at(sized.recipe, row.field) == row.value
        assert row.reason and not row.is_set
    config = sized.recipe.model_config(sized.recipe.vocab_size, 0)
    assert len(config.moe_layers) == SIZES[size].layers
    assert sized.flops == pytest.approx(6 * config.active_gemm * sized.tokens, rel=0.2)  # and attention's scores
    assert sized.tokens == pytest.approx(SIZES[size].tokens_per_parameter * config.active_gemm, rel=0.01)


def test_tiny_is_the_model_that_the_log_measured():
    recipe = derive("tiny").recipe
    assert recipe.vocab_size == 4096
    assert recipe.model["hidden_size"] == 128
    assert (recipe.model["num_experts"], recipe.model["num_experts_per_tok"]) == (32, 4)
    assert recipe.model["moe_intermediate_size"] == 64
    assert (recipe.train.learning_rate, recipe.train.precision) == (5e-3, "fp32")
    assert 300 <= recipe.train.steps <= 600


def test_sizes_grow():
    sizes = [derive(size) for size in SIZES]
    for smaller, larger in pairwise(sizes):
        assert larger.flops > 3 * smaller.flops
        assert larger.recipe.train.tokens_per_step > smaller.recipe.train.tokens_per_step
        assert larger.recipe.train.learning_rate <= smaller.recipe.train.learning_rate
    assert [sized.seconds < 86_400 for sized in sizes] == [True, True, True, False]


def test_the_batch_and_the_rate_follow_their_laws():
    """DeepSeek LLM, arXiv:2401.02954, eq. 1."""
    sized = derive("large")
    active = sized.recipe.model_config(24576, 0).active_gemm
    flops = 6 * active * 20 * active
    batch = 0.292 * flops**0.3271
    assert batch / 2 < sized.recipe.train.tokens_per_step <= batch
    assert sized.recipe.train.learning_rate == pytest.approx(0.3118 * flops**-0.125, rel=0.05)


def test_wishes_win_are_marked_and_reckoned_with():
    sized = derive("tiny", {"train.steps": 30, "model.hidden_size": 64, "train.seed": 7})
    rows = {row.field: row for row in sized.derived}
    assert [name for name, row in rows.items() if row.is_set] == ["model.hidden_size", "train.steps"]
    assert rows["train.steps"].reason == "set by you"
    train = sized.recipe.train
    assert (train.steps, train.warmup_steps, train.evaluate_every, train.seed) == (30, 3, 3, 7)
    assert rows["model.num_attention_heads"].value == 2
    assert rows["model.moe_intermediate_size"].value == 32
    assert rows["vocab_size"].value == 32 * 64


def test_little_text_shortens_the_run_and_its_tokenizer_counts():
    sized = derive("small", text=TextFacts(500_000, 5000))
    rows = {row.field: row for row in sized.derived}
    assert sized.tokens <= 4 * 500_000 < sized.tokens + sized.recipe.train.tokens_per_step
    assert "4 passes over 500,000 tokens" in rows["train.steps"].reason
    assert sized.recipe.vocab_size == 5000
    plenty = derive("small", text=TextFacts(10**9, 6144))
    assert plenty.recipe == derive("small").recipe


def test_bf16_where_it_pays():
    assert derive("medium", has_fast_bf16=True).recipe.train.precision == "bf16"
    assert derive("medium", has_fast_bf16=False).recipe.train.precision == "fp32"
    assert derive("tiny", has_fast_bf16=True).recipe.train.precision == "fp32"


@pytest.mark.parametrize(
    ("size", "wanted", "words"),
    [
        ("huge", {}, "unknown size 'huge'. Known: tiny, small, medium, large"),
        ("tiny", {"model.hidden_size": "wide"}, "model.hidden_size='wide'; it must be a whole number above 0"),
        ("tiny", {"model.num_hidden_layers": 0}, "model.num_hidden_layers=0; it must be a whole number above 0"),
        ("tiny", {"model.num_experts_per_tok": 64, "model.num_experts": 8}, "top_k=64 is more than num_experts=8"),
        ("tiny", {"model.model_type": "mixtral"}, "a size describes a qwen3_moe model"),
        ("tiny", {"train.stepps": 5}, "unknown field 'stepps' in train; did you mean 'steps'?"),
        ("tiny", {"train.steps": 10, "train.warmup_steps": 10}, "leaves nothing of train.steps=10"),
    ],
)
def test_mistakes(size, wanted, words):
    with pytest.raises(ConfigError) as caught:
        derive(size, wanted)
    assert words in str(caught.value)


def test_a_printed_recipe_is_the_recipe():
    sized = derive("medium", {"train.balance_losses": [["router_z", 1e-3]]})
    text = to_toml(sized.recipe.to_dict(), {row.field: row.reason for row in sized.derived})
    assert Recipe.from_dict(tomllib.loads(text)) == sized.recipe
    assert "hidden_size = 256  # 32 x layers" in text
    assert math.isclose(tomllib.loads(text)["train"]["balance_losses"][0][1], 1e-3)


def test_a_wish_that_makes_a_run_endless_is_refused_unless_its_steps_are_wished_too():
    with pytest.raises(
        ConfigError, match=r"with model\.num_experts_per_tok=99 the tiny size would compute [\d,]+ times"
    ):
        derive("tiny", {"model.num_experts_per_tok": 99}, has_fast_bf16=False)
    sized = derive("tiny", {"model.num_experts_per_tok": 99, "train.steps": 5}, has_fast_bf16=False)
    assert sized.recipe.train.steps == 5
