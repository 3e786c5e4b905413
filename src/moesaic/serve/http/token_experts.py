"""Which experts the tokens of an answer were made by, for clients that ask (`experts`)."""

from collections.abc import Set
from typing import Any

from moesaic.serve.request import Progress
from moesaic.serve.text.token_texts import TokenTexts


def token_experts(event: Progress, texts: TokenTexts, ends: Set[int] = frozenset()) -> dict[str, Any]:
    """The field "moesaic" of a streamed choice: `tokens` as texts, and `experts`, by layer those of each token.

    Tokens that are ends (ids) are left out, and -1, which is no expert. Empty for requests that did not ask.
    """
    if event.experts is None:
        return {}
    shown = [place for place, info in enumerate(event.tokens) if info.token_id not in ends]
    tokens = [texts.bytes_of(event.tokens[place].token_id).decode(errors="replace") for place in shown]
    experts = {
        str(layer): [[int(expert) for expert in ids_TM[place] if expert >= 0] for place in shown]
        for layer, ids_TM in event.experts.items()
    }
    return {"moesaic": {"tokens": tokens, "experts": experts}} if shown else {}
