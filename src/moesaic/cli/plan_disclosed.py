"""`moesaic plan disclosed`: what makers and users disclosed, beside what is predicted."""

import argparse
from pathlib import Path

from moesaic.cli import output
from moesaic.errors import ConfigError
from moesaic.plan.disclosed import table


def run(args: argparse.Namespace) -> int:
    """Predict every row and print it; --report writes the page. Returns the exit code."""
    if len(args.words) > 1:
        raise ConfigError(f"plan disclosed {' '.join(args.words[1:])}; it takes no further words")
    rows, each, by_source = table.results()
    if args.report:
        Path(args.report).write_text(table.page(rows, each, by_source), encoding="utf-8")
        output.talk(f"written: {args.report}")
    if args.json:
        output.print_json(table.document(rows, each, by_source))
        return 0
    columns = ["what", "unit", "disclosed", "predicted", "error"]
    counted = [[*table.accounting_row(row)[:4], f"{row.error:+.1%}"] for row in rows]
    output.table(columns, counted, "counted")
    output.write("\n")
    output.table(
        columns, [table.speed_row(one, other)[:5] for one, other in zip(each, by_source, strict=True)], "speed"
    )
    output.write(f"\n{table.short(rows, each).replace('**', '')}\n")
    output.next_command("moesaic plan claims")
    return 0
