"""Training and serving together."""

from dataclasses import replace

import pytest

from moesaic.errors import ConfigError
from moesaic.plan.cost import Price, Workload
from moesaic.plan.hardware import find_machine
from moesaic.plan.lifetime import Lifetime, _between
from moesaic.plan.plan import ServingPlan, TrainingPlan, make_plan

WORK = Workload(input_tokens=1000, output_tokens=500, requests=1e6, reasoning=2, cached=0.5)
DEAR, CHEAP = (Price(name=name, input=amount, output=amount) for name, amount in (("dear", 90.0), ("cheap", 1e-3)))


def plan(**settings) -> ServingPlan:
    found = make_plan(
        "mixtral-8x7b", machine="2xh100", context=4096, users=64, workload=WORK, prices=(DEAR, CHEAP), **settings
    )
    assert isinstance(found, ServingPlan)
    return found


def life(**settings) -> Lifetime:
    found = plan(train_tokens=1e12, train_machine="64xh100", **settings).lifetime
    assert found is not None
    return found


def test_it_is_the_sum_of_what_training_and_serving_cost():
    found, month = life(served=3e12), plan().cost.month
    trained = make_plan("mixtral-8x7b", machine="64xh100", task="train", train_tokens=1e12)
    assert isinstance(trained, TrainingPlan) and found.training == trained.cost and month is not None
    assert found.training_machine == "64xh100" and found.months == pytest.approx(3e12 / 1e9)
    assert found.per_million == pytest.approx(month / 1e9 * 1e6)
    assert found.training.dollars is not None
    assert found.total == pytest.approx(found.training.dollars + 3e6 * found.per_million)


def test_without_a_number_the_workload_goes_on_for_three_years():
    assert life().served == pytest.approx(36 * 1e9)


def test_an_api_is_the_cheaper_until_training_has_paid_for_itself():
    dear, cheap, *dense = life(served=1e12).others
    assert dear.training == 0 and dear.per_million == pytest.approx(90 * (1000 / 1000 + 1))
    assert cheap.ours_from is None and dear.ours_from is not None
    at = life(served=dear.ours_from)
    assert at.total == pytest.approx(at.others[0].total)
    assert [each.name for each in dense] == ["dense, equal active size", "dense, about equal quality"]
    assert dense[0].training < dense[1].training


def test_between_what_it_is_the_cheaper():
    assert _between(10.0, 1.0, 3.0) == (5e6, None) and _between(10.0, 3.0, 1.0) == (None, None)
    assert _between(-10.0, 1.0, 3.0) == (0.0, None) and _between(-10.0, 3.0, 1.0) == (0.0, 5e6)


def test_a_machine_without_a_price_has_no_lifetime():
    machine = find_machine("2xh100")
    free = replace(machine, device=replace(machine.device, price=None))
    with pytest.raises(ConfigError, match="give --price"):
        make_plan("mixtral-8x7b", machine=free, context=4096, train_tokens=1e12)
