"""How much a loop takes on."""

from dataclasses import dataclass

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """cache_tokens: that the cache holds, of all texts and of prefixes; the room is taken at once. None: what the
    engine's cache is limited to, else 65,536.

    step_tokens: the most tokens of a step; long prompts are read in pieces of it, beside what others write.
    max_running: requests in the engine at a time. max_queued: that may wait beside these; None: any number.
    share_prefixes: texts with a common beginning hold it once, and find it again later.
    verify_hits: of requests whose prompt began with blocks of others, the part (0 to 1) whose prompt is run again
    without, later and when there is room, to compare bits; Stats.mismatches counts those that differ.
    """

    cache_tokens: int | None = None
    step_tokens: int = 256
    max_running: int = 64
    max_queued: int | None = None
    share_prefixes: bool = True
    verify_hits: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("cache_tokens", 1), ("max_running", 1), ("step_tokens", 1), ("max_queued", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}; use {least} or more")
        if not 0 <= self.verify_hits <= 1:
            raise ConfigError(f"verify_hits={self.verify_hits}; use a part between 0 and 1")
