"""`moesaic doctor`, and `moesaic train --doctor`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moesaic import hub
from moesaic.cli.text import open_tokenizer
from moesaic.data.tokenizer import Tokenizer
from moesaic.telemetry.probe import routed_layers
from moesaic.train.doctor.examination import Examination
from moesaic.train.doctor.findings import Finding
from tests.cli.conftest import TEXT
from tests.cli.tiny_recipe import RECIPE


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def test_a_copied_and_a_closed_expert_are_named(moesaic, moe_folder, text_file, tmp_path):
    model = hub.load(moe_folder)
    layers = routed_layers(model)
    experts, router = layers[0].experts, layers[1].router
    assert router.weight is not None
    with torch.no_grad():
        for part in experts.parameters():
            part.normal_(0.0, 0.2)
            part[4] = part[1]
        router.weight[:] = 0  # ties go to the lower experts: 0 and 1 take all
    hub.save(model, tmp_path / "ill", tokenizer=open_tokenizer(str(moe_folder)))
    ran = moesaic("doctor", tmp_path / "ill", "--data", text_file, "--json")
    assert ran.exit_code == 0, ran.err
    found = {(each["kind"], each["layer"], each["expert"], each["other"]) for each in ran.json["findings"]}
    assert ("duplicate", 0, 1, 4) in found
    assert {("dead", 1, expert, None) for expert in (2, 3, 4)} | {("oversized", 1, 0, None)} <= found
    assert ran.json["layers"][1]["states"] == ["oversized", "oversized", "dead", "dead", "dead"]
    shown = moesaic("doctor", tmp_path / "ill", "--data", text_file)
    assert "layer 1: expert 3 has 0.00 of its fair share" in shown.out and "Training could: " in shown.out
    assert shown.err.splitlines()[-1].startswith("next: moesaic train --doctor act")


def test_experts_that_are_only_cold_get_no_advice():
    findings = (
        Finding(kind="cold", layer=0, expert=1, measured="expert 1"),
        Finding(kind="dead", layer=0, expert=2, measured="expert 2"),
    )
    advice = Examination(num_tokens=1, layers=(), choices={}, text_digest="", findings=findings).advice()
    assert [told is None for _, told in advice] == [True, False]


def test_a_router_that_was_drawn_anew_has_not_settled(moesaic, moe_folder, text_file, tmp_path):
    model = hub.load(moe_folder)
    with torch.no_grad():
        weight = routed_layers(model)[1].router.weight
        assert weight is not None
        weight.normal_(generator=torch.Generator().manual_seed(4))
    hub.save(model, tmp_path / "tuned", tokenizer=open_tokenizer(str(moe_folder)))
    options = ("--data", text_file, "--against", moe_folder)
    states = [each["state"] for each in moesaic("doctor", tmp_path / "tuned", *options, "--json").json["changes"]]
    assert states == ["settled", "unsettled"]
    shown = moesaic("doctor", tmp_path / "tuned", *options)
    assert f"since {moe_folder}" in shown.out and "layer 1: " in shown.out and "goes to other tokens" in shown.out


@pytest.mark.parametrize("folder", ["dense_folder"])
def test_a_model_without_experts_is_said_to_have_none(moesaic, folder, text_file, request):
    ran = moesaic("doctor", request.getfixturevalue(folder), "--data", text_file)
    assert ran.exit_code == 2 and "has no experts: every layer is dense" in ran.err


@pytest.fixture
def corpus(tmp_path) -> Path:
    for domain, words in (("prose", "the cat sat on the mat and looked at the dog. "), ("code", "x = f(y) + 1\n")):
        (tmp_path / "corpus" / domain).mkdir(parents=True)
        for number in range(30):
            (tmp_path / "corpus" / domain / f"{number:02}.txt").write_text(f"{domain} {number}: {words}" * 6)
    return tmp_path / "corpus"


def test_training_keeps_a_log_and_a_run_that_still_writes_can_be_looked_at(moesaic, tmp_path, text_file, corpus):
    (tmp_path / "run.toml").write_text(RECIPE, encoding="utf-8")
    out = tmp_path / "run"
    arguments = ("--config", tmp_path / "run.toml", "--corpus", corpus, "--out", out, "--json")
    ran = moesaic("train", *arguments, "--doctor", "advise", "--prometheus")
    assert ran.exit_code == 0, ran.err
    assert json.loads((out / "recipe.json").read_text())["recipe"]["train"]["doctor"] == "advise"
    assert (out / "doctor.jsonl").exists() and "moesaic_expert_rows_total" in (out / "metrics.prom").read_text()
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"mean_scores", "logits", "dropped_rows"} <= line["load"]["layers"][0].keys()
    (out / "model").rename(tmp_path / "elsewhere")  # as it is before the run is done
    looked = moesaic("doctor", out, "--data", text_file, "--json")
    assert looked.exit_code == 0, looked.err
    assert looked.json["checkpoint"].endswith("checkpoints/step-000002") and "is a run; this is" in looked.err
    assert "changes" not in looked.json  # it is the only checkpoint
    shutil.copytree(out / "checkpoints" / "step-000002", out / "checkpoints" / "step-000001")
    looked = moesaic("doctor", out, "--data", text_file, "--json")
    assert looked.json["against"].endswith("checkpoints/step-000001")
    assert {change["state"] for change in looked.json["changes"]} == {"settled"}
    for folder in (out / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    assert "a run without a checkpoint yet" in moesaic("doctor", out, "--data", text_file).err
    again = moesaic("train", "--out", out, "--resume", "--doctor", "act", "--json")
    assert again.exit_code == 0, again.err  # the doctor may be called later


def test_models_of_other_shapes_are_refused_before_anything_is_read(
    moesaic, moe_folder, dense_folder, text_file, tmp_path
):
    fields = json.loads((moe_folder / "config.json").read_text())
    (tmp_path / "wider").mkdir()
    (tmp_path / "wider" / "config.json").write_text(json.dumps({**fields, "num_local_experts": 7}))
    for against, seen in (
        (tmp_path / "wider", "wider routes in layers of 7 experts (0, 1), and "),
        (dense_folder, "no layers that route"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        ran = moesaic("doctor", moe_folder, "--data", text_file, "--against", against)
        assert (ran.exit_code, seen in ran.err, "examining" in ran.err) == (2, True, False), ran.err


@pytest.mark.parametrize("verb", ["doctor", "trace"])
def test_a_tokenizer_of_another_model_is_told(moesaic, moe_folder, tmp_path, verb):
    shutil.copytree(moe_folder, tmp_path / "model")
    words = " ".join(f"{letter}{letter}{other}{other}" for letter in "bcdfghjklm" for other in "nopqrstuvw") + " "
    other = Tokenizer.train([words * 9], vocab_size=600)
    other.save(tmp_path / "model")
    assert max(other.encode(words)) >= hub.read_config(moe_folder).vocab_size
    (tmp_path / "text.txt").write_text(words)
    given = ("--data",) if verb == "doctor" else ("--out", tmp_path / "t.npz", "--text")
    ran = moesaic(verb, tmp_path / "model", *given, tmp_path / "text.txt")
    assert (ran.exit_code, "is another model's: put its own there" in ran.err) == (2, True), ran.err
    assert not (tmp_path / "t.npz").exists()
