"""Our own training step passes lint: with losses and biases, with a capacity, and over ranks."""

import pytest

from moesaic import lint
from moesaic.errors import ConfigError
from moesaic.train.recipe import Recipe

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
BIASED = {
    "model_type": "deepseek_v3",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "intermediate_size": 20,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def recipe(model, **train):
    return Recipe.from_dict(
        {"model": model, "vocab_size": 97, "train": {"batch_size": 4, "sequence_length": 24, **train}}
    )


def test_biases_move_by_what_was_chosen_and_groups_are_masked():
    report = lint(recipe(BIASED, balance_losses=[["sequence", 0.01]]), ranks=0)
    assert report, str(report)
    for check in ("selection bias that never moves", "selection bias counted after dropping", "groups masked with 0"):
        assert report[check].verdict == "sound", str(report)


@pytest.mark.slow
def test_a_bias_that_a_recipe_holds_still_is_found():
    report = lint(recipe(BIASED, balance_losses=[["sequence", 0.01]], selection_bias_rate=0.0), ranks=0)
    assert [found.check for found in report.findings] == ["selection bias that never moves"], str(report)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["switch", "global_exact", "global_running", "sequence"])
def test_every_scope_of_the_balance_loss_is_the_same_over_ranks(loss):
    report = lint(recipe(MODEL, balance_losses=[[loss, 0.01]], precision="fp32"))
    assert report and report["balance loss over ranks"].verdict == "sound", str(report)


@pytest.mark.slow
def test_in_bf16_and_recomputed():
    assert lint(recipe(MODEL, precision="bf16", recompute="layers"), ranks=0)


def test_encoder_decoders_are_refused():
    model = {"model_type": "switch_transformers", "d_model": 24, "d_kv": 6, "d_ff": 12, "num_heads": 2, "num_layers": 2}
    model |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 5}
    spans = {"model": model, "vocab_size": 97, "train": {"sequence_length": 24}, "data": {"task": "span_corruption"}}
    with pytest.raises(ConfigError, match="lint"):
        lint(Recipe.from_dict(spans))
