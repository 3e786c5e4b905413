"""Disclosed results: the page is fresh, its figures hold, and no row has a part in its own prediction."""

from pathlib import Path

import pytest

from moesaic.plan.disclosed import table
from moesaic.plan.disclosed.fit import Predicted, Values, median_error
from moesaic.plan.disclosed.row import Row
from moesaic.plan.disclosed.speed import Case, Constants, trained

PAGE = Path(__file__).parents[3] / "docs" / "plan_accuracy.md"
README = PAGE.parents[1] / "README.md"
Results = tuple[list[Row], list[Predicted], list[Predicted]]


@pytest.fixture(scope="module")
def results() -> Results:
    return table.results()


def test_the_page_is_fresh(results: Results) -> None:
    assert PAGE.read_text(encoding="utf-8") == table.page(*results), f"stale; run `{table.COMMAND}`"
    assert table.short(*results[:2]) in README.read_text(encoding="utf-8"), "the README's figures are stale"


def test_accounting_rows_agree_but_for_those_that_are_explained(results: Results) -> None:
    disagree = {row.what for row in results[0] if not row.agrees}
    assert disagree <= table.OUTLIERS.keys()
    by_name = {row.what: row for row in results[0]}
    assert by_name["gpt-oss-120b: file"].predicted == pytest.approx(60.77, abs=0.05)
    assert by_name["DeepSeek: cost of a day"].predicted == 87072


def test_speeds_are_near_and_the_worst_are_explained(results: Results) -> None:
    _, each, by_source = results
    assert len(each) >= 20
    assert median_error(each) <= 0.15 and median_error(by_source) <= 0.25
    assert {one.case.what for one in table.worst(each)} <= table.WORST.keys()


def test_no_row_has_a_part_in_its_own_prediction() -> None:
    def cases(first: float) -> list[Case]:
        disclosed = {"a": first, "b": 1 / 0.3, "c": 1 / 0.5}
        groups = {"a": "x", "b": "x", "c": "y"}
        return [
            Case(name, "s", value, lambda e: 1 / e.compute, "", "", groups[name]) for name, value in disclosed.items()
        ]

    usual, odd = (Values(cases(first)) for first in (1 / 0.3, 1000.0))
    assert usual.predict_each()[0].value == odd.predict_each()[0].value
    # Of other sources only c is left, which says 0.5.
    assert usual.predict_each(by_source=True)[0].constants.compute == 0.5


def test_training_by_hand() -> None:
    # One device, no sending: three forward passes of products, which take 1 / training times as long.
    slow, fast = (trained("olmoe-1b-7b", "h100", "bf16", 4096, 1)(Constants(0.3, 1.0, share)) for share in (0.5, 1.0))
    assert slow == pytest.approx(2 * fast)
    products = 3 * 2 * 1.18e9 / (0.3 * 989e12)
    assert products < fast < 1.6 * products
