"""The page of disclosed results, predicted beside published, as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from moesaic.plan.cluster.rates import ATTENTION, KERNELS
from moesaic.plan.disclosed import accounting, fit, speed
from moesaic.plan.disclosed.fit import Predicted
from moesaic.plan.disclosed.row import Row

COMMAND = "moesaic plan disclosed --report docs/plan_accuracy.md"

OUTLIERS = {
    "ernie-4.5-21b-a3b: parameters": "The makers' 21B cuts 21.8B short.",
    "GShard 2048E 12L": "The paper's 1.4 days are rounded: 1.35 of them alone would be 7.6 core-years.",
}
"""Why an accounting row does not agree."""

WORST = {
    "DeepSeek production, prefill without hits": "A day's mean of nodes that are not always busy, at lengths unknown "
    "but for their mean; the row above it, of the same machines when busy, is what the roofline speaks of.",
    "GShard 2048E 36L, 1T tokens": "Only its operations are counted, on chips and with a compiler of 2020; the paper "
    "itself reports 48 % of a roofline that knows more. Were its 4M tokens those of one side of a sentence pair, the "
    "operations would double and the row would come out near.",
    "DeepSeek production, decode": "A day's mean again; the batch follows from the users' 20-22 tok/s, which is a mean "
    "over hours of little use, too.",
    "Two-batch overlap's gain, prefill": "Halving a batch also makes each half's kernels less efficient, which the "
    "roofline does not know.",
    "vLLM wide-EP on H200": "Its batch and lengths were not disclosed; SGLang's were taken.",
    "Llama 4 Maverick": "Tokens from memory, number format unknown (bf16 taken), images left out.",
}
"""What is known of the worst rows."""

_INTRODUCTION = """\
What makers and users disclosed, beside what this planner says of the same thing. Sources are named in each row; [M]
marks a figure from memory, [P] one read in a copy of its source, [3] a third party's."""

_ACCOUNTING = """\
These follow from counting: a row agrees where it is within 2 %, or the same once rounded as it was published."""

_SPEED = """\
These need efficiencies. Three constants stand for them, and **no row has a part in its own**: each was predicted with
those that fit all other rows best (the smallest mean of |log(predicted / disclosed)|). In brackets the error with
constants fitted to rows of *other sources* only. *Compute*: the share of stated operations a second that matrix
products get. *Network*: of what DeepEP's kernels reach, what messages get. *Training*: the share of *compute* that
training gets. Not fitted, but taken from published micro-benchmarks: memory {memory:.0%} and attention {attention:.0%}
(FlashMLA's README, read in 2026-11), messages {network:.0%} of the link (DeepEP: 43 of 50 GB/s over 16 ranks, read in
2026-11; 43 to 47 over 16 to 64 in its first release [M]). How unevenly experts are chosen is DeepSeek-V2-Lite's
recorded routing. What is modelled and assumed was chosen with these rows in view; the constants were not."""


def page(rows: Sequence[Row], each: Sequence[Predicted], by_source: Sequence[Predicted]) -> str:
    """The whole page."""
    agree = sum(row.agrees for row in rows)
    fixed = {"memory": KERNELS.memory, "network": KERNELS.network, "attention": ATTENTION}
    parts = [
        "# How right the planner is: disclosed results",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        _INTRODUCTION,
        short(rows, each),
        "## Accounting",
        f"{_ACCOUNTING} {agree} of {len(rows)} do.",
        _table(("what", "unit", "disclosed", "predicted", "error", "how", "source"), map(accounting_row, rows)),
        "\n".join(f"- **{what}**: {why}" for what, why in OUTLIERS.items()),
        "## Speed",
        _SPEED.format(**fixed),
        _table(
            ("what", "unit", "disclosed", "predicted", "error", "compute, network, training", "assumed", "source"),
            (speed_row(one, other) for one, other in zip(each, by_source, strict=True)),
        ),
        f"Median error {fit.median_error(each):.0%}; with constants of other sources only "
        f"{fit.median_error(by_source):.0%}.",
        "The worst rows:",
        "\n".join(_explained(one) for one in worst(each)),
        "Not predicted: SGLang's 3.3x and 5.2x over TP16, whose batches were not disclosed.",
    ]
    return "\n\n".join(parts) + "\n"


def short(rows: Sequence[Row], each: Sequence[Predicted]) -> str:
    """The figures for a README."""
    median, agree = fit.median_error(each), sum(row.agrees for row in rows)
    within = sum(abs(one.error) <= 0.25 for one in each)
    return (
        f"**{agree} of {len(rows)}** accounting rows within 2 % (parameters, files, caches, hours, dollars). "
        f"**{len(each)}** speeds, each predicted without itself: median error **{median:.0%}**, {within} within 25 %."
    )


def worst(each: Sequence[Predicted], count: int = 5) -> list[Predicted]:
    """The rows that are furthest off."""
    return sorted(each, key=lambda one: -abs(one.error))[:count]


def document(rows: Sequence[Row], each: Sequence[Predicted], by_source: Sequence[Predicted]) -> dict[str, Any]:
    """A JSON-ready tree of it all."""
    return {
        "accounting": [row._asdict() | {"error": row.error, "agrees": row.agrees} for row in rows],
        "speed": [
            {
                "what": one.case.what,
                "unit": one.case.unit,
                "disclosed": one.case.disclosed,
                "predicted": one.value,
                "error": one.error,
                "error_by_source": other.error,
                "constants": one.constants._asdict(),
                "assumed": one.case.assumed,
                "source": one.case.source,
            }
            for one, other in zip(each, by_source, strict=True)
        ],
        "median_error": fit.median_error(each),
        "median_error_by_source": fit.median_error(by_source),
    }


def results() -> tuple[list[Row], list[Predicted], list[Predicted]]:
    """Accounting rows; speeds, each without itself; and each without its source."""
    values = fit.Values(speed.cases())
    return accounting.rows(), values.predict_each(), values.predict_each(by_source=True)


def _explained(one: Predicted) -> str:
    return f"- **{one.case.what}** ({one.error:+.0%}): {WORST.get(one.case.what, one.case.assumed + '.')}"


def accounting_row(row: Row) -> list[str]:
    """A row of the page; one that disagrees says so."""
    sign = "" if row.agrees else " **no**"
    return [
        row.what,
        row.unit,
        _number(row.disclosed, row.digits),
        _number(row.predicted, row.digits + 1),
        f"{row.error:+.1%}{sign}",
        row.how,
        row.source,
    ]


def speed_row(one: Predicted, other: Predicted) -> list[str]:
    """A row of the page. one: with the row itself left out of the fit; other: with all of its source left out."""
    case = one.case
    digits = 0 if case.disclosed >= 100 else 2
    constants = " ".join(f"{each:g}" for each in one.constants)
    return [
        case.what,
        case.unit,
        _number(case.disclosed, digits),
        _number(one.value, digits),
        f"{one.error:+.0%} ({other.error:+.0%})",
        constants,
        case.assumed,
        case.source,
    ]


def _number(value: float, digits: int) -> str:
    return f"{value:,.{0 if value >= 10000 else digits}f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
