import pytest
import torch
from transformers import LlamaConfig, PhimoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moesaic.config import LinearConfig, Llama3Config, LongRopeConfig, RopeConfig, YarnConfig
from moesaic.errors import ConfigError
from moesaic.families._rope import read_rope, rope_fields
from moesaic.layers.rope import Rotation, frequencies, rotate, rotation


def by_matrix(x_BSHA, turn):
    """eq. 34 for pairs (i, i + A/2): x cos + (-x2, x1) sin, in plain torch."""
    first, second = x_BSHA.chunk(2, dim=-1)
    return x_BSHA * turn.cos + torch.cat([-second, first], dim=-1) * turn.sin


def drawn(dtype, batch=2, length=7, heads=3, head_dim=10):
    torch.manual_seed(0)
    positions = torch.randint(0, 50, (batch, length))
    turn = rotation(RopeConfig(theta=100.0), head_dim, positions, dtype)
    return torch.randn(batch, length, heads, head_dim).to(dtype), turn


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 3e-2)])
def test_rotate_and_its_gradient_are_those_of_the_equation(dtype, bound):
    x, turn = drawn(dtype)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = rotate(mine, turn), by_matrix(plain, turn)
    assert (out - expected).abs().max() <= bound * x.abs().max()
    out.backward(x.cos())
    expected.backward(x.cos())
    assert mine.grad is not None and plain.grad is not None
    assert (mine.grad - plain.grad).abs().max() <= bound
    with torch.no_grad():
        assert torch.equal(rotate(x, turn), out)


def test_gradcheck():
    x, turn = drawn(torch.float64)
    assert torch.autograd.gradcheck(lambda heads: rotate(heads, turn), (x.requires_grad_(),))


def test_products_of_turned_heads_depend_on_distance_alone():
    x, _ = drawn(torch.float64)
    config = RopeConfig(theta=100.0)
    products = []
    for start in (0, 31):
        turn: Rotation = rotation(config, 10, torch.tensor([[start, start + 5]]), torch.float64)
        q, k = rotate(x[:1, :1], Rotation(turn.cos[:, :1], turn.sin[:, :1])), x[:1, 1:2]
        products.append((q * rotate(k, Rotation(turn.cos[:, 1:], turn.sin[:, 1:]))).sum(-1))
    assert torch.allclose(products[0], products[1], atol=1e-5)


def test_interleaved_pairs_are_complex_numbers_turned_by_a_unit_one():
    x, _ = drawn(torch.float64)
    positions = torch.randint(0, 50, x.shape[:2])
    turn = rotation(RopeConfig(theta=100.0, layout="interleaved"), 10, positions, torch.float64)
    angles = positions[:, :, None, None] * 100.0 ** (-torch.arange(0, 10, 2) / 10)
    expected = torch.view_as_complex(x.reshape(*x.shape[:-1], 5, 2)) * torch.polar(torch.ones(()), angles)
    assert torch.allclose(rotate(x, turn), torch.view_as_real(expected).flatten(-2), atol=1e-5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_part_of_a_head_turns_as_a_head_of_its_own(layout):
    x = torch.randn(2, 7, 3, 11)
    positions = torch.randint(0, 50, x.shape[:2])
    part = rotation(RopeConfig(theta=100.0, layout=layout, rotary_dim=6), 11, positions, torch.float32)
    whole = rotation(RopeConfig(theta=100.0, layout=layout), 6, positions, torch.float32)
    assert torch.equal(rotate(x, part), torch.cat([rotate(x[..., :6], whole), x[..., 6:]], dim=-1))


SCALINGS = [
    LinearConfig(factor=2.5),
    YarnConfig(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
    YarnConfig(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
    YarnConfig(factor=32.0, original_length=4096, truncate=False),
    YarnConfig(factor=32.0, original_length=4096, beta_fast=1.0),
    YarnConfig(factor=4.0, original_length=64, attention_factor=1.25, beta_fast=16.0, beta_slow=2.0),
    Llama3Config(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
    Llama3Config(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=repr)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, None), (10, None), (14, 6)])
def test_scaled_frequencies_are_those_of_transformers(scaling, head_dim, rotary_dim):
    rope = RopeConfig(theta=5e4, rotary_dim=rotary_dim, scaling=scaling)
    fields = rope_fields(rope, head_dim)
    theirs = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **fields)
    expected, magnitude = ROPE_INIT_FUNCTIONS[fields["rope_parameters"]["rope_type"]](theirs)
    assert torch.allclose(frequencies(rope, head_dim), expected, rtol=2e-7, atol=0)
    assert rope.magnitude == magnitude
    turn = rotation(rope, head_dim, torch.tensor([[0]]), torch.float32)
    assert turn.cos.allclose(torch.tensor(magnitude))


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=repr)
@pytest.mark.parametrize("rotary_dim", [None, *range(2, 50, 6)])
def test_what_is_written_reads_back(scaling, rotary_dim):
    rope = RopeConfig(theta=7e4, rotary_dim=rotary_dim, scaling=scaling)
    fields = rope_fields(rope, 49)
    assert read_rope(fields, 1e4, head_dim=lambda: 49, partial=1.0) == rope
    del fields["rope_parameters"]
    assert read_rope(fields, 1e4, head_dim=lambda: 49, partial=1.0) == rope


LONG = LongRopeConfig(
    short_factor=(1.0, 1.5, 2.0),
    long_factor=(1.5, 4.0, 9.0),
    original_length=8,
    short_mscale=1.25,
    long_mscale=1.5,
)


@pytest.mark.parametrize("is_long", [False, True])
def test_frequencies_of_short_and_long_texts_are_those_of_transformers(is_long):
    rope = RopeConfig(theta=5e4, scaling=LONG)
    theirs = PhimoeConfig(hidden_size=24, num_attention_heads=4, **rope_fields(rope, 6))
    expected, _ = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=9 if is_long else 8)
    assert torch.allclose(frequencies(rope, 6, is_long=is_long), expected, rtol=2e-7, atol=0)


def test_a_row_is_turned_by_its_own_length():
    rope = RopeConfig(scaling=LONG)
    turn = rotation(rope, 6, torch.stack([torch.arange(9), torch.arange(9).clamp(max=7)]), torch.float32)
    assert turn.cos[0, 0].allclose(torch.tensor(1.5)) and turn.cos[1, 0].allclose(torch.tensor(1.25))
    by_text = rotation(rope, 6, torch.tensor([[0, 0]]), torch.float32, lengths_BS=torch.tensor([[8, 9]]))
    assert by_text.cos[0, :, 0, 0].tolist() == [1.25, 1.5]


def test_every_pair_needs_its_factor():
    with pytest.raises(ConfigError, match="short_factor has 3 numbers; give 4, one for each pair"):
        RopeConfig(scaling=LONG).turning(8)
