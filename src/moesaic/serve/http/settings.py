"""How the server treats what clients send."""

from dataclasses import dataclass

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """max_choices: continuations of one request (its prompts times n). max_prompts: in one request. max_depth: of
    nested JSON. max_new_tokens: of an answer, also where a request asks for more; None: up to the context's
    end.
    stored_responses: of /v1/responses, to be gone on from; the oldest are forgotten. template_time_s: of a chat
    template.
    """

    max_choices: int = 128
    max_prompts: int = 1024
    max_depth: int = 64
    max_new_tokens: int | None = None
    stored_responses: int = 256
    template_time_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("max_choices", "max_prompts", "max_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; use 1 or more")
        if self.stored_responses < 0:
            raise ConfigError(f"stored_responses={self.stored_responses}; use 0 (none are kept) or more")
