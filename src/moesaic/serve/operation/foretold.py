"""What a plan foretold of this machine beside what a served model's steps then took, for `moesaic plan verify`."""

import logging
import statistics
from collections import deque
from collections.abc import Iterator
from typing import Literal

import torch

from moesaic.bench.bound import Held
from moesaic.bench.foretold import held_formats
from moesaic.bench.reached import held
from moesaic.engine.engine import Engine
from moesaic.errors import ConfigError
from moesaic.plan.flops import Step
from moesaic.plan.kernels import engine_step
from moesaic.plan.rates import KernelRates, measured_rates
from moesaic.plan.verify import Prediction, store
from moesaic.serve.seen import StepSeen

_log = logging.getLogger(__name__)
FEWEST, NEWEST = 8, 64
"""Steps of a kind that are enough for a median, and that are kept."""

Kind = tuple[Literal["decode", "prefill"], int]
"""With texts that are written, or with tokens of one prompt."""


class StepTimes:
    """Seconds of a model's newest steps, by kind.

    Steps that a plan has no cell for are not kept: of prompts beside texts that are written, of drafts, of what comes
    later in a prompt.
    """

    def __init__(self, model: str, kept: Held, rates: KernelRates) -> None:
        self._model, self._kept, self._rates = model, kept, rates
        self._steps: dict[Kind, deque[tuple[float, float]]] = {}  # the texts' mean length, and seconds

    def hear(self, seen: StepSeen) -> None:
        """Called after each step."""
        rows, tokens = seen.rows, seen.num_tokens
        if seen.num_drafts or not tokens:
            return
        if tokens == len(rows):
            self._take(("decode", len(rows)), sum(row.start for row in rows) / len(rows) + 1, seen.seconds)
        elif len(rows) == 1 and not rows[0].start:
            self._take(("prefill", tokens), tokens, seen.seconds)

    def predictions(self) -> Iterator[Prediction]:
        """One for each kind with enough steps. Raises ConfigError for a format that was not timed."""
        formats = held_formats(self._kept)
        for (kind, count), steps in sorted(self._steps.items()):
            if len(steps) < FEWEST:
                continue
            context = statistics.median(context for context, _ in steps)
            texts, new = (count, 1) if kind == "decode" else (1, count)
            step = Step(kind=kind, texts=texts, new=new, context=context)
            yield Prediction(
                source="serve",
                model=self._model,
                quantity="decode_s" if kind == "decode" else "prefill_s",
                predicted=engine_step(self._rates, self._kept.config, formats, step).seconds,
                measured=statistics.median(seconds for _, seconds in steps),
                setting={
                    "case": f"{kind} {count}",
                    "context": round(context),
                    "formats": " ".join(sorted(set(self._kept.formats.values()))),
                    "steps": len(steps),
                },
                machine=self._rates.machine,
            )

    def _take(self, kind: Kind, context: float, seconds: float) -> None:
        self._steps.setdefault(kind, deque(maxlen=NEWEST)).append((context, seconds))

    def keep(self) -> None:
        """Store them; what is wrong with that is logged, since a server does not end for it."""
        try:
            store(self.predictions())
        except (ConfigError, OSError) as error:
            _log.warning("nothing is kept of %s for `moesaic plan verify`: %s", self._model, error)


def step_times(model: str, engine: Engine) -> StepTimes | None:
    """None where nobody has timed this machine's kernels with so many threads (`moesaic plan MODEL --machine here`)."""
    try:
        rates = measured_rates()
    except ConfigError as error:
        _log.warning("steps of %s are held against no plan: %s", model, error)
        return None
    if rates is None or rates.about.get("threads") != engine.program.native.threads:
        return None
    dtype = torch.float32 if engine.cache.format == "fp32" else torch.bfloat16  # an embedding's rows are few bytes
    return StepTimes(model, held(engine, dtype), rates)
