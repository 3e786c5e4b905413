import json

import numpy as np
import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.telemetry.probe import probe
from moesaic.train.doctor import Doctor
from tests.parallel.gloo import on_ranks
from tests.tiny import tiny_config
from tests.train.doctor.sick import CONFIG, copy_expert, doctored, kill, looks, theatre, train
from tests.train.tiny_run import changed, state_of, trainer


def counts(run, steps: int = 4) -> list[int]:
    return np.sum([run.train_step().load.layers[0].counts_E for _ in range(steps)], axis=0).tolist()


def test_a_healthy_run_is_the_same_to_the_bit_with_a_doctor_or_without():
    runs = [doctored(mode) for mode in ("off", "advise", "act")]
    lines = [train(run, 12) for run in runs]
    states = [state_of(run) for run in runs]
    assert states[0] == states[1] == states[2]
    assert {line["finding"] for line in lines[1]} <= {"cold"} and lines[0] == lines[2] == []


def test_a_killed_expert_gets_weights_and_half_of_the_busiest_ones_tokens():
    run = doctored(learning_rate=1e-4)
    kill(run, 3)
    lines = train(run, 4)
    assert [line["doctor"] for line in lines] == ["treated"]
    (line,) = lines
    assert (line["finding"], line["expert"], line["remedy"]) == ("dead", 3, "reseed")
    before, after = line["probability_mass_of_both"]
    assert after == pytest.approx(before, rel=1e-4)
    busy = line["from"]
    for part in theatre(run).expert_weights:
        assert torch.equal(part.master[3], part.master[busy]) and part.master[3].any()
    shares = counts(run)
    assert min(shares[3], shares[busy]) > 0.25 * (shares[3] + shares[busy])


def test_ill_experts_have_no_part_in_what_others_get():
    run = doctored(learning_rate=1e-4)
    kill(run, 3)
    cut = theatre(run)
    for part in cut.expert_weights:  # of 0, though tokens reach it
        cut.write(part, 2, torch.zeros_like(part.master[2]))
    lines = train(run, 4)
    assert {line["expert"] for line in lines} == {2, 3} and not {line["from"] for line in lines} & {2, 3}
    weight = cut.router_weight("weight")
    assert weight is not None
    lengths_E = weight.master.norm(dim=-1)
    assert lengths_E.max() < 4 * lengths_E.median()


def test_without_a_doctor_it_stays_dead():
    run = doctored("off")
    kill(run, 3)
    train(run, 16)
    assert counts(run)[3] == 0 and not theatre(run).expert_weights[0].master[3].any()


def test_of_two_identical_experts_one_serves_both_and_the_other_begins_anew():
    run = doctored(learning_rate=1e-4)
    copy_expert(run, 0, 1)
    (line,) = train(run, 4)
    assert (line["finding"], line["expert"], line["other"], line["remedy"]) == ("duplicate", 0, 1, "merge")
    assert {line["stays"], line["begins_anew"]} == {0, 1} and line["from"] != line["begins_anew"]
    weights = theatre(run).expert_weights
    assert not any(torch.equal(part.master[0], part.master[1]) for part in weights)


def test_advice_is_given_once_and_changes_nothing():
    told, untold = doctored("advise"), doctored("off")
    for run in (told, untold):
        kill(run, 3)
    lines = [line for line in train(told, 12) if line["finding"] == "dead"]
    train(untold, 12)
    assert [line["doctor"] for line in lines] == ["advised"]
    assert "all weights of expert 3 are 0" in lines[0]["sentence"] and "Remedy: give it" in lines[0]["sentence"]
    assert state_of(told) == state_of(untold)


def test_what_makes_the_loss_worse_at_once_is_undone_to_the_bit():
    ill, left = doctored(look=looks(at_once=-1.0)), doctored("off")
    for run in (ill, left):
        kill(run, 3)
    lines = train(ill, 4)
    train(left, 4)
    assert [line["doctor"] for line in lines] == ["treated", "undone"]
    assert state_of(ill) == state_of(left)


def test_what_has_made_it_worse_after_its_course_is_undone_and_not_tried_again():
    run = doctored(look=looks(worse=-1.0), precision="bf16", ema_decay=0.9)
    kill(run, 3)
    lines = train(run, 30)
    assert [line["doctor"] for line in lines] == ["treated", "undone"]
    assert lines[1]["step"] == lines[0]["step"] + 6
    for part in theatre(run).expert_weights:
        assert not part.master[3].any() and not part.parameter[3].any()
        assert run.optimizer.average is not None and not run.optimizer.average.of(part)[3].any()


def test_the_optimizers_rows_are_the_donors_in_size_and_have_no_direction():
    run = doctored()
    train(run, 3)
    kill(run, 3)
    cut = theatre(run)
    part = cut.expert_weights[0]
    state = run.optimizer.rules[part.name].state
    cut.write(part, 3, part.master[1], state_of=1)
    assert not state["exp_avg"][3].any() and torch.equal(state["exp_avg_sq"][3], state["exp_avg_sq"][1])
    assert state["exp_avg_sq"][1].any()


def test_coefficients_last_for_the_course_and_are_put_back():
    """Expert 0 takes every token: its bias is raised a little, so that its score still has a gradient."""
    run = doctored(look=looks(every=4))
    bias = theatre(run).router_weight("bias")
    assert bias is not None
    bias.master[0] = 1.5
    lines = train(run, 4)
    assert [(line["finding"], line["remedy"]) for line in lines] == [("oversized", "coefficients")]
    assert lines[0]["coefficients"] == {"switch": [0.01, pytest.approx(0.1)]}
    assert run.stepper.coefficients(run.step) == {"switch": pytest.approx(0.1)}
    assert train(run, 6)[0]["doctor"] == "kept"
    assert run.stepper.coefficients(run.step) == {"switch": 0.01}


def test_an_expert_that_has_taken_everything_gets_an_ordinary_row():
    run = doctored()
    bias = theatre(run).router_weight("bias")
    assert bias is not None
    bias.master[0] = 30.0
    (line,) = train(run, 4)
    assert (line["finding"], line["remedy"]) == ("oversized", "reset_router_row")
    assert abs(float(bias.master[0])) < 1


def test_a_selection_bias_is_shifted_until_the_share_is_fair():
    run = doctored(config=tiny_config(windows=(None, None), router="sigmoid_topk", selection_bias=True))
    selection_bias = theatre(run).router_buffer("selection_bias")
    assert selection_bias is not None
    selection_bias[2] = -5.0
    (line,) = train(run, 4)
    assert (line["finding"], line["expert"], line["remedy"]) == ("dead", 2, "bias_nudge")
    found = probe(run.model, *run.doctor.questions[:1])[0].decision.rows.counts_E  # type: ignore[union-attr]
    assert int(found[2]) == pytest.approx(128 * 2 / 5, rel=0.1)


def test_a_stop_in_the_middle_of_a_course_changes_nothing():
    """State goes through JSON; two doctors then do the same, and undo the same rows."""
    whole, first = doctored(look=looks(worse=-1.0)), doctored(look=looks(worse=-1.0))
    for run in (whole, first):
        kill(run, 3)
    expected = train(whole, 14)
    train(first, 6)
    assert first.doctor is not None
    facts, tensors = first.doctor.state()
    second = doctored(look=looks(worse=-1.0))
    second.model.load_state_dict(first.model.state_dict())
    for (_, new), (_, old) in zip(second.optimizer.state(), first.optimizer.state(), strict=True):
        new.copy_(old)
    second.step = first.step
    assert second.doctor is not None
    second.doctor.restore(json.loads(json.dumps(facts)), {name: tensor.clone() for name, tensor in tensors.items()})
    assert train(second, 8) == expected[1:]
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_micro_batches_are_judged_as_one_step():
    run = doctored(batch_size=2, micro_batches=4)
    kill(run, 3)
    assert [(line["remedy"], line["expert"]) for line in train(run, 4)] == [("reseed", 3)]


def two_ranks(ranks, argument) -> tuple[list, dict[str, bytes]]:
    """Every rank its half of each batch, a doctor each."""
    from moesaic.data.loader import Batch
    from moesaic.train.step import Stepper

    run = doctored()
    stepper = Stepper(run.model, run.settings, ranks=ranks)
    run.stepper = stepper
    kill(run, 3)
    assert run.doctor is not None and run.recorder is not None
    run.doctor.trained = stepper
    lines = []
    for step in range(6):
        whole = run.batches.batch(step)
        half = Batch(*(part[ranks.rank :: ranks.size] for part in whole[:4]))
        result = stepper.run(step, [half], run.recorder)
        assert result.load is not None
        lines += run.doctor.after_step(step + 1, result.load)
    return lines, {name: tensor.numpy().tobytes() for name, tensor in run.model.state_dict().items()}


@pytest.mark.slow
def test_ranks_do_the_same():
    (lines, weights), (others_lines, others_weights) = on_ranks(2, "tests.train.doctor.test_doctor:two_ranks")
    assert weights == others_weights
    assert lines == others_lines and [line["remedy"] for line in lines] == ["reseed"]


def test_models_that_cannot_be_treated_are_refused():
    import dataclasses

    from moesaic.config import MlpConfig, StackConfig

    layer = dataclasses.replace(CONFIG.layers[0], feed_forward=MlpConfig(intermediate_size=17))
    dense = dataclasses.replace(CONFIG, decoder=StackConfig(layers=(layer,)))
    with pytest.raises(ConfigError, match="this model is dense"):
        trainer(changed(doctor="act"), dense)
    assert not isinstance(trainer(changed(doctor="off"), dense).doctor, Doctor)
