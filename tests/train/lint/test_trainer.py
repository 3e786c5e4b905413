"""What transformers 5.23 gets wrong is found with its factors, and nothing where it is corrected."""

import pytest

from moesaic import lint
from tests.train.lint.trainers import corrected, plain, silent

POOLED, PARTS, RANKS = (
    "layers pooled in the balance loss",
    "balance loss over micro-batches",
    "balance loss over ranks",
)


@pytest.mark.slow
def test_mixtral_and_its_trainer_have_pooled_layers_and_a_loss_that_grows():
    report = lint(plain)
    assert [found.check for found in report.findings] == [POOLED, PARTS, RANKS], str(report)
    assert report[POOLED].measured["due"] == 4.0
    assert report[POOLED].measured["score"] == pytest.approx(1.0, abs=0.01)  # as perfect balance does
    assert report[PARTS].measured["factors"] == pytest.approx({"2": 2.0, "4": 4.0}, abs=0.01)
    assert report[RANKS].measured["factors"] == pytest.approx({"2": 2.0}, abs=0.01)


@pytest.mark.slow
def test_a_corrected_one_has_no_findings():
    report = lint(corrected)
    assert not report.findings, str(report)
    assert report[POOLED].verdict == report[PARTS].verdict == report[RANKS].verdict == "sound"
    assert report["balance loss counted after dropping"].verdict == "sound"


@pytest.mark.slow
def test_a_balance_loss_that_is_configured_and_not_computed_is_found():
    report = lint(silent, ranks=0)
    assert [found.check for found in report.findings] == ["balancing"], str(report)
