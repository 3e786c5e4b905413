"""Fields of requests that change nothing here."""

from typing import Any, Literal

from pydantic import Field

from moesaic.serve.http.bodies import Body


class NeutralFields(Body):
    """The first ones speak of accounts and of machines, or of searches that are not made. The others may only say what
    is so here anyway: frameworks send them, at the values that they have in vLLM and in llama.cpp's server unless
    someone asks for more.
    """

    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    request_id: str | None = None
    guided_decoding_backend: str | None = None
    spaces_between_special_tokens: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None

    skip_special_tokens: Literal[True] | None = None
    return_token_ids: Literal[False] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    detokenize: Literal[True] | None = None
    bad_words: list[str] | None = Field(None, max_length=0)
    truncate_prompt_tokens: None = None
    allowed_token_ids: None = None
    logits_processors: None = None
    mm_processor_kwargs: None = None
    kv_transfer_params: None = None
    vllm_xargs: None = None
    guided_whitespace_pattern: None = None
    moderation: None = None

    cache_prompt: Literal[True] | None = None
    typical_p: Literal[1] | None = None
    mirostat: Literal[0] | None = None
