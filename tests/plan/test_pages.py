"""What the pages show of a plan beyond what browsers are asked for in tests/cli."""

from dataclasses import replace

from moesaic.cli import plan_report
from moesaic.plan.hardware import Machine, find_machine
from moesaic.plan.layout import Layout
from moesaic.plan.plan import ServingPlan, TrainingPlan, make_plan


def test_the_page_of_training_has_every_stage():
    plan = make_plan("deepseek-v3", task="train", machine="64xh800", layout=Layout(pp=4, dp=16, ep=16))
    assert isinstance(plan, TrainingPlan)
    stages = plan.run.stages
    found = plan_report.page(plan)
    assert [f"stage {number}, each of 16" in found for number in range(1, 6)] == [True] * 4 + [False]
    assert ["logits" in stage.parts for stage in stages] == [False] * 3 + [True]
    waiting = [stage.parts["activations"] for stage in stages]
    assert waiting == sorted(waiting, reverse=True)
    assert plan.memory.parts == max((stage.parts for stage in stages), key=lambda parts: sum(parts.values()))


def test_roofs_of_one_height_have_one_name():
    device = find_machine("h100").device
    same = replace(device, flops=dict.fromkeys(device.flops, 1e12))
    plan = make_plan("mixtral-8x7b", machine=Machine(device=same, count=4))
    assert isinstance(plan, ServingPlan)
    drawn = plan_report.roofline(plan.decode, same, "roofs")
    assert drawn.count("FLOP/s</text>") == 1 and ", " in drawn[: drawn.index("FLOP/s</text>")][-20:]
