"""A set-up that is right has no findings, and each defect that is planted in it is found, alone, with its size."""

import functools
import json

import pytest
import torch

import moesaic
from moesaic.errors import ConfigError
from moesaic.train.lint.checks import CHECKS
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.stand import Stand
from moesaic.train.lint.suite import ORDER, set_up_of
from tests.train.lint.planted import CAPACITY, COLUMNS, EXPERTS, ROWS, TOP_K, company, with_ranks_wrong

FOUND = {
    "pooled": ("layers pooled in the balance loss", {"score": 1.0, "due": EXPERTS / TOP_K, "layers": 3}),
    "accumulation": ("balance loss over micro-batches", {"factors": {"2": 2.0, "4": 4.0}}),
    "padding": ("padding in the balance loss", {"padding": 1 / 3}),
    "loss after dropping": (
        "balance loss counted after dropping",
        {"capacity": -(-CAPACITY * ROWS * COLUMNS * TOP_K // EXPERTS)},
    ),
    "stuck": ("selection bias that never moves", {"moved": 0.0}),
    "bias after dropping": ("selection bias counted after dropping", {}),
    "zeros": ("groups masked with 0", {"changed_up": 0.0}),
    "idle": ("experts without gradient", {"number": 3, "of": 3 * EXPERTS}),
    "frozen": ("experts without gradient", {"number": 1, "of": 3 * EXPERTS}),
    "nothing": ("balancing", {"gradient_norm": 0.0}),
}


def test_what_is_right_has_no_findings_and_is_put_back():
    built = company()
    before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    report = moesaic.lint(lambda: built, ranks=0)
    assert report and not report.findings, str(report)
    assert {outcome.check for outcome in report.outcomes if outcome.verdict == "sound"} == {*ORDER} - {
        "balance loss over ranks"
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.model.state_dict().items())


@pytest.mark.parametrize("wrong", FOUND)
def test_the_check_for_a_planted_defect_sees_it(wrong):
    check, measured = FOUND[wrong]
    found = CHECKS[check].of(Stand(company(wrong)), Elsewhere(company, 0))
    assert found.verdict == "defect", found.says
    for name, value in measured.items():
        assert found.measured[name] == pytest.approx(value, abs=1e-2), name


@pytest.mark.slow
@pytest.mark.parametrize("wrong", FOUND)
def test_a_planted_defect_is_found_alone(wrong):
    report = moesaic.lint(functools.partial(company, wrong), ranks=0)
    assert [found.check for found in report.findings] == [FOUND[wrong][0]], str(report)


@pytest.mark.slow
def test_a_loss_that_grows_with_ranks_is_found():
    report = moesaic.lint(with_ranks_wrong)
    assert [found.check for found in report.findings] == ["balance loss over ranks"], str(report)
    assert report["balance loss over ranks"].measured["factors"]["2"] == pytest.approx(2.0, abs=1e-3)
    assert moesaic.lint(company)


def test_without_a_balance_loss_the_bias_is_what_balances():
    report = moesaic.lint(functools.partial(company, "bias only"), ranks=0)
    assert report and "selection bias offices.0.leaning" in report["balancing"].says
    assert report["layers pooled in the balance loss"].verdict == "not measured"


def test_the_report_is_read_by_people_and_machines():
    report = moesaic.lint(functools.partial(company, "pooled"), ranks=0)
    document = json.loads(json.dumps(report.to_json()))
    assert not document["sound"] and len(document["outcomes"]) == len(ORDER)
    text = str(report)
    assert "score 1.00, where 3.00 is due" in text and "What to do:" in text and "28255" in text
    assert report.__rich__() is not None


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ConfigError, match="the builder gave a Linear; let it return a transformers Trainer"):
        moesaic.lint(lambda: torch.nn.Linear(3, 5))
    dense = company()
    dense.model = torch.nn.Linear(3, 5)
    with pytest.raises(ConfigError, match="Linear has no mixture-of-experts blocks"):
        moesaic.lint(lambda: dense)
    assert set_up_of(dense) is dense
