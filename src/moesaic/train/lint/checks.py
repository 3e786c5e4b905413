"""What a check is, and the list of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moesaic.registry import Registry
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.report import Finding, NotMeasured
from moesaic.train.lint.stand import Stand


class Seen(NamedTuple):
    """What a check saw: whether it is a defect, in words, and as figures."""

    is_defect: bool
    says: str
    measured: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to a set-up, asked by experiment. why, source, remedy: see Finding."""

    name: str
    ask: Callable[[Stand, Elsewhere], Seen]
    why: str
    source: str
    remedy: str

    def of(self, stand: Stand, elsewhere: Elsewhere) -> Finding:
        """The outcome for a set-up."""
        try:
            seen = self.ask(stand, elsewhere)
            verdict = "defect" if seen.is_defect else "sound"
        except NotMeasured as reason:
            seen, verdict = Seen(False, str(reason), {}), "not measured"
        return Finding(
            check=self.name,
            verdict=verdict,
            says=seen.says,
            measured=seen.measured,
            why=self.why,
            source=self.source,
            remedy=self.remedy,
        )


CHECKS: Registry[Check] = Registry("lint check")


def check(
    name: str, *, why: str, source: str, remedy: str
) -> Callable[[Callable[[Stand, Elsewhere], Seen]], Callable[[Stand, Elsewhere], Seen]]:
    """Decorate an experiment to make it a check."""

    def enter(ask: Callable[[Stand, Elsewhere], Seen]) -> Callable[[Stand, Elsewhere], Seen]:
        CHECKS.register(name)(Check(name=name, ask=ask, why=why, source=source, remedy=remedy))
        return ask

    return enter
