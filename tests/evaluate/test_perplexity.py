import math

import numpy as np
import pytest
import torch

from moesaic.data.packed import Packed, PackedDomain
from moesaic.evaluate.perplexity import held_out_load, held_out_loss
from tests.tiny import lively, tiny_config

MODEL = lively(tiny_config(windows=(None, None)))


def packed(num_tokens):
    ids = np.random.default_rng(0).integers(1, 61, num_tokens).astype(np.uint16)
    lengths = np.arange(61, dtype=np.int64) % 3 + 1
    domain = PackedDomain(name="noise", train=ids, held_out=ids)
    return Packed(domains=(domain,), byte_lengths=lengths, eos_id=0), ids, lengths


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 100])
def test_bits_per_byte_by_hand(num_tokens):
    """Windows of 16, the last one cut: every token but the first is scored once, in its window's context."""
    text, ids, lengths = packed(num_tokens)
    nats = 0.0
    for start in range(0, num_tokens - 1, 16):
        window = torch.from_numpy(ids[start : start + 17].astype(np.int64))
        with torch.no_grad():
            logits = MODEL(window[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    expected = nats / math.log(2) / lengths[ids[1:]].sum()
    loss = held_out_loss(MODEL, text, sequence_length=16)
    assert loss.by_domain["noise"] == pytest.approx(expected, rel=1e-5)
    assert loss.bits_per_byte == loss.by_domain["noise"]


def test_it_leaves_the_model_as_it_was():
    MODEL.train()
    held_out_loss(MODEL, packed(40)[0], sequence_length=16)
    assert MODEL.training
    MODEL.eval()


def test_the_load_counts_scored_tokens_only():
    load = held_out_load(MODEL, packed(23)[0], sequence_length=16, max_tokens=1000)
    assert [layer.num_tokens for layer in load.layers] == [22]
    assert load.layers[0].counts_E.sum() == 22 * 2


def test_documents_are_scored_by_themselves_where_training_kept_them_apart():
    """A window of several documents costs what each of them costs alone."""
    text, ids, lengths = packed(17)
    ids[[0, 5, 11]] = 0
    nats = 0.0
    for begin, end in ((0, 5), (5, 11), (11, 17)):
        document = torch.from_numpy(ids[begin : min(end + 1, 17)].astype(np.int64))
        with torch.no_grad():
            logits = MODEL(document[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum").item()
    loss = held_out_loss(MODEL, text, sequence_length=16, document_attention=True)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / lengths[ids[1:]].sum(), rel=1e-5)
    assert loss.bits_per_byte != pytest.approx(held_out_loss(MODEL, text, sequence_length=16).bits_per_byte, rel=1e-4)
