import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.errors import ConfigError

ATTENTION = AttentionConfig(num_heads=6, num_key_value_heads=2, head_dim=10, qkv_bias=True, head_norm=NormConfig())
MOE = MoeConfig(
    router=RouterConfig(name="sigmoid_topk", num_experts=7, top_k=3, selection_bias=True),
    intermediate_size=37,
    shared=MlpConfig(intermediate_size=11),
)
CONFIG = ModelConfig(
    family="mixtral",
    vocab_size=131,
    hidden_size=48,
    context_length=64,
    decoder=StackConfig(
        layers=(
            LayerConfig(attention=ATTENTION, feed_forward=MOE),
            LayerConfig(
                attention=dataclasses.replace(ATTENTION, window=5, output_bias=True),
                feed_forward=MlpConfig(intermediate_size=53, bias=True),
            ),
        )
    ),
)


def test_json_brings_back_the_same_tree():
    assert ModelConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_counts_by_hand():
    config = dataclasses.replace(CONFIG, decoder=StackConfig(layers=CONFIG.layers[:1]))
    embedding = 131 * 48
    attention = 2 * 60 * 48 + 2 * 20 * 48 + 60 + 2 * 20
    norms = 3 * 48 + 2 * 10
    router, expert, shared = 7 * 48, 3 * 37 * 48, 3 * 11 * 48
    assert config.total == 2 * embedding + attention + norms + router + 7 * expert + shared
    assert config.active_all == config.total - 4 * expert
    assert config.active_gemm == config.active_all - embedding
    assert sum(config.roles.values()) == config.total
    assert config.roles["experts"] == 7 * expert


def test_a_tied_table_is_counted_once_and_multiplied():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert CONFIG.total - tied.total == 131 * 48
    assert tied.active_gemm == tied.active_all == CONFIG.active_gemm


def test_selection_biases_are_tensors_but_not_parameters():
    names = {tensor.name for tensor in CONFIG.tensors()} - {tensor.name for tensor in CONFIG.parameters()}
    assert names == {"layers.0.feed_forward.router.selection_bias"}


def test_states_and_their_bytes():
    full, window = CONFIG.states()
    assert (full.kind, window.kind, window.window) == ("full", "window", 5)
    assert full.elements_per_token == 2 * 2 * 10
    assert CONFIG.state_bytes(100) == 2 * 40 * (100 + 5)
    assert CONFIG.state_bytes(3, bytes_per_element=4) == 4 * 40 * (3 + 3)


def test_flops_grow_with_the_visible_context():
    assert CONFIG.flops_per_token() == 2 * CONFIG.active_gemm
    assert CONFIG.flops_per_token(100) - CONFIG.flops_per_token() == 4 * 60 * (100 + 5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RouterConfig(name="softmax_topk", num_experts=4, top_k=5), "top_k=5 is more than num_experts=4"),
        (lambda: AttentionConfig(num_heads=6, num_key_value_heads=4, head_dim=8), "not a multiple"),
        (lambda: AttentionConfig(num_heads=6, num_key_value_heads=2, head_dim=7), "odd"),
        (lambda: AttentionConfig(num_heads=6, num_key_value_heads=2, head_dim=8, window=0), "window=0"),
        (lambda: MlpConfig(intermediate_size=-1), "intermediate_size=-1"),
        (lambda: StackConfig(layers=()), "without layers"),
        (lambda: ModelConfig.from_dict({"part": "Nonsense"}), "unknown part 'Nonsense'"),
        (lambda: ModelConfig.from_dict({"part": "NormConfig", "size": 3}), "unknown field ['size']"),
        (lambda: ModelConfig.from_dict({"part": "NormConfig"}), "is not a ModelConfig"),
    ],
)
def test_contradictions_are_refused(build, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        build()


@given(num_experts=st.integers(1, 40), data=st.data())
def test_active_parameters_are_top_k_experts_of_all(num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    router = RouterConfig(name="softmax_topk", num_experts=num_experts, top_k=top_k)
    tensors = list(MoeConfig(router=router, intermediate_size=3).tensors("", 5))
    experts = [tensor for tensor in tensors if tensor.role == "experts"]
    assert sum(tensor.active_numel for tensor in experts) == top_k * 3 * 3 * 5
