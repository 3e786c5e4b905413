"""What lands on stdout and stderr."""

import io
import json

import pytest

from moesaic.cli import output


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (1536, "1.54K"),
        (134_515_008, "135M"),
        (999_600, "1.00M"),
        (46_702_792_704, "46.7B"),
    ],
)
def test_number(count, text):
    assert output.number(count) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (512, "512 B"), (1_230_000_000, "1.23 GB"), (93_405_585_408, "93.4 GB")]
)
def test_size(num_bytes, text):
    assert output.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0001, "<0.01 s"), (0.042, "0.042 s"), (7.5, "7.5 s"), (59.7, "60 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert output.duration(seconds) == text


def test_plain_table_aligns_numbers_right(capsys):
    output.table(["name", "total"], [["a", "1.2M"], ["longer", "-"], ["c", "135M"]])
    assert capsys.readouterr().out == "name    total\na        1.2M\nlonger      -\nc        135M\n"


def test_json_is_one_ascii_document(capsys):
    output.print_json({"text": "naïve 😀"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"text": "naïve 😀"}


def test_talk_goes_to_stderr(capsys):
    output.talk("hello")
    output.next_command("moesaic chat")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hello\nnext: moesaic chat\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters_from_text():
    terminal = Terminal()
    output.write("a\x1b[31mb\tc\n\x07", terminal)
    assert terminal.getvalue() == "a\ufffd[31mb\tc\n\ufffd"


def test_a_narrow_encoding_loses_characters_not_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    output.write("né😀\n", stream)
    assert raw.getvalue() == "né?\n".encode("latin-1")


def test_tables_on_a_terminal_are_drawn(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    output.table(["name", "total"], [["[bold]a", "1.2M"]])
    assert "[bold]a" in terminal.getvalue()
    assert "━" in terminal.getvalue()


def test_progress_off_a_terminal_is_one_line(capsys):
    with output.progress("reading", total=2) as advance:
        advance(1)
        advance(1, note="2 files")
    err = capsys.readouterr().err
    assert err.startswith("reading: ")
    assert err.endswith(", 2 files\n")


def test_progress_on_a_terminal_is_live(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with output.progress("reading", total=2) as advance:
        advance(2, note="done")
    assert "reading" in terminal.getvalue()
