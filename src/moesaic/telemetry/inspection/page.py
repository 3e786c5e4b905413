"""The page of `moesaic inspect`: one HTML file, its style, script and numbers inside; nothing comes from elsewhere."""

import html
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from moesaic.errors import RunFolderError
from moesaic.telemetry.inspection.findings import Against, LayerFindings
from moesaic.telemetry.inspection.inspection import Agreement, Inspection, Subject
from moesaic.telemetry.inspection.sentences import mean, verdicts
from moesaic.telemetry.plots import HEAT_BINS, HEAT_OCTAVES, Series, color_bar, line_chart
from moesaic.telemetry.scale import fixed, short

# The browser itself sees to it that the page asks nobody for anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_LABEL_CAPTIONS = {
    "domain": ("The domain", "bits that a text's domain tells of the expert"),
    "class": ("The kind of token", "bits that punctuation, digits, case and affixes tell"),
    "token": ("The token itself", "bits that the token tells which goes in"),
    "next token": ("The next token", "bits that the token tells which comes next"),
}


def write_page(inspection: Inspection, path: Path, facts: Sequence[tuple[str, str]] = ()) -> Path:
    """Write the page beside `path` and rename it into place. Raises RunFolderError where that cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(render(inspection, facts), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):  # there may be no folder for it to be in
            draft.unlink()
        raise RunFolderError(f"cannot write {path}: {error.strerror}; choose another place with --out") from error
    return path


def render(inspection: Inspection, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page as text. facts: (name, value) pairs for its end."""
    names = [subject.name for subject in inspection.subjects]
    title = f"The experts of {names[0]}" + (f" and {names[1]}" if len(names) > 1 else "")
    page = files("moesaic.telemetry") / "page"
    style = "".join((page / name).read_text(encoding="utf-8") for name in ("colours.css", "page.css", "inspect.css"))
    scripts = "".join(
        f"<script>\n{(page / name).read_text(encoding='utf-8')}</script>\n" for name in ("page.js", "inspect.js")
    )
    sections = (*_head(inspection, title), *_sections(inspection), _table(inspection), _facts(facts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<div id="tip" role="status" hidden></div>\n{_payload(inspection)}{scripts}</body>\n</html>\n'
    )


def _payload(inspection: Inspection) -> str:
    tree: dict[str, Any] = {**inspection.to_json(), "bins": HEAT_BINS, "octaves": HEAT_OCTAVES}
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    # "<" cannot end the script early when it is written as an escape.
    return f'<script type="application/json" id="inspection">{text.replace("<", chr(92) + "u003c")}</script>\n'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _head(inspection: Inspection, title: str) -> list[str]:
    marks = {True: ("good", "✓", "good: "), False: ("bad", "✗", "not good: "), None: ("", "·", "")}
    lines = "".join(
        f'<li class="{style}"><span class="mark" aria-hidden="true">{sign}</span>'
        f'<span><span class="unseen">{spoken}</span>{_text(verdict.text)}</span></li>'
        for verdict in verdicts(inspection)
        for style, sign, spoken in (marks[verdict.is_good],)
    )
    about = "".join(f'<p class="lead">{_text(_about(subject))}</p>' for subject in inspection.subjects)
    return [f'<h1>{_text(title)}</h1>{about}<ul class="verdicts">{lines}</ul>', _controls(inspection)]


def _about(subject: Subject) -> str:
    found = subject.findings
    sizes = sorted({(layer.top_k, layer.num_experts) for layer in found.layers})
    experts = " and ".join(f"{top_k} of {num_experts}" for top_k, num_experts in sizes)
    domains = f" in {len(found.domains)} domains" if found.domains else ""
    return (
        f"{subject.name} ({found.family}): {len(found.layers)} layers that route each token to {experts} experts, seen "
        f"over {short(found.num_tokens)} tokens of {found.num_texts} pieces of text{domains}."
    )


def _controls(inspection: Inspection) -> str:
    domains = inspection.subjects[0].findings.domains
    domain = '<label>Text <select id="choose-domain"></select></label>' if domains else ""
    return (
        "<noscript><p>Without JavaScript this page shows its curves and tables; the pictures in between need it. It "
        'asks nothing of the network.</p></noscript><nav class="choose" aria-label="what is shown">'
        '<label>Layer <select id="choose-layer"></select></label>'
        f'<label>Expert <select id="choose-expert"></select></label>{domain}'
        '<label><input type="checkbox" id="grouped" checked> group experts</label>'
        '<label>Search tokens <input type="search" id="query" autocomplete="off" spellcheck="false"></label></nav>'
    )


def _section(title: str, note: str, body: str) -> str:
    lead = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{lead}{body}</section>"


def _drawn(place: str, inspection: Inspection) -> str:
    two = " two" if len(inspection.subjects) > 1 else ""
    return f'<div class="sides{two}" id="{place}"></div>'


def _sections(inspection: Inspection) -> list[str]:
    bar = f'<div class="scroll">{color_bar()}</div>'
    first = inspection.subjects[0].findings
    sections = [
        _section(
            "Who does the work",
            "Each cell is an expert's load as a multiple of its fair share, 1/E of the rows: grey is fair, blue is "
            "less, orange is more. Choose one to see what it is for. With a text chosen above, the load is of that "
            "text alone.",
            f"{bar}{_drawn('load', inspection)}",
        ),
        _section("What this expert is for", "", _drawn("card", inspection)),
        _specialising(inspection),
    ]
    if first.domains:
        note = (
            "Each domain's rows over the experts of the chosen layer, as multiples of the fair share, which is chance."
        )
        sections.append(_section("Which text goes where", note, f"{bar}{_drawn('domains', inspection)}"))
    if first.classes:
        note = (
            "Tokens judged in their place: words in one token by their case, others by being the beginning, the middle "
            "or the end (prefix, suffix) of a word; each kind's rows as multiples of the fair share."
        )
        sections.append(_section("Punctuation, digits, case, affixes", note, f"{bar}{_drawn('classes', inspection)}"))
    sections += [
        _section(
            "Who works with whom",
            "How often a token of the row's expert goes to the column's expert as well, as a multiple of what their "
            "loads alone would bring; ringed is the row of the chosen expert.",
            f"{bar}{_drawn('company', inspection)}",
        ),
        _over_time(inspection),
    ]
    if first.classes:
        sections += [
            _section(
                "Where tokens go",
                "Frequent tokens and, in each layer, the two experts that serve most of their occurrences; the deeper "
                "the colour, the larger the share. Search above for others.",
                f'<div class="scroll">{_drawn("ways", inspection)}</div>',
            ),
            _section(
                "Text, coloured by expert",
                "The colour is each token's first choice in the chosen layer; point at one for all of its experts. A "
                "search above dims all other tokens.",
                '<p class="note"><label><input type="checkbox" id="only"> only the tokens of the chosen expert'
                "</label></p>"
                f"{_drawn('texts', inspection)}",
            ),
        ]
    else:
        sections.append('<input type="checkbox" id="only" hidden>')
    return sections


def _specialising(inspection: Inspection) -> str:
    """By layer: what each kind of label tells of the expert, beside the same of shuffled labels."""
    figures = []
    for name, (caption, small) in _LABEL_CAPTIONS.items():
        figures += _against_figure(
            inspection, caption, small, "bits", lambda layer, name=name: layer.information.get(name)
        )
    figures += _against_figure(
        inspection,
        "Domains apart from their average",
        "Jensen-Shannon divergence: 0 is all alike, 1 the most",
        "bits",
        lambda layer: layer.divergence,
    )
    figures += _against_figure(
        inspection,
        "A token's own expert",
        "an expert's share of the token that it serves most",
        "share",
        lambda layer: layer.vocabulary.get("token"),
    )
    if not figures:
        return ""
    note = (
        "What tells which expert serves a token. Dashed is the same with labels shuffled: domains among pieces of "
        "text, tokens among places. Only what stands above it means anything."
    )
    return _section("What experts go by", note, f'<div class="plots">{"".join(figures)}</div>')


def _against_figure(
    inspection: Inspection, caption: str, small: str, unit: str, of: Callable[[LayerFindings], Against | None]
) -> list[str]:
    series = []
    for index, subject in enumerate(inspection.subjects):
        there = [(layer.layer, against) for layer in subject.findings.layers if (against := of(layer)) is not None]
        if not there:
            continue
        xs = [layer for layer, _ in there]
        label = subject.name if len(inspection.subjects) > 1 else "measured"
        values, shuffled = ([_number(against[at]) for _, against in there] for at in (0, 1))
        mark = "AB"[index] if len(inspection.subjects) > 1 else "measured"
        series.append(Series(label, xs, values, f"s{3 * index}", mark))
        series.append(Series(f"{label}, shuffled", xs, shuffled, f"s{3 * index} shuffled", "" if index else "shuffled"))
    if not series:
        return []
    chart = line_chart(series, title=caption, x_label="layer", y_label=unit, y_floor=0.0)
    return [f"<figure><figcaption>{_text(caption)}<small>{_text(small)}</small></figcaption>{chart}</figure>"]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _over_time(inspection: Inspection) -> str:
    figures = []
    if inspection.saturation is not None:
        caption = "The share of the final choices that each checkpoint's routers make on the same tokens."
        figures.append(_agreement_figure("Saturation", caption, inspection.saturation))
    if inspection.agreement is not None:
        figures.append(_two_figure(inspection.agreement))
    if not figures:
        return ""
    note = (
        "Dashed is what chance would bring with these loads, about K/E. Experts of models that were trained apart have "
        "other numbers, and agree by chance."
    )
    return _section("How far routers agree", note, f'<div class="plots">{"".join(figures)}</div>')


def _agreement_figure(caption: str, small: str, found: Agreement) -> str:
    steps = [float(name.rpartition(" ")[2]) for name in found.names]
    num_layers = len(found.layers)
    series = [
        Series(
            f"layer {layer}",
            steps,
            [_number(value) for value in values],
            _layer_style(at, num_layers),
            f"layer {layer}",
        )
        for at, (layer, values) in enumerate(found.layers.items())
    ]
    chance = [mean([values[at] for values in found.chance.values()]) for at in range(len(steps))]
    series.append(Series("chance", steps, [_number(value) for value in chance], "s5 shuffled", "chance"))
    chart = line_chart(series, title=caption, x_label="step", y_label="share", y_floor=0.0)
    return f"<figure><figcaption>{_text(caption)}<small>{_text(small)}</small></figcaption>{chart}</figure>"


def _two_figure(found: Agreement) -> str:
    layers = list(found.layers)
    shares = [_number(values[0]) for values in found.layers.values()]
    chance = [_number(values[0]) for values in found.chance.values()]
    series = [Series("both", layers, shares, "s0", "both"), Series("chance", layers, chance, "s5 shuffled", "chance")]
    chart = line_chart(series, title="choices that both make", x_label="layer", y_label="share", y_floor=0.0)
    small = "the share of the first model's choices that the second makes as well"
    return f"<figure><figcaption>Choices that both make<small>{small}</small></figcaption>{chart}</figure>"


def _layer_style(index: int, num_layers: int) -> str:
    return f"l{round(index * 7 / max(1, num_layers - 1))}"


_COLUMNS: tuple[tuple[str, Callable[[LayerFindings], str]], ...] = (
    ("Layer", lambda layer: str(layer.layer)),
    ("Experts", lambda layer: f"{layer.top_k} of {layer.num_experts}"),
    ("Effective", lambda layer: fixed(layer.effective_experts, 1)),
    ("MaxVio", lambda layer: fixed(layer.max_violation, 2)),
    ("CV", lambda layer: fixed(layer.variation, 2)),
    ("Dead", lambda layer: str(layer.states.count("dead"))),
    ("Cold", lambda layer: str(layer.states.count("cold"))),
    ("Oversized", lambda layer: str(layer.states.count("oversized"))),
    ("Domains, bits", lambda layer: _against(layer.divergence)),
    ("By domain", lambda layer: _against(layer.information.get("domain"))),
    ("By kind", lambda layer: _against(layer.information.get("class"))),
    ("By token", lambda layer: _against(layer.information.get("token"))),
    ("By next token", lambda layer: _against(layer.information.get("next token"))),
    ("Vocabulary, in", lambda layer: _against(layer.vocabulary.get("token"))),
    ("Vocabulary, next", lambda layer: _against(layer.vocabulary.get("next token"))),
)


def _against(against: Against | None) -> str:
    return "–" if against is None else f"{fixed(against.value)} ({fixed(against.shuffled)})"


def _table(inspection: Inspection) -> str:
    tables = []
    for subject in inspection.subjects:
        head = "".join(f'<th scope="col">{_text(name)}</th>' for name, _ in _COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{_text(show(layer))}</td>" for _, show in _COLUMNS) + "</tr>"
            for layer in subject.findings.layers
        )
        name = f"<h3>{_text(subject.name)}</h3>" if len(inspection.subjects) > 1 else ""
        tables.append(
            f'{name}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    note = "In brackets: the same of shuffled labels. `moesaic inspect --json` has every number of this page."
    return _section("The numbers", note, "".join(tables))


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    return _section("This report", "", f'<dl class="facts">{rows}</dl>') if facts else ""
