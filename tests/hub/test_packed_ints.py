"""Words of whole numbers: there and back, and bit for bit as the format says."""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.hub import packed_ints

MATRICES = {"rows": st.integers(0, 5), "inputs": st.integers(1, 90), "bits": st.sampled_from([4, 8])}


def numbers(rows: int, inputs: int, bits: int) -> torch.Tensor:
    high = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(rows * 100 + inputs)
    return torch.randint(-high, high, (rows, inputs), generator=generator, dtype=torch.int8)


@given(**MATRICES)
@settings(max_examples=60)
def test_what_is_packed_comes_back(rows: int, inputs: int, bits: int) -> None:
    values = numbers(rows, inputs, bits)
    words = packed_ints.pack(values, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-inputs * bits // 32))
    unpacked = packed_ints.unpack(words, bits)
    assert torch.equal(unpacked[:, :inputs], values.short())
    assert (unpacked[:, inputs:] == -(1 << (bits - 1))).all(), "empty bits are 0"


@given(**MATRICES)
@settings(max_examples=30)
def test_words_are_theirs(rows: int, inputs: int, bits: int) -> None:
    values = numbers(max(rows, 1), inputs, bits)
    assert torch.equal(packed_ints.pack(values, bits), pack_to_int32(values, bits))


def test_the_first_number_stands_lowest() -> None:
    word = packed_ints.pack(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4)
    assert word.tolist() == [[0 | 1 << 4 | 15 << 8]]
    assert packed_ints.pack(torch.tensor([[-128, 0, 127]], dtype=torch.int8), 8).tolist() == [[128 << 8 | 255 << 16]]
