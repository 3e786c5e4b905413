"""moesaic.bench.bound: bytes and operations counted by hand."""

import pytest

from moesaic.bench.bound import Held, Number, Work, best_peak, bound, decode_work, distinct_experts, prefill_work
from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, MoeConfig, RouterConfig, StackConfig

ATTENTION = AttentionConfig(num_heads=2, num_key_value_heads=1, head_dim=4)
MOE = MoeConfig(router=RouterConfig(name="softmax_topk", num_experts=8, top_k=2), intermediate_size=16)
V, D = 100, 8


def model(*parts: MoeConfig | MlpConfig, tied: bool = False) -> ModelConfig:
    layers = tuple(LayerConfig(attention=ATTENTION, feed_forward=part) for part in parts)
    return ModelConfig(
        family="moesaic",
        vocab_size=V,
        hidden_size=D,
        context_length=64,
        decoder=StackConfig(layers=layers),
        tie_word_embeddings=tied,
    )


def held(config: ModelConfig, **sizes: int) -> Held:
    return Held(
        config=config,
        packed_bytes=sizes,
        embedding_element_bytes=2,
        cache_format="bf16",
        of_experts="int8",
        of_head="int8",
        of_others="bf16",
    )


def test_distinct_experts_of_even_choices():
    config = model(MOE, MlpConfig(intermediate_size=16))
    assert distinct_experts(config, 1) == pytest.approx(2 / 8)
    assert distinct_experts(config, 3) == pytest.approx(1 - 0.75**3)
    assert distinct_experts(config, 10_000) == pytest.approx(1)
    assert distinct_experts(model(MlpConfig(intermediate_size=16)), 1) == 1


def test_layers_count_by_their_size():
    other = MoeConfig(router=RouterConfig(name="softmax_topk", num_experts=4, top_k=4), intermediate_size=32)
    # Experts of 8 * 16 and of 4 * 32 channels weigh alike.
    assert distinct_experts(model(MOE, other), 1) == pytest.approx((2 / 8 + 1) / 2)


def test_bytes_of_a_decode_step():
    work = decode_work(held(model(MOE), projections=1000, experts=8000, head=500), batch=2, context=10)
    keys_and_values = 2 * 4 * 10  # of one text
    assert work.num_bytes == pytest.approx(
        1000 + 500 + 8000 * (1 - 0.75**2) + 2 * D * 2 + 2 * keys_and_values * 2,
    )


def test_operations_of_a_decode_step():
    config = model(MOE)
    operations = decode_work(held(config), batch=3, context=0).operations
    assert operations["int8"] == 3 * 2 * (2 * 3 * 16 * D + V * D)  # two experts of three matrices each, and the head
    assert operations["bf16"] == 3 * 2 * (D * 8 + 2 * D * 4 + 8 * D)  # projections
    assert operations["fp32"] == 3 * 2 * 8 * D  # the router


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_last_token_of_a_prompt_meets_the_head(tied):
    one, many = (prefill_work(held(model(MOE, tied=tied)), count).operations["int8"] for count in (1, 10))
    assert many - one == 9 * 2 * 2 * 3 * 16 * D


def test_the_slower_limit_is_the_bound():
    work = Work(1000.0, {"int8": 600.0, "fp32": 100.0})
    peaks: dict[Number, float | None] = {"fp32": 100.0, "bf16": 200.0, "int8": 300.0}
    assert bound(work, 100.0, peaks) == (10.0, "memory")
    assert bound(work, 1000.0, peaks) == (3.0, "arithmetic")


def test_narrow_numbers_may_be_computed_as_wider_ones():
    assert best_peak("int8", {"fp32": 100.0, "bf16": 20.0, "int8": None}) == 100.0
    assert best_peak("fp32", {"fp32": 100.0, "bf16": 200.0, "int8": 300.0}) == 100.0
