"""`moesaic align`: translations of one text into pairs that translating is learnt from."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moesaic.data.alignment import Aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic align`."""
    parser.epilog = "example: moesaic align en=book-en.txt fr=book-fr.txt de=book-de.txt --out book.jsonl"
    parser.add_argument(
        "texts",
        metavar="LANGUAGE=FILE",
        nargs="+",
        help="the text in each language; the first is the one that the others are compared with",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the .jsonl is written")
    parser.add_argument(
        "--unit", choices=("paragraph", "sentence"), default="sentence", help="what is paired (default: sentence)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Read, align, write. Returns the exit code."""
    from moesaic.data.alignment import align

    texts = {language: _read(file) for language, file in map(_language_and_file, args.texts)}
    if len(texts) < len(args.texts):
        raise ConfigError("a language is given twice; give each text its own")
    if args.out.suffix != ".jsonl":
        raise ConfigError(f"--out {args.out}; name it .jsonl, as `moesaic train --corpus` reads it")
    aligned = align(texts, args.unit)
    if not aligned.groups:
        raise DataError("no part of these texts is a translation of another; look whether they are the same text")
    _write(args.out, aligned)
    _show(aligned, list(texts), args)
    output.next_command(f"moesaic train --config examples/translation.toml --corpus {args.out} --out runs/translation")
    return 0


def _language_and_file(word: str) -> tuple[str, Path]:
    language, separator, file = word.partition("=")
    if not separator or not language or not file:
        raise ConfigError(f"{word!r}; write LANGUAGE=FILE, for example en=book-en.txt")
    return language, Path(file)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; convert it, for example with iconv") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; check the path") from error


def _write(place: Path, aligned: "Aligned") -> None:
    from moesaic.train.resume import write_beside

    place.parent.mkdir(parents=True, exist_ok=True)
    write_beside(place, "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in aligned.groups))


def _show(aligned: "Aligned", languages: list[str], args: argparse.Namespace) -> None:
    first = languages[0]
    kept = {language: [group[language] for group in aligned.groups if language in group] for language in languages}
    if args.json:
        output.print_json(
            {
                "pairs": str(args.out),
                "groups": len(aligned.groups),
                "texts": {language: len(texts) for language, texts in kept.items()},
                "left_out": dict(sorted(aligned.left_out.items())),
                "sections": aligned.sections,
                "even_sections": aligned.even_sections,
            }
        )
        return
    output.talk(
        f"{len(aligned.groups)} groups; {aligned.even_sections} of {aligned.sections} sections between headings have "
        f"as many paragraphs as in {first}"
    )
    rows = [
        (language, str(len(texts)), output.number(sum(map(len, texts))), _reasons(aligned, language))
        for language, texts in kept.items()
    ]
    output.table(("language", "texts", "characters", "left out"), rows)


def _reasons(aligned: "Aligned", language: str) -> str:
    found = {
        why.removeprefix(f"{language}: "): n for why, n in aligned.left_out.items() if why.startswith(f"{language}:")
    }
    return ", ".join(f"{count} {why}" for why, count in sorted(found.items())) or "-"
