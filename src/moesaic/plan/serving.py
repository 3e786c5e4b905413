"""A model on a machine that answers: what it holds, how long a step takes, how that grows with the batch, its price."""

from dataclasses import dataclass
from typing import NamedTuple

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.plan.cost import Rates, dollars_per_million
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Machine
from moesaic.plan.layout import Layout, candidates
from moesaic.plan.memory import DeviceMemory, most_texts, serving_memory, stage_memories
from moesaic.plan.roofline import Speculation, StepTime, decode_step, prefill_step, step_time
from moesaic.plan.routing import Routing, Uniform

PIECE_TOKENS = 8192
"""Of prompts, in one step of one copy of attention."""
SERVER_KINDS = ("gpu", "cpu", "tpu", "mac")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, where, and how.

    users: texts written at once. context: tokens that each may have. overlap: see roofline.StepTime.
    """

    config: ModelConfig
    formats: Formats
    machine: Machine
    layout: Layout
    context: int
    users: int
    routing: Routing
    speculation: Speculation
    overlap: float = 0.0
    mtp: bool = False

    @property
    def memory(self) -> DeviceMemory:
        """Of the fullest device."""
        return serving_memory(
            self.config,
            self.formats,
            self.machine.device,
            self.layout,
            context=self.context,
            texts=max(self.users, self.layout.dp),
            mtp=self.mtp,
        )

    @property
    def stages(self) -> list[DeviceMemory]:
        """Of a device of each pipeline stage; those of one stage hold as much each."""
        return stage_memories(
            self.config,
            self.formats,
            self.layout,
            self.memory,
            context=self.context,
            texts=max(self.users, self.layout.dp),
            mtp=self.mtp,
        )

    @property
    def most_users(self) -> int:
        """The most texts of this context that fit at once."""
        return most_texts(self.config, self.formats, self.machine.device, self.layout, context=self.context)

    def decode(self, users: int | None = None) -> StepTime:
        """A step that writes one more token, and checks drafts, of `users` texts that are half as long as may be."""
        texts = max(users or self.users, 1)
        return self._time(decode_step(texts, max(1, self.context // 2), self.speculation))

    def prefill(self) -> StepTime:
        """A step that reads prompts, as many tokens as a copy of attention takes at once."""
        length = min(self.context, PIECE_TOKENS)
        texts = max(1, PIECE_TOKENS // length) * self.layout.dp
        return self._time(prefill_step(texts, length))

    def first_token(self) -> float:
        """Seconds that one prompt of half the context waits for its first token, where nothing else is in the way."""
        return self._time(prefill_step(1, max(1, self.context // 2))).seconds

    def _time(self, step) -> StepTime:
        return step_time(
            self.config, self.formats, step, self.machine.device, self.layout, self.routing, overlap=self.overlap
        )

    def tokens_per_second(self, users: int | None = None) -> float:
        """That all users together get."""
        step = self.decode(users)
        texts = max(users or self.users, 1)
        return texts * self.speculation.tokens_per_step / (step.seconds * (1 + self.speculation.draft_cost))

    def rates(self) -> Rates:
        step = self.prefill()
        return Rates(
            prefill=step.step.tokens / step.seconds,
            decode=self.tokens_per_second(),
            dollars_per_hour=self.machine.price,
            watts=self.machine.watts,
        )


class CurvePoint(NamedTuple):
    """One batch: seconds a step, tokens a second of one user and of all, dollars a million; whether it fits."""

    users: int
    seconds: float
    user_rate: float
    rate: float
    dollars: float | None
    distinct: float
    by: str
    fits: bool


def batch_curve(serving: Serving, most: int | None = None) -> list[CurvePoint]:
    """Batches of 1, 2, 4, ... and the largest that fits."""
    fitting = serving.most_users if most is None else most
    batches: set[int] = {1 << power for power in range(11)} | ({fitting} if 0 < fitting < 2**14 else set())
    return [_point(serving, batch, fitting) for batch in sorted(batches)]


def _point(serving: Serving, users: int, fitting: int) -> CurvePoint:
    step = serving.decode(users)
    rate = serving.tokens_per_second(users)
    price = serving.machine.price
    dollars = None if price is None else dollars_per_million(price, rate)
    return CurvePoint(
        users,
        step.seconds,
        rate / users,
        rate,
        dollars,
        distinct_share(serving, users),
        step.bound_by,
        users <= fitting,
    )


def distinct_share(serving: Serving, users: int) -> float:
    """The share of the experts of its first MoE layer that a step of so many texts reads; 1 without experts."""
    layers = serving.config.moe_layers
    if not layers:
        return 1.0
    moe = serving.config.layers[layers[0]].feed_forward
    tokens = users * (1 + serving.speculation.drafts) / serving.layout.expert_copies
    return serving.routing.distinct(moe, layers[0], tokens) / moe.num_experts  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def best_layout(serving: Serving) -> Layout:
    """Of the usual layouts that fit the fastest at this batch; where none fits, that with the most room left.

    Raises ConfigError where not one divides the model.
    """
    found = candidates(serving.config, serving.machine)
    if not found:
        raise ConfigError(
            f"no layout of {serving.machine.name} divides this {serving.config.family} model; use another number of "
            "devices, such as 1, 2, 4 or 8"
        )
    rooms = {layout: _with(serving, layout).memory for layout in found}
    fitting = [layout for layout in found if rooms[layout].fits]
    if not fitting:
        return max(found, key=lambda layout: rooms[layout].free)
    return min(fitting, key=lambda layout: _with(serving, layout).decode().seconds)


def _with(serving: Serving, layout: Layout) -> Serving:
    return Serving(**{**vars(serving), "layout": layout})


def make_serving(
    config: ModelConfig,
    formats: Formats,
    machine: Machine,
    *,
    context: int,
    users: int = 1,
    layout: Layout | None = None,
    routing: Routing | None = None,
    speculation: Speculation | None = None,
    overlap: float = 0.0,
) -> Serving:
    """A serving set-up with the best layout where none is given.

    Raises ConfigError for a context beyond the model's, and for a layout that does not divide it.
    """
    check_context(config, context)
    if users < 1:
        raise ConfigError(f"{users} users; use 1 or more")
    serving = Serving(
        config=config,
        formats=formats,
        machine=machine,
        layout=layout or Layout(),
        context=context,
        users=users,
        routing=routing or Uniform(),
        speculation=speculation or Speculation(),
        overlap=overlap,
        mtp=bool(speculation and speculation.drafts and config.mtp),
    )
    if layout is None:
        return _with(serving, best_layout(serving))
    layout.check(config)
    if layout.devices != machine.count:
        raise ConfigError(
            f"layout {layout} takes {layout.devices} devices and {machine.name} has {machine.count}; make tp x dp x pp "
            f"{machine.count}"
        )
    return serving


def check_context(config: ModelConfig, context: int) -> None:
    """Raise ConfigError for a context that the model's positions were not made for."""
    if not 0 < context <= config.context_length:
        raise ConfigError(
            f"a context of {context:,} tokens; this {config.family} model takes 1 to {config.context_length:,}"
        )
