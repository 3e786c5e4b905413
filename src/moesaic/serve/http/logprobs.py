"""Log probabilities in the shapes that clients read.

N tokens.
"""

from collections.abc import Sequence
from typing import Any

from moesaic.serve.http.bodies import Answer
from moesaic.serve.request import TokenInfo
from moesaic.serve.text.token_texts import TokenTexts


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class PromptLogprob(Answer):
    logprob: float
    rank: int | None
    decoded_token: str


def completion_logprobs(tokens: Sequence[TokenInfo], texts: TokenTexts, offset: int) -> dict[str, list[Any]]:
    """Of /v1/completions; offset: characters before the first token."""
    spelled = [texts.text_of(info.token_id) for info in tokens]
    offsets = []
    for info in tokens:
        offsets.append(offset)
        offset += len(texts.bytes_of(info.token_id).decode(errors="ignore"))
    return {
        "tokens": spelled,
        "token_logprobs": [info.logprob for info in tokens],
        "top_logprobs": [_top(info, texts) for info in tokens],
        "text_offset": offsets,
    }


def _top(info: TokenInfo, texts: TokenTexts) -> dict[str, float] | None:
    """The likeliest and the token itself; of tokens that are spelled alike the likelier."""
    if info.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in (*info.top, (info.token_id, info.logprob)):
        found.setdefault(texts.text_of(token_id), logprob)
    return found


def chat_logprobs(tokens: Sequence[TokenInfo], texts: TokenTexts) -> list[dict[str, Any]]:
    """Of /v1/chat/completions and /v1/responses."""
    return [
        {
            **_one(info.token_id, info.logprob or 0.0, texts),
            "top_logprobs": [_one(token_id, logprob, texts) for token_id, logprob in info.top],
        }
        for info in tokens
    ]


def _one(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text_of(token_id), "logprob": logprob, "bytes": list(texts.bytes_of(token_id))}


def prompt_logprobs(tokens: Sequence[TokenInfo], texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's shape: by token id, of the token and of the likeliest; None for the first token."""
    return [None if info.logprob is None else _ranked(info, texts) for info in tokens]


def _ranked(info: TokenInfo, texts: TokenTexts) -> dict[str, Any]:
    """A token that is not among the likeliest has no rank: nobody counted."""
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(info.top, 1)]
    if info.token_id not in {token_id for token_id, _, _ in ranked}:
        ranked.append((info.token_id, info.logprob or 0.0, None))  # pyright: ignore[reportArgumentType]
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": texts.text_of(token_id)}
        for token_id, logprob, rank in ranked
    }
