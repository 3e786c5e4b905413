"""What a model learns: which batches it is trained on, and what it is judged by. `data.task` names one of `TASKS`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from moesaic.config import ModelConfig
from moesaic.data.loader import Batches
from moesaic.data.packed import Packed
from moesaic.data.sourced import SourcedBatch, with_others_sources
from moesaic.data.span_corruption import SpanBatches, SpanCorruption, held_out_spans
from moesaic.data.translation import PairBatches, Pairs, held_out_pairs
from moesaic.errors import ConfigError
from moesaic.evaluate.perplexity import HeldOutLoss, held_out_loss
from moesaic.evaluate.targets import target_loss
from moesaic.models.build import Model, decoder_only
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.registry import Registry
from moesaic.train.micro_batches import AnyBatch
from moesaic.train.recipe import DataSettings, TrainSettings, refuse_unfit_task


class Setting(NamedTuple):
    """What a task is made of: the text, two tables of the recipe, and the model's description."""

    text: Packed | Pairs
    train: TrainSettings
    data: DataSettings
    model: ModelConfig

    @property
    def num_batches(self) -> int:
        """Of the whole run."""
        return self.train.steps * self.train.micro_batches

    @property
    def start_id(self) -> int:
        """What a decoder reads first: the model's own, or the text's eos."""
        own = self.model.decoder_start_token_id
        return self.text.eos_id if own is None else own


class NumberedBatches(Protocol):
    """Batches that are pure functions of their numbers."""

    def batch(self, number: int) -> AnyBatch:
        """The batch of this number, counted from 0."""
        ...


class Task(Protocol):
    """names: of the domains that batches and losses tell apart. facts: what a resumed run must find again, as JSON.

    num_left_out: pairs that are too long for the sequence.
    """

    names: tuple[str, ...]
    batches: NumberedBatches
    facts: dict[str, Any]
    num_left_out: int

    def held_out_loss(self, model: Model, max_tokens: int) -> HeldOutLoss:
        """The loss on held-out text, of at most `max_tokens` a domain."""
        ...

    def misled_loss(self, model: Model, max_tokens: int) -> HeldOutLoss | None:
        """The same after the sources of other targets: what a model loses by it, it reads there. None without any."""
        ...


TASKS: Registry[Callable[[Setting], Task]] = Registry("data.task")


def task_of(text: Packed | Pairs, train: TrainSettings, data: DataSettings, model: ModelConfig) -> Task:
    """The task that a recipe asks for. Raises ConfigError when model or text are of another kind, DataError when the
    text is too little."""
    refuse_unfit_task(data, model)
    return TASKS[data.task](Setting(text, train, data, model))


@TASKS.register("causal")
class Causal:
    """Every token from those before it."""

    num_left_out = 0

    def __init__(self, setting: Setting) -> None:
        self.text, self.setting = _packed(setting), setting
        self.batches: NumberedBatches = _windows(setting)
        self.names = self.text.names
        self.facts = _token_facts(self.text)

    def held_out_loss(self, model: Model, max_tokens: int) -> HeldOutLoss:
        """See Task."""
        return held_out_loss(
            decoder_only(model, "the task causal"),
            self.text,
            sequence_length=self.setting.train.sequence_length,
            max_tokens=max_tokens,
            document_attention=self.setting.data.document_attention,
        )

    def misled_loss(self, model: Model, max_tokens: int) -> HeldOutLoss | None:
        """There are no sources."""
        return None


class _WithSources(ABC):
    """What the tasks of encoder-decoders have in common."""

    num_left_out = 0

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def held_out(self, max_tokens: int) -> dict[str, Iterator[SourcedBatch]]:
        """Held-out batches by name, of at most about `max_tokens` each."""

    def held_out_loss(self, model: Model, max_tokens: int) -> HeldOutLoss:
        """See Task."""
        return self._loss(model, self.held_out(max_tokens))

    def misled_loss(self, model: Model, max_tokens: int) -> HeldOutLoss | None:
        """See Task."""
        held_out = self.held_out(max_tokens)
        return self._loss(model, {name: map(with_others_sources, batches) for name, batches in held_out.items()})

    def _loss(self, model: Model, batches: Mapping[str, Iterator[SourcedBatch]]) -> HeldOutLoss:
        assert isinstance(model, EncoderDecoder), "checked when the task was made"
        return target_loss(model, batches, self.setting.text.byte_lengths)


@TASKS.register("span_corruption")
class Spans(_WithSources):
    """What was taken out of a text (data/span_corruption.py)."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.text, data = _packed(setting), setting.data
        self.corruption = SpanCorruption(
            sentinel_ids=self.text.sentinel_ids,
            eos_id=self.text.eos_id,
            noise_density=data.noise_density,
            mean_span_length=data.mean_span_length,
        )
        self.batches: NumberedBatches = SpanBatches(_windows(setting), self.corruption, setting.start_id)
        self.names = self.text.names
        self.facts = _token_facts(self.text)

    def held_out(self, max_tokens: int) -> dict[str, Iterator[SourcedBatch]]:
        """By domain; `max_tokens` of text."""
        length = self.setting.train.sequence_length
        return held_out_spans(self.text, self.corruption, length, max_tokens, self.setting.start_id)


@TASKS.register("translation")
class Translation(_WithSources):
    """A text in another language (data/translation.py). Directions without weight are not evaluated either."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not isinstance(setting.text, Pairs):
            raise ConfigError("data.task='translation' learns from pairs of texts, and this is text; see data/pairs.py")
        self.pairs, train, data = setting.text, setting.train, setting.data
        batches = PairBatches(
            self.pairs,
            train.batch_size,
            train.sequence_length,
            train.seed,
            setting.start_id,
            data.weights,
            epochs=data.epochs,
            num_batches=setting.num_batches,
        )
        self.batches: NumberedBatches = batches
        self.names, self.num_left_out = batches.names, batches.num_left_out
        self._directions = [d for d in batches.directions if batches.shares[d.name]]
        self.facts = {"pairs": {direction.name: len(numbers) for direction, numbers in self.pairs.train.items()}}

    def held_out(self, max_tokens: int) -> dict[str, Iterator[SourcedBatch]]:
        """By direction; `max_tokens` of targets."""
        length = self.setting.train.sequence_length
        return held_out_pairs(self.pairs, self._directions, length, max_tokens, self.setting.start_id)


def _packed(setting: Setting) -> Packed:
    if not isinstance(setting.text, Packed):
        raise ConfigError(f"data.task={setting.data.task!r} learns from text, and these are pairs; use 'translation'")
    return setting.text


def _windows(setting: Setting) -> Batches:
    train, data = setting.train, setting.data
    return Batches(
        _packed(setting),
        train.batch_size,
        train.sequence_length,
        train.seed,
        data.weights,
        epochs=data.epochs,
        num_batches=setting.num_batches,
    )


def _token_facts(text: Packed) -> dict[str, Any]:
    return {"tokens": {domain.name: len(domain.train) for domain in text.domains}}
