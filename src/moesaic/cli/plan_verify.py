"""`moesaic plan verify [FILE]`: what plans foretold beside what bench, train and serve then measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moesaic.cli import output
from moesaic.errors import ConfigError
from moesaic.plan.hardware import state_folder
from moesaic.plan.verify import FILE, Prediction, Quantity, error_table, load

_NEWEST = 12
_COLUMNS = ["measured by", "figure", "number", "median error", "90% within", "within 20%", "median, signed", "drift"]
_FIGURES: dict[Quantity, str] = {
    "decode_s": "a step of decoding",
    "prefill_s": "reading a prompt",
    "step_s": "a step of training",
    "tokens_per_second": "tokens a second",
    "peak_bytes": "peak memory",
}
BEGIN = "<!-- plan verify: written by `moesaic plan verify FILE --report README.md`, not by hand -->"
END = "<!-- plan verify ends -->"
"""Between these lines of a page --report writes the table."""


def run(args: argparse.Namespace) -> int:
    """Print the errors so far; --report writes them into a page. Returns the exit code."""
    place = _place(args.words[1:])
    found = load(place)
    if args.report:
        _write(Path(args.report), found, place)
    if args.json:
        rows = [errors._asdict() for errors in error_table(found)]
        output.print_json({"errors": rows, "predictions": [vars(each) | {"error": each.error} for each in found]})
        return 0
    if not found:
        output.talk(f"nothing was predicted and measured yet ({place})")
        output.next_command("moesaic bench MODEL")
        return 0
    output.table(_COLUMNS, _error_rows(found), "predicted beside measured")
    output.write("\n")
    output.table(
        ["date", "measured by", "model", "figure", "setting", "predicted", "measured", "error"],
        [_row(each) for each in found[-_NEWEST:]],
        "the newest",
    )
    output.next_command("moesaic plan MODEL --machine here")
    return 0


def _place(words: Sequence[str]) -> Path:
    """The file that is meant: a run's folder has one, moesaic's own folder of state the one of all."""
    if not words:
        return state_folder() / FILE
    path = Path(words[0])
    place = path / FILE if path.is_dir() else path
    if len(words) > 1 or not place.is_file():
        raise ConfigError(
            f"plan verify {' '.join(words)}; give one file of predictions, a run's folder that has {FILE}, or nothing"
        )
    return place


def _error_rows(found: list[Prediction]) -> list[list[str]]:
    return [
        [
            errors.source,
            _FIGURES[errors.quantity],
            str(errors.number),
            f"{errors.median:.1%}",
            f"{errors.ninety:.1%}",
            f"{errors.within_20:.0%}",
            f"{errors.bias:+.1%}",
            "-" if errors.drift is None else f"{errors.drift:+.1%}",
        ]
        for errors in error_table(found)
    ]


def _write(page: Path, found: list[Prediction], place: Path) -> None:
    """The table, in place of what a page has between BEGIN and END. Raises ConfigError where it has not both."""
    if not found:
        raise ConfigError(f"--report {page}: nothing was measured yet ({place}); run `moesaic bench MODEL` first")
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    before, begins, rest = text.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ConfigError(f"--report {page}: it has no lines {BEGIN!r} and {END!r}; put them where the table belongs")
    page.write_text(f"{before}{BEGIN}\n{_markdown(found)}\n{END}{after}", encoding="utf-8")
    output.talk(f"written: {page}")


def _markdown(found: list[Prediction]) -> str:
    lines = ["", *(_table_line(row) for row in (_COLUMNS, ["---"] * len(_COLUMNS), *_error_rows(found))), ""]
    machines = sorted({each.machine for each in found if each.machine})
    dates = sorted({each.date[:10] for each in found})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "\n".join([*lines, f"{'; '.join(machines) or 'Machine not noted'}. {span}."])


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(each: Prediction) -> list[str]:
    setting = ", ".join(f"{name}={value}" for name, value in each.setting.items())
    form = output.size if each.quantity == "peak_bytes" else _plain
    figures = [form(each.predicted), form(each.measured)]
    return [each.date[:16], each.source, each.model, _FIGURES[each.quantity], setting, *figures, f"{each.error:+.1%}"]


def _plain(value: float) -> str:
    return f"{value:,.4g}"
