"""The models of a server: which there are, loading and unloading them while others serve."""

import asyncio
from collections.abc import Callable, Mapping

from moesaic.serve.desk import Desk
from moesaic.serve.guidance import Guidance
from moesaic.serve.http.errors import ApiError
from moesaic.serve.kept_text import KeptText
from moesaic.serve.operation.counting import CountedRuns
from moesaic.serve.operation.metrics import Metrics, ModelState
from moesaic.serve.operation.opening import Opened, open_aside, open_model
from moesaic.serve.operation.settings import ModelSettings, ServeSettings
from moesaic.serve.served import Models, Served, UnknownModelError


class Fleet:
    """Opens models by their settings, and keeps in `models` those that serve.

    One is loaded at a time. say: told what happens, in lines for the log.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics, say: Callable[[str], None] = lambda _: None) -> None:
        self.settings, self.metrics, self._say = settings, metrics, say
        self.models = Models([])
        self._runs: dict[str, CountedRuns] = {}
        self._loading = asyncio.Lock()

    @property
    def states(self) -> Mapping[str, str]:
        """Of each model that there are settings for: "ready" or "unloaded"."""
        return {name: "ready" if name in self.models else "unloaded" for name in self.settings.models}

    async def start(self) -> None:
        """Load every model that is to be there from the start, with all processors: nobody is served yet."""
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
                await self._runs.pop(name).end()
                await self.models.remove(name)
                self.metrics.forget(name)
                self._say(f"{name} is unloaded")

    async def end_all(self) -> None:
        """Let all requests end with what they have."""
        await asyncio.gather(*(runs.end() for runs in self._runs.values()))

    def _known(self, name: str) -> bool:
        if name not in self.settings.models:
            known = ", ".join(self.settings.models)
            raise UnknownModelError(f"the model {name!r} does not exist; the settings have: {known}")
        return True

    async def _serve(self, name: str, settings: ModelSettings, opened: Opened) -> None:
        def open_desk() -> CountedRuns:
            decode = KeptText(opened.tokenizer)
            runs = CountedRuns(
                name,
                Desk(opened.engine, decode, guidance=Guidance(opened.tokenizer, opened.engine.config.vocab_size)),
                limits=self.settings.limits,
                together=settings.max_running,
                metrics=self.metrics,
                decode=decode if self.settings.log.prompts else None,
            )
            self._runs[name] = runs
            self.metrics.watch(name, lambda: _state_of(runs, settings.max_running))
            return runs

        await self.models.add(
            Served(
                name,
                tokenizer=opened.tokenizer,
                config=opened.engine.config,
                max_length=opened.engine.max_length,
                open_desk=open_desk,
            )
        )


def _state_of(runs: CountedRuns, together: int) -> ModelState:
    return ModelState(min(runs.inside, together), max(0, runs.inside - together))
