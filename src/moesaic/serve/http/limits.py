"""How long an answer may be."""

from moesaic.serve.http.errors import refused
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.served import Served


def room(served: Served, settings: HttpSettings, num_prompt: int, asked: int | None, param: str = "max_tokens") -> int:
    """New tokens that a request may have; `asked`: by the client, None or -1: all that there is room for. Raises
    ApiError where the context is too short.

    A server's own limit is no error, as it is none at vLLM: clients ask for as many as their author's model took.
    """
    asked = None if asked == -1 else asked
    left = served.max_length - num_prompt
    too_long = (
        f"This model's maximum context length is {served.max_length} tokens, but the prompt has {num_prompt}"
        f"{'' if asked is None else f' and {asked} more are asked for'}. Shorten the prompt or ask for fewer."
    )
    if left < 1 or (asked or 0) > left:
        raise refused(too_long, param if left >= 1 else None, "context_length_exceeded")
    wanted = left if asked is None else asked
    return wanted if settings.max_new_tokens is None else min(wanted, settings.max_new_tokens)
