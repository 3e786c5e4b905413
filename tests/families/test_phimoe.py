"""Phi-3.5-MoE's long texts, which transformers 5.23 turns by the factors for short ones."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.engine.generate import generate
from moesaic.errors import GenerationError
from moesaic.hub import load
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder

CASE = "phimoe/as released"
LIMIT = 32  # its original_max_position_embeddings
TOLERANCE = 1e-5


@pytest.fixture
def oracle(made: Any) -> Any:
    return made(CASE)


@pytest.fixture
def model(oracle: Any) -> Decoder:
    return decoder_only(load(oracle.folder), "this test")


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(8))


def assert_same(seen: Tensor, expected: Tensor) -> None:
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor, *, told: bool) -> Tensor:
    """told: their rotary embedding learns how long the text is, as in the authors' code and in transformers 4."""
    rotary = model.model.rotary_emb
    plain = rotary.rope_init_fn
    if told:
        rotary.rope_init_fn = lambda config: plain(config, seq_len=ids_BS.shape[1])
    try:
        return model(input_ids=ids_BS).logits
    finally:
        rotary.rope_init_fn = plain


@torch.no_grad()
@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1, 50])
def test_long_texts_are_turned_by_their_own_factors(model: Decoder, oracle: Any, length: int) -> None:
    seen = model(ids(length))
    assert_same(seen, their_logits(oracle.model, ids(length), told=True))
    untold = their_logits(oracle.model, ids(length), told=False)
    assert ((seen - untold).abs().max() > 1e-2) == (length > LIMIT), "transformers no longer differs: use it as it is"


@torch.no_grad()
def test_texts_of_a_batch_do_not_stretch_each_other(model: Decoder) -> None:
    ids_BS = ids(40, batch=2)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[1, :20] = False
    seen = model(ids_BS, mask_BS)
    assert_same(seen[0], model(ids_BS[:1])[0])
    assert_same(seen[1, 20:], model(ids_BS[1:, 20:])[0])


@torch.no_grad()
@pytest.mark.parametrize("total", [60, 600])
def test_documents_of_a_row_do_not_stretch_each_other(model: Decoder, total: int) -> None:
    ids_1S = ids(total)
    cuts = (0, 20, 55, total)
    document_ids = torch.cat([torch.full((1, end - start), end) for start, end in pairwise(cuts)], 1)
    seen = model(ids_1S, document_ids_BS=document_ids)
    for start, end in pairwise(cuts):
        assert_same(seen[:, start:end], model(ids_1S[:, start:end]))


@torch.no_grad()
def test_a_cache_takes_no_text_past_the_limit_but_from_its_start(model: Decoder) -> None:
    cache = KeyValueCache(model.config, batch_size=1, max_length=60)
    model(ids(LIMIT), cache=cache)
    assert not cache.takes(1)
    with pytest.raises(GenerationError, match=r"a text grows past 32 tokens.*roll the cache back to 0"):
        model(ids(1), cache=cache)
    cache.rollback(0)
    seen = torch.cat([model(part, cache=cache) for part in ids(50).split([40, 1, 9], dim=1)], dim=1)
    assert_same(seen, model(ids(50)))
    with pytest.raises(GenerationError, match="longer than 32 tokens cannot be rolled back"):
        cache.rollback(LIMIT)
    cache.rollback(LIMIT + 1)


@torch.no_grad()
@pytest.mark.parametrize("starts", [(28,), (28, 30, 5)])
def test_writing_on_past_the_limit(model: Decoder, starts: tuple[int, ...]) -> None:
    prompts = [ids(start)[0].tolist() for start in starts]
    written = generate(model, prompts, max_new_tokens=8, eos_token_ids=())
    for prompt, new in zip(prompts, written, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert new == text[len(prompt) :]
