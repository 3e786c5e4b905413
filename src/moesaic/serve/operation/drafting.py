"""Who drafts for a model, as its settings say, under a guard that lets through what is predicted to pay."""

from moesaic.data.open_tokenizer import open_tokenizer
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.serve.operation.settings import ModelSettings
from moesaic.serve.speculation.drafter import Drafter
from moesaic.serve.speculation.guard import Guard
from moesaic.serve.speculation.model import AheadDrafter, ModelDrafter, check_same_tokens
from moesaic.serve.speculation.ngram import NgramDrafter
from moesaic.serve.speculation.times import StepTimes, bytes_touched


def drafter_of(settings: ModelSettings, engine: Engine, tokenizer: Tokenizer) -> Drafter | None:
    """A drafter of its own for one loop; None: no drafts. Raises MoesaicError for a draft model that does not fit."""
    drafter = _unguarded(settings, engine, tokenizer)
    if drafter is None:
        return None
    return Guard(drafter, StepTimes(bytes_touched(engine.config, engine.program.packed_bytes)))


def _unguarded(settings: ModelSettings, engine: Engine, tokenizer: Tokenizer) -> Drafter | None:
    if settings.speculation == "off":
        return None
    if settings.speculation == "ngram":
        return NgramDrafter()
    if settings.speculation == "mtp":
        return AheadDrafter(engine)
    assert settings.draft is not None
    check_same_tokens(tokenizer, open_tokenizer(settings.draft))
    bits, threads = settings.bits, settings.threads
    return ModelDrafter(
        Engine(settings.draft, bits=bits, threads=threads, max_length=settings.max_length),  # pyright: ignore[reportArgumentType]
        engine.config.vocab_size,
    )
