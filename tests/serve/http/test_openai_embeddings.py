"""Embeddings, asked by the official client, beside the plain decoder's hidden states."""

import openai
import pytest
import torch

from tests.serve import tiny
from tests.serve.http.conftest import LONG, MODEL, long_engine
from tests.tiny import lively_decoder

TEXTS = ["the quick brown fox", "a", tiny.TEXT[:900]]  # one is longer than a step


@torch.no_grad()
def expected(text: str) -> torch.Tensor:
    ids = torch.tensor([tiny.tokenizer().encode(text)])
    mean_D = lively_decoder(long_engine().config).eval().hidden(ids)[0].mean(0)
    return mean_D / mean_D.norm()


def test_a_vector_of_each_text(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model=LONG, input=TEXTS)  # it asks for base64, and decodes it
    assert [each.index for each in found.data] == [0, 1, 2]
    for each, text in zip(found.data, TEXTS, strict=True):
        assert torch.allclose(torch.tensor(each.embedding), expected(text), atol=1e-5)
    num_tokens = sum(len(tiny.tokenizer().encode(text)) for text in TEXTS)
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (num_tokens, num_tokens)


def test_token_ids_and_numbers(client: openai.OpenAI) -> None:
    ids = tiny.tokenizer().encode(TEXTS[0])
    of_text = client.embeddings.create(model=LONG, input=TEXTS[0], encoding_format="float").data[0].embedding
    assert client.embeddings.create(model=LONG, input=ids, encoding_format="float").data[0].embedding == of_text
    assert client.embeddings.create(model=LONG, input=TEXTS[0], dimensions=24).data[0].embedding == of_text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": MODEL, "input": "fox"}, "makes no embeddings"),
        ({"model": LONG, "input": ""}, "the input is empty"),
        ({"model": LONG, "input": []}, "the input is empty"),
        ({"model": LONG, "input": [99999]}, "token id 99999"),
        ({"model": LONG, "input": "fox", "dimensions": 7}, "vectors of 'tiny-long' have 24"),
        ({"model": LONG, "input": "fox " * 5000}, "maximum context length"),
    ],
)
def test_what_cannot_be(client: openai.OpenAI, asked: dict[str, object], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.embeddings.create(**asked)  # pyright: ignore[reportArgumentType]
