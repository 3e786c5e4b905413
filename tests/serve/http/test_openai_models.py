"""Models and tokens, asked by the official client."""

from typing import Any

import openai
import pytest

from tests.serve import tiny
from tests.serve.http.conftest import LONG, MODEL, Server


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, LONG]
    assert client.models.retrieve(MODEL).created == 1
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def post(client: openai.OpenAI, server: Server, path: str, body: dict[str, Any]) -> Any:
    return client.post(f"{server.url}{path}", body=body, cast_to=object)


def test_tokens_of_a_text_and_back(client: openai.OpenAI, server: Server) -> None:
    found = post(client, server, "/tokenize", {"model": MODEL, "prompt": "naïve fox", "return_token_strs": True})
    assert found["tokens"] == tiny.tokenizer().encode("naïve fox")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 512)
    assert len(found["token_strs"]) == found["count"]
    assert post(client, server, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": "naïve fox"}


def test_tokens_of_a_conversation(client: openai.OpenAI, server: Server) -> None:
    found = post(client, server, "/tokenize", {"messages": [{"role": "user", "content": "fox"}]})
    text = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    assert found["tokens"] == tiny.tokenizer().encode(text)


def test_tokens_that_there_are_not(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 99999 in a vocabulary"):
        post(client, server, "/detokenize", {"tokens": [99999]})
