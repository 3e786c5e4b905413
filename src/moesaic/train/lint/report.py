"""What lint found: each check with its verdict, what was measured, why it matters and what to do."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["defect", "sound", "not measured"]


class NotMeasured(Exception):  # noqa: N818  an outcome, not an error
    """A check that this set-up gives no hold for, with the reason in words."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's outcome.

    says: what was seen, with figures. measured: the same figures for machines. why, source, remedy: why it matters,
    who says so, and what to do; of the check, whatever its verdict.
    """

    check: str
    verdict: Verdict
    says: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    source: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All checks' outcomes, in their order. Printing it gives a table, and a paragraph for each defect."""

    subject: str
    outcomes: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The defects."""
        return tuple(outcome for outcome in self.outcomes if outcome.verdict == "defect")

    def __bool__(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __getitem__(self, check: str) -> Finding:
        """One check's outcome, by its name."""
        return {outcome.check: outcome for outcome in self.outcomes}[check]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return json.loads(json.dumps({"subject": self.subject, "sound": bool(self), "outcomes": outcomes}))

    def rows(self) -> list[tuple[str, str, str]]:
        """Of the table: check, verdict, what was seen."""
        return [(outcome.check, outcome.verdict, outcome.says) for outcome in self.outcomes]

    def advice(self) -> Iterator[str]:
        """A paragraph for each defect."""
        for number, found in enumerate(self.findings, 1):
            parts = (f"{number}. {found.check}: {found.says}", f"{found.why} ({found.source})")
            yield "\n   ".join((*parts, f"What to do: {found.remedy}"))

    def __str__(self) -> str:
        width = max(len(outcome.check) for outcome in self.outcomes)
        lines = [f"{check:<{width}}  {verdict:<12}  {says}" for check, verdict, says in self.rows()]
        return "\n".join((self.subject, *lines, *self.advice()))

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.subject, title_justify="left", header_style="bold")
        for column in ("check", "verdict", "what was seen"):
            table.add_column(column)
        colours = {"defect": "red", "sound": "green", "not measured": "yellow"}
        for check, verdict, says in self.rows():
            table.add_row(Text(check), Text(verdict, style=colours[verdict]), Text(says))
        return Group(table, *(Text(paragraph) for paragraph in self.advice()))
