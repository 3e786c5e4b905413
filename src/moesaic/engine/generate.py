"""Writing on from a prompt, or a target for a source, token by token.

B batch, S sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.engine.sampling import Sampling, sample
from moesaic.errors import GenerationError
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.build import Model
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.routing import RoutingTape

Prompts = Sequence[int] | Sequence[Sequence[int]] | Tensor


class _Options(TypedDict, total=False):
    """The keyword arguments of `generate`, for its overloads."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    eos_token_ids: Iterable[int] | None
    on_token: Callable[[int, int], None] | None
    cache: KeyValueCache | None
    tape: RoutingTape | None
    target_prefix: Sequence[int]


@overload
def generate(
    model: Model, prompt_ids: Sequence[int], max_new_tokens: int = ..., **options: Unpack[_Options]
) -> list[int]: ...
@overload
def generate(
    model: Model, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int = ..., **options: Unpack[_Options]
) -> list[list[int]]: ...
@overload
def generate(
    model: Model, prompt_ids: Tensor, max_new_tokens: int = ..., **options: Unpack[_Options]
) -> list[int] | list[list[int]]: ...
@torch.no_grad()
def generate(
    model: Model,
    prompt_ids: Prompts,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_ids: Iterable[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    cache: KeyValueCache | None = None,
    tape: RoutingTape | None = None,
    target_prefix: Sequence[int] = (),
) -> list[int] | list[list[int]]:
    """Continue one prompt (token ids) or several (a list of them, lengths may differ).

    Where the model has an encoder, the prompts are sources, and what is returned are their targets. These begin with
    the model's decoder_start_token_id and `target_prefix` (for NLLB the token of a language), which are not returned.

    Returns the new token ids only: one list for one prompt, a list of lists for several. A sequence ends with an
    end-of-sequence token (kept; by default those of the model's configuration), after `max_new_tokens`, or where the
    context is full. temperature 0 is greedy; the same seed gives the same text. `on_token(sequence, token_id)` hears
    each token as it is made. `cache` continues a conversation: it must hold a prefix of the one prompt.
    `tape` hears the routing of the prompts and then of each new token, or dictates it. (Where a text outgrows what its
    cache takes, as with LongRoPE, it is written anew as a whole, and the tape hears that.)

    Raises GenerationError for an empty prompt, a token id outside the vocabulary, or a prompt as long as the context,
    and for a cache that is handed to a model with an encoder, or a target_prefix to one without.
    """
    prompts, single = _as_lists(prompt_ids)
    check_prompts(model.config, prompts, max_new_tokens, model.config.context_length)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    stops = frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    sources = prompts
    if isinstance(model, EncoderDecoder):
        prompts = [_target_start(model, target_prefix, cache)] * len(sources)
    elif target_prefix:
        raise GenerationError("target_prefix for a model without an encoder; put it at the end of the prompt")
    longest = max(map(len, prompts))
    budget = min(max_new_tokens, model.config.context_length - longest)
    if cache is None:
        cache = _new_cache(model, len(prompts), longest + budget)
    if isinstance(model, EncoderDecoder):
        model.read(*_pad_left(sources, model.embedding.weight.device), cache=cache, tape=tape)
    written = _write(model, prompts, budget, sampling, stops, cache, on_token, tape)
    return written[0] if single else written


def _target_start(model: EncoderDecoder, prefix: Sequence[int], cache: KeyValueCache | None) -> list[int]:
    """What every target begins with."""
    start, vocab = model.config.decoder_start_token_id, model.config.vocab_size
    if cache is not None:
        raise GenerationError("a cache for a model with an encoder, whose targets do not go on; leave it out")
    if start is None:
        raise GenerationError("this model has no decoder_start_token_id, which targets begin with; set it")
    if not all(0 <= token < vocab for token in prefix):
        raise GenerationError(f"target_prefix={list(prefix)}; the model knows tokens 0 to {vocab - 1}")
    if len(prefix) + 1 >= model.config.context_length:
        raise GenerationError(
            f"a target_prefix of {len(prefix)} tokens leaves no room in a context of "
            f"{model.config.context_length}; shorten it"
        )
    return [start, *prefix]


def _write(
    model: Model,
    prompts: list[list[int]],
    budget: int,
    sampling: Sampling,
    stops: frozenset[int],
    cache: KeyValueCache,
    on_token: Callable[[int, int], None] | None,
    tape: RoutingTape | None,
) -> list[list[int]]:
    device = model.embedding.weight.device
    generator = sampling.generator()
    written: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    new_ids, mask = _pad_left([prompt[cache.length :] for prompt in prompts], device)
    for _ in range(budget):
        if not cache.takes(new_ids.shape[1]):
            cache.rollback(0)
            texts = [[*prompt, *own] for prompt, own in zip(prompts, written, strict=True)]
            new_ids, mask = _pad_left(texts, device)
        hidden = model.hidden(new_ids, mask, cache=cache, tape=tape)
        chosen = sample(model.logits(hidden[:, -1]).float().cpu(), sampling, generator).tolist()
        for sequence, token in enumerate(chosen):
            if running[sequence]:
                written[sequence].append(token)
                running[sequence] = token not in stops
                if on_token:
                    on_token(sequence, token)
        if not any(running):
            break
        new_ids, mask = torch.tensor(chosen, device=device)[:, None], None
    return written


def _new_cache(model: Model, batch_size: int, max_length: int) -> KeyValueCache:
    weight = model.embedding.weight
    return KeyValueCache(
        model.config, batch_size=batch_size, max_length=max_length, dtype=weight.dtype, device=weight.device
    )


def _as_lists(prompt_ids: Prompts) -> tuple[list[list[int]], bool]:
    ids = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else list(prompt_ids)
    if ids and not isinstance(ids[0], int):
        return [list(cast(Sequence[int], prompt)) for prompt in ids], False
    return [cast(list[int], ids)], True


def check_prompts(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int, context: int) -> None:
    """Raise GenerationError for prompts that are empty, as long as the context, or of unknown token ids."""
    vocab = config.vocab_size
    if max_new_tokens < 0:
        raise GenerationError(f"max_new_tokens={max_new_tokens}; use 0 or more")
    for prompt in prompts:
        if not prompt:
            raise GenerationError("an empty prompt; give at least one token (the model's bos token, for example)")
        if len(prompt) >= context:
            raise GenerationError(
                f"a prompt of {len(prompt)} tokens leaves no room in a context of {context}; "
                f"shorten it to {context - 1} tokens or fewer"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise GenerationError(
                f"token ids {min(prompt)} to {max(prompt)} in the prompt; the model knows 0 to {vocab - 1}"
            )


def _pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor, shorter ones padded in front, and the mask (None when there is no padding)."""
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids_BS, None
    missing_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return ids_BS, torch.arange(longest, device=device) >= missing_B[:, None]
