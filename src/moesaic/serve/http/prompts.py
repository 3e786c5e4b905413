"""The prompts of /v1/completions and the inputs of /v1/embeddings: a text, token ids, or a list of either."""

from typing import NamedTuple

from moesaic.serve.http.errors import refused
from moesaic.serve.http.generation import TokenId
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.served import Served

PromptField = str | list[TokenId] | list[str] | list[list[TokenId]]


class Prompt(NamedTuple):
    token_ids: tuple[int, ...]
    text: str


def prompts_of(
    field: PromptField, served: Served, settings: HttpSettings, *, add_special_tokens: bool, param: str = "prompt"
) -> list[Prompt]:
    """Every prompt as token ids and as text. Raises ApiError for those that the model cannot read."""
    singles = [field] if isinstance(field, str) or _is_ids(field) else field
    if len(singles) > settings.max_prompts:
        raise refused(f"{len(singles)} prompts in one request; send at most {settings.max_prompts}", param)
    return [_prompt(each, served, add_special_tokens, param) for each in singles]  # pyright: ignore[reportArgumentType]


def _is_ids(field: PromptField) -> bool:
    return not field or isinstance(field[0], int)


def _prompt(given: str | list[int], served: Served, add_special_tokens: bool, param: str) -> Prompt:
    if isinstance(given, str):
        ids = served.tokenizer.encode(given, add_special_tokens=add_special_tokens)
        return Prompt(_not_empty(ids, param), given)
    ids = known_ids(given, served, param)
    return Prompt(_not_empty(ids, param), served.tokenizer.decode(ids, skip_special_tokens=False))


def known_ids(token_ids: list[int], served: Served, param: str) -> list[int]:
    """The same ids. Raises ApiError for one that the model does not know."""
    unknown = [token_id for token_id in token_ids if token_id >= served.config.vocab_size]
    if unknown:
        raise refused(f"token id {unknown[0]} in a vocabulary of {served.config.vocab_size}", param)
    return token_ids


def _not_empty(token_ids: list[int], param: str) -> tuple[int, ...]:
    if not token_ids:
        raise refused(f"the {param} is empty; send at least one token", param, "invalid_value")
    return tuple(token_ids)
