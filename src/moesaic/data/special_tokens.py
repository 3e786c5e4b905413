"""The names of special tokens that encoder-decoders need: sentinels, and languages."""

NUM_SENTINELS = 100  # as many as T5's vocabulary has


def sentinel(number: int) -> str:
    """The text of a sentinel token, as T5's vocabulary has them."""
    return f"<extra_id_{number}>"


def sentinels(count: int) -> tuple[str, ...]:
    """`count` sentinel tokens as T5 orders them: the first one has the largest id."""
    return tuple(sentinel(number) for number in reversed(range(count)))


def language_token(language: str) -> str:
    """The text of a token that names a language."""
    return f"<|{language}|>"
