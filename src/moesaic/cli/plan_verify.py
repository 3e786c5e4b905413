"""`moesaic plan verify`: what plans foretold beside what bench, train and serve then measured."""

import argparse

from moesaic.cli import output
from moesaic.errors import ConfigError
from moesaic.plan.hardware import state_folder
from moesaic.plan.verify import FILE, Prediction, error_table, load

_NEWEST = 12


def run(args: argparse.Namespace) -> int:
    """Print the errors so far. Returns the exit code."""
    if len(args.words) > 1:
        raise ConfigError(f"plan verify {' '.join(args.words[1:])}; it takes no further words")
    found = load()
    if args.json:
        rows = [errors._asdict() for errors in error_table(found)]
        output.print_json({"errors": rows, "predictions": [vars(each) | {"error": each.error} for each in found]})
        return 0
    if not found:
        output.talk(f"nothing was predicted and measured yet ({state_folder() / FILE})")
        output.next_command("moesaic bench MODEL")
        return 0
    columns = ["measured by", "figure", "number", "median error", "90% within", "within 20%", "median, signed", "drift"]
    rows = [
        [
            errors.source,
            errors.quantity,
            str(errors.number),
            f"{errors.median:.1%}",
            f"{errors.ninety:.1%}",
            f"{errors.within_20:.0%}",
            f"{errors.bias:+.1%}",
            "-" if errors.drift is None else f"{errors.drift:+.1%}",
        ]
        for errors in error_table(found)
    ]
    output.table(columns, rows, "predicted beside measured")
    output.write("\n")
    output.table(
        ["date", "measured by", "model", "figure", "setting", "predicted", "measured", "error"],
        [_row(each) for each in found[-_NEWEST:]],
        "the newest",
    )
    output.next_command("moesaic plan MODEL --machine here")
    return 0


def _row(each: Prediction) -> list[str]:
    setting = ", ".join(f"{name}={value}" for name, value in each.setting.items())
    form = output.size if each.quantity == "peak_bytes" else _plain
    figures = [form(each.predicted), form(each.measured)]
    return [each.date[:16], each.source, each.model, each.quantity, setting, *figures, f"{each.error:+.1%}"]


def _plain(value: float) -> str:
    return f"{value:,.4g}"
