"""What /v1/completions takes and gives."""

from typing import Literal

from pydantic import Field

from moesaic.serve.http.bodies import Answer
from moesaic.serve.http.generation import Count, GenerationFields, Unlimited
from moesaic.serve.http.logprobs import CompletionLogprobs, PromptLogprob
from moesaic.serve.http.prompts import PromptField
from moesaic.serve.http.usage import UsageAnswer
from moesaic.serve.request import MAX_TOP_LOGPROBS


class CompletionBody(GenerationFields):
    model: str
    prompt: PromptField
    max_tokens: Count | Unlimited | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: str | None = None
    add_special_tokens: bool = True
    store: bool | None = None


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer | None = None
