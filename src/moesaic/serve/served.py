"""The models that are served, by name, and what the protocols need to know of each."""

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from typing import Protocol

from moesaic.config import ModelConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.errors import ConfigError, MoesaicError
from moesaic.serve.choice.guidance import Guidance
from moesaic.serve.live_routing import LiveRouting
from moesaic.serve.loop.desk import Desk
from moesaic.serve.request import Event, PoolingKind, Request
from moesaic.serve.seen import Stats
from moesaic.serve.text.dialogue import Speaker
from moesaic.serve.text.kept_text import KeptText
from moesaic.serve.text.token_texts import TokenTexts


class UnknownModelError(MoesaicError):
    """A name that no model is served under."""


class Runs(Protocol):
    """What runs requests: a desk."""

    def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; leaving early cancels it. Raises GenerationError before the first."""
        ...

    def stats(self) -> Stats:
        """How its loop stands."""
        ...

    async def close(self) -> None:
        """End all requests."""
        ...


class Served:
    """A model under a name. `desk` is there between `start` and `close`; created: seconds since 1970.

    open_desk: called inside the running event loop. routing: the load of its experts; None: it runs elsewhere.
    embeddings: of which hidden states; None: it makes none.
    """

    def __init__(
        self,
        name: str,
        *,
        tokenizer: Tokenizer,
        config: ModelConfig,
        max_length: int,
        open_desk: Callable[[], Runs],
        created: int | None = None,
        routing: LiveRouting | None = None,
        embeddings: PoolingKind | None = None,
    ) -> None:
        self.name, self.tokenizer, self.config, self.max_length = name, tokenizer, config, max_length
        self.routing = routing
        self.embeddings: PoolingKind | None = embeddings
        self.created = int(time.time()) if created is None else created
        self.eos_token_ids = _ends(tokenizer, config)
        self.token_texts, self.speaker = TokenTexts(tokenizer), Speaker(tokenizer)
        self._open_desk = open_desk
        self._desk: Runs | None = None

    @classmethod
    def of_engine(
        cls,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        created: int | None = None,
        embeddings: PoolingKind | None = None,
    ) -> "Served":
        """A model that this process runs itself."""
        routing = LiveRouting(engine)

        def open_desk() -> Desk:
            guidance = Guidance(tokenizer, engine.config.vocab_size)
            desk = Desk(engine, KeptText(tokenizer), guidance=guidance)
            desk.loop.listen(routing.hear)
            return desk

        return cls(
            name,
            tokenizer=tokenizer,
            config=engine.config,
            max_length=engine.max_length,
            open_desk=open_desk,
            routing=routing,
            created=created,
            embeddings=embeddings,
        )

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._desk is not None

    @property
    def desk(self) -> Runs:
        assert self._desk is not None, f"{self.name} has not been started"
        return self._desk

    async def start(self) -> None:
        self._desk = self._open_desk()

    async def close(self) -> None:
        """End its requests."""
        desk, self._desk = self._desk, None
        if desk is not None:
            await desk.close()


def _ends(tokenizer: Tokenizer, config: ModelConfig) -> frozenset[int]:
    """Some checkpoints name the end of a turn in the tokenizer's files only."""
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return frozenset([*config.eos_token_ids, *own])


class Models(Mapping[str, Served]):
    """Models by name, the first of them first. Raises ConfigError for two of one name."""

    def __init__(self, served: Iterable[Served]) -> None:
        self._served: dict[str, Served] = {}
        for each in served:
            if each.name in self._served:
                raise ConfigError(f"two models are to be served as {each.name!r}; give one another name")
            self._served[each.name] = each

    async def start(self) -> None:
        """Open every model's desk, inside the running event loop."""
        for each in self._served.values():
            await each.start()

    async def close(self) -> None:
        """End all requests."""
        for each in self._served.values():
            await each.close()

    async def add(self, served: Served) -> None:
        """Start one more, inside the running event loop."""
        await served.start()
        self._served[served.name] = served

    async def remove(self, name: str) -> None:
        """Close one; it is served no longer."""
        await self._served.pop(name).close()

    def find(self, name: str) -> Served:
        """Raises UnknownModelError, which says what there is."""
        if name not in self._served:
            raise UnknownModelError(f"the model {name!r} does not exist; served here: {', '.join(self._served)}")
        return self._served[name]

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)
