"""A body of /v1/completions as the requests that answer it."""

import time
import uuid
from typing import Any, NamedTuple

from moesaic.serve.http.completion_types import CompletionBody
from moesaic.serve.http.errors import refused
from moesaic.serve.http.limits import room
from moesaic.serve.http.prompts import Prompt, prompts_of
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.request import Request
from moesaic.serve.served import Served

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Call(NamedTuple):
    """A request with what its answer is made of. Choices of a prompt lie side by side, `runs` of them."""

    served: Served
    body: CompletionBody
    prompts: list[Prompt]
    requests: list[Request]
    head: dict[str, Any]

    @property
    def choices(self) -> int:
        return self.body.n or 1

    @property
    def runs(self) -> int:
        return max(self.choices, self.body.best_of or 1)


def call_of(body: CompletionBody, served: Served, settings: HttpSettings) -> Call:
    """What a body asks for, as requests of this model. Raises ApiError for what it cannot have."""
    _check(body)
    prompts = prompts_of(body.prompt, served, settings, add_special_tokens=body.add_special_tokens)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": None,
    }
    call = Call(served, body, prompts, [], head)
    if len(prompts) * call.runs > settings.max_choices and call.runs > 1:
        raise refused(f"{len(prompts)} prompts times {call.runs}; ask for at most {settings.max_choices}", "n")
    for prompt in prompts:
        most = room(served, settings, len(prompt.token_ids), _max_tokens(body))
        call.requests.extend(_request(call, prompt, most, index) for index in range(call.runs))
    return call


def _max_tokens(body: CompletionBody) -> int:
    return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise refused("suffix is not supported: these models write on, they do not fill in", "suffix")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise refused(f"best_of={body.best_of} of n={body.n}; use a best_of of at least n", "best_of")
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise refused("best_of cannot be streamed: the best is known at the end", "best_of")
    if _max_tokens(body) == 0 and not body.echo and body.prompt_logprobs is None:
        raise refused("max_tokens=0 without echo asks for nothing; use 1 or more", "max_tokens")


def _request(call: Call, prompt: Prompt, most: int, index: int) -> Request:
    body = call.body
    scored = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    ranked = call.runs > call.choices
    return Request(
        prompt_ids=prompt.token_ids,
        max_new_tokens=most,
        sampling=body.sampling(call.served.config.vocab_size).for_choice(index),
        eos_token_ids=body.ends(call.served.eos_token_ids),
        stop=body.stops,
        include_stop=body.include_stop_str_in_output,
        min_new_tokens=body.min_tokens,
        top_logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        prompt_logprobs=scored,
        grammar=body.grammar(),
        priority=body.priority,
        experts=body.experts,
    )
