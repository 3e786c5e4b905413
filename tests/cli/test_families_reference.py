"""docs/families.md is what the families say of themselves, and what the code that reads and writes files can do."""

from pathlib import Path

import pytest

from moesaic import families
from moesaic.cli.families_reference import COMMAND, family_rows, reference
from moesaic.families import _counted

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), f"docs/families.md is stale; run `{COMMAND}`"


def test_every_family_and_preset_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in families.names())
    assert all(f"| `{name}` " in page for name in families.presets() | _counted.PRESETS)


@pytest.mark.parametrize(
    ("family", "files"),
    [
        ("mixtral", ["one by one, stacked", "fp8", "`llama`", "-"]),
        ("dbrx", ["stacked", "-", "-", "-"]),
        ("gpt_oss", ["stacked", "mxfp4", "-", "-"]),
        ("qwen2", ["dense", "fp8"]),
    ],
)
def test_what_files_a_family_has(family: str, files: list[str]) -> None:
    assert family_rows(family)[1][1 : 1 + len(files)] == files
