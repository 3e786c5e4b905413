"""The models of a server: which there are, loading and unloading them while others serve."""

import asyncio
import gc
from collections.abc import Callable, Mapping

from moesaic.hub.embedded import cache_folder
from moesaic.serve.choice.guidance import Guidance
from moesaic.serve.http.errors import ApiError
from moesaic.serve.live_routing import LiveRouting
from moesaic.serve.loop.desk import Desk
from moesaic.serve.loop.loop import Loop
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.operation.counting import CountedRuns
from moesaic.serve.operation.foretold import StepTimes, step_times
from moesaic.serve.operation.metrics import Metrics, ModelState
from moesaic.serve.operation.opening import Opened, open_aside, open_model
from moesaic.serve.operation.passing import clear_passed
from moesaic.serve.operation.settings import ModelSettings, ServeSettings
from moesaic.serve.seen import Stats
from moesaic.serve.served import Models, Served, UnknownModelError
from moesaic.serve.text.kept_text import KeptText


class Fleet:
    """Opens models by their settings, and keeps in `models` those that serve.

    One is loaded at a time. say: told what happens, in lines for the log.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics, say: Callable[[str], None] = lambda _: None) -> None:
        self.settings, self.metrics, self._say = settings, metrics, say
        self.models = Models([])
        self._runs: dict[str, CountedRuns] = {}
        self._loops: dict[str, Loop] = {}
        self._times: dict[str, StepTimes] = {}
        self._loading = asyncio.Lock()

    @property
    def states(self) -> Mapping[str, str]:
        """Of each model that there are settings for: "ready" or "unloaded"."""
        return {name: "ready" if name in self.models else "unloaded" for name in self.settings.models}

    @property
    def alive(self) -> bool:
        """Whether every model that is loaded still runs."""
        return all(loop.alive for loop in self._loops.values())

    async def start(self) -> None:
        """Load every model that is to be there from the start, with all processors: nobody is served yet."""
        clear_passed(cache_folder())
        for name, settings in self.settings.models.items():
            if settings.at_start:
                await self._serve(name, settings, await asyncio.to_thread(open_model, settings))

    async def load(self, name: str) -> None:
        """Load a model while others serve. Raises UnknownModelError, and MoesaicError for one that cannot be run."""
        async with self._loading:
            if self._known(name) and name not in self.models:
                settings = self.settings.models[name]
                self._say(f"loading {name}")
                await self._serve(name, settings, await open_aside(settings))
                self._say(f"{name} is loaded")

    async def unload(self, name: str) -> None:
        """Let a model's requests end with what they have, and give its memory back. Raises UnknownModelError."""
        async with self._loading:
            if self._known(name) and name in self.models:
                if len(self.models) == 1:
                    raise ApiError(400, f"{name} is the only model that is loaded; load another first", param="model")
                del self._loops[name]
                await self._runs.pop(name).end()
                await self.models.remove(name)
                self._keep_times(name)
                self.metrics.forget(name)
                gc.unfreeze()  # `Server` has put aside what was there when it began
                gc.collect()  # an engine's parts refer to each other, and hold all its memory
                self._say(f"{name} is unloaded")

    async def end_all(self) -> None:
        """Let all requests end with what they have; no more are run."""
        self._loops.clear()
        await asyncio.gather(*(runs.end() for runs in self._runs.values()))
        for name in list(self._times):
            self._keep_times(name)

    def _keep_times(self, name: str) -> None:
        """What its steps took, once there are no more."""
        if (times := self._times.pop(name, None)) is not None:
            times.keep()

    def _known(self, name: str) -> bool:
        if name not in self.settings.models:
            known = ", ".join(self.settings.models)
            raise UnknownModelError(f"the model {name!r} does not exist; the settings have: {known}")
        return True

    async def _serve(self, name: str, settings: ModelSettings, opened: Opened) -> None:
        engine, tokenizer, drafter, cache_tokens = opened
        routing, times = LiveRouting(engine), step_times(name, engine)
        if times is not None:
            self._times[name] = times

        def open_desk() -> CountedRuns:
            decode = KeptText(tokenizer)
            desk = Desk(
                engine,
                decode,
                settings=_loop_settings(settings, cache_tokens),
                drafter=drafter,
                guidance=Guidance(tokenizer, engine.config.vocab_size),
            )
            desk.loop.listen(routing.hear)
            if times is not None:
                desk.loop.listen(times.hear)
            runs = CountedRuns(
                name,
                desk,
                limits=self.settings.limits,
                together=settings.max_running,
                metrics=self.metrics,
                decode=decode if self.settings.log.prompts else None,
            )
            self._runs[name], self._loops[name] = runs, desk.loop
            self.metrics.watch(name, lambda: _state_of(desk.loop.stats()), routing)
            return runs

        await self.models.add(
            Served(
                name,
                tokenizer=tokenizer,
                config=engine.config,
                max_length=min(engine.max_length, cache_tokens),
                open_desk=open_desk,
                routing=routing,
                embeddings=None if settings.embeddings == "off" else settings.embeddings,
            )
        )


def _loop_settings(settings: ModelSettings, cache_tokens: int) -> LoopSettings:
    return LoopSettings(
        cache_tokens=cache_tokens,
        step_tokens=settings.step_tokens,
        max_running=settings.max_running,
        share_prefixes=settings.share_prefixes,
        verify_hits=settings.verify_hits,
    )


def _state_of(stats: Stats) -> ModelState:
    return ModelState(
        running=stats.running,
        waiting=stats.queued,
        cache_used=stats.held_tokens / stats.cache_tokens,
        cache_kept=stats.kept_tokens / stats.cache_tokens,
        prefix_hits=stats.hits,
        prefix_mismatches=stats.mismatches,
        preemptions=stats.preemptions,
        evictions=stats.evictions,
        drafted=stats.drafted,
        accepted=stats.accepted,
        steps=stats.steps,
        engine_seconds=stats.engine_s,
        busy_seconds=stats.busy_s,
    )
