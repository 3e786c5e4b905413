"""`moesaic plan`."""

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from moesaic.bench import here
from moesaic.cli import plan
from moesaic.cli.plan_verify import BEGIN, END
from moesaic.errors import ConfigError
from moesaic.plan import hardware
from moesaic.plan.rates import measured_rates


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_the_verdict_comes_first(moesaic):
    ran = moesaic("plan", "mixtral-8x7b", "--machine", "8xh100", "--users", "50", "--context", "4k")
    assert ran.exit_code == 0
    assert ran.out.startswith("bandwidth binds: ")
    for seen in ("fits?", "how fast?", "experts", "equal active size", "$ a million output tokens"):
        assert seen in ran.out


def test_a_config_file_and_json(moesaic, moe_folder):
    ran = moesaic("plan", moe_folder / "config.json", "--machine", "rtx4090", "--context", "16", "--json")
    assert ran.exit_code == 0
    assert ran.json["fits"] and ran.json["context"] == 16
    assert moesaic("plan", moe_folder, "--machine", "rtx4090", "--context", "16", "--json").json == {
        **ran.json,
        "model": str(moe_folder),
    }


def test_the_page_stands_alone(moesaic, tmp_path):
    page = tmp_path / "plan.html"
    options = ("--machine", "8xh200", "--users", "16", "--report", page)
    assert moesaic("plan", "deepseek-v3", *options).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 5  # memory, two roofs, batches, dense models
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    for picture in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + picture.split("</svg>")[0] + "</svg>")


def test_a_page_has_a_stack_for_each_stage_and_is_readable_in_the_dark(moesaic, tmp_path):
    page = tmp_path / "plan.html"
    options = ("--machine", "8xa100", "--layout", "tp=2,pp=4", "--users", "64", "--report", page)
    assert moesaic("plan", "qwen3-next-80b-a3b", *options).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert [f"stage {number}, each of 2" in text for number in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_processors_without_links_are_planned_alone(moesaic, tmp_path):
    ran = moesaic("plan", "qwen3-30b-a3b", "--machine", "epyc-9654", "--report", tmp_path / "plan.html")
    assert ran.exit_code == 0 and "2xepyc" not in ran.out
    ran = moesaic("plan", "mixtral-8x7b", "--machine", "2xm3-max")
    assert ran.exit_code == 2 and "no link or network is stated; plan one" in ran.err


def test_options_of_one_model_are_refused_of_others(moesaic, tmp_path):
    page = tmp_path / "plan.html"
    for words in (("plan", "compare", "mixtral-8x7b", "llama-2-70b"), ("plan",)):
        ran = moesaic(*words, "--machine", "2xh100", "--report", page)
        assert ran.exit_code == 2 and "--report" in ran.err and not page.exists()


def test_two_models_side_by_side(moesaic, tmp_path):
    plot = tmp_path / "both.svg"
    words = ("plan", "compare", "mixtral-8x7b", "llama-2-70b", "--machine", "2xh100", "--context", "4k")
    ran = moesaic(*words, "--plot", plot)
    assert ran.exit_code == 0 and ran.out.startswith("mixtral-8x7b is faster at every batch")
    ElementTree.fromstring(plot.read_text(encoding="utf-8"))
    both = moesaic(*words, "--json").json
    assert [model["model"] for model in both["models"]] == ["mixtral-8x7b", "llama-2-70b"]


def test_which_models_a_machine_serves(moesaic):
    ran = moesaic("plan", "--machine", "rtx4090", "--users", "2", "--context", "4k", "--format", "int4", "--json")
    names = [choice["model"] for choice in ran.json["models"]]
    assert "qwen3-30b-a3b" in names and "deepseek-v3" not in names


def test_training_and_its_budget(moesaic):
    ran = moesaic("plan", "mixtral-8x7b", "--task", "train", "--machine", "256xh100", "--tokens", "1T", "--json")
    assert ran.json["cost"]["tokens"] == 1e12 and ran.json["cost"]["dollars"] > 1e5


def test_predictions_so_far(moesaic, tmp_path):
    assert "nothing was predicted" in moesaic("plan", "verify").err
    kept = tmp_path / "state" / "moesaic" / "predictions.jsonl"
    kept.parent.mkdir(parents=True)
    one = {"source": "bench", "model": "m", "quantity": "decode_s", "predicted": 1.1, "measured": 1.0, "setting": {}}
    kept.write_text(json.dumps(one) + "\n")
    assert "10.0%" in moesaic("plan", "verify").out
    assert moesaic("plan", "verify", "--json").json["errors"][0]["number"] == 1


def test_predictions_of_one_file_go_into_a_page(moesaic, tmp_path):
    run, page = tmp_path / "run", tmp_path / "README.md"
    run.mkdir()
    one = {"source": "bench", "model": "m", "quantity": "decode_s", "predicted": 1.1, "measured": 1.0, "setting": {}}
    lines = [json.dumps({**one, "machine": "P, 2 threads", "date": "2026-11-23T10:00"})] * 3
    (run / "predictions.jsonl").write_text("\n".join(lines))
    page.write_text("before\n")
    refused = moesaic("plan", "verify", run, "--report", page)
    assert refused.exit_code == 2 and "put them where the table belongs" in refused.err
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # the second time nothing changes
        assert moesaic("plan", "verify", run, "--report", page).exit_code == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
        assert text.count("| bench | a step of decoding | 3 | 10.0% |") == 1
        assert "P, 2 threads. 2026-11-23." in text
    assert moesaic("plan", "verify", tmp_path / "none").exit_code == 2


def test_a_whole_life_with_every_multiplier(moesaic):
    work = "input=2k,output=500,requests=1M,reasoning=3,retries=1.1,cached=0.5,batch_discount=0.5"
    options = ("--machine", "8xh200", "--users", "64", "--against", "deepseek-v3-2025-02", "--workload", work)
    life = ("--tokens", "14.8T", "--set", "train_machine=2048xh800,served=10T")
    ran = moesaic("plan", "deepseek-v3", *options, *life)
    assert "14.8T tokens (2048xh800" in ran.out and "a whole life" in ran.out and "J an output token" in ran.out
    found = moesaic("plan", "deepseek-v3", *options, *life, "--json").json
    assert found["lifetime"]["served"] == 1e13 and found["lifetime"]["others"][0]["name"] == "deepseek-v3-2025-02"
    month = 1.1e6 * (2000 * (0.5 * 0.07 + 0.5 * 0.27) + 1500 * 1.10) * 0.5 / 1e6
    assert found["prices"][0]["month"] == pytest.approx(month)
    assert moesaic("plan", "deepseek-v3", *options, "--set", "served=1T").exit_code == 2


def test_a_price_of_another_unit_is_told_its_unit_with_a_machine_or_without(moesaic):
    for machine in ((), ("--machine", "8xh100")):
        ran = moesaic("plan", "deepseek-v3", *machine, "--price", "3 $/Mtok")
        assert ran.exit_code == 2 and "is a unit of $/Mtok, and this is in $/h" in ran.err


def test_prices_are_listed_and_compared_with(moesaic):
    assert "deepseek-v3-2025-02" in moesaic("plan", "--against", "all").out
    options = ("--machine", "8xh200", "--against", "deepseek-v3-2025-02", "--workload", "output=500,requests=1M")
    ran = moesaic("plan", "deepseek-v3", *options, "--json")
    assert ran.json["prices"][0]["month"] == pytest.approx(2000 * 0.27 + 500 * 1.10)


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["mixtral-8x7b", "--machine", "8xh1"], "unknown machine 'h1'"),
        (["mixtral-8x7c"], "nearest presets: mixtral-8x7b"),
        (["mixtral-8x7b", "--machine", "8xh100", "--layout", "ep=3"], "does not divide over ep=3"),
        (["mixtral-8x7b", "--context", "1M"], "takes 1 to 32,768"),
        (["mixtral-8x7b", "--machine", "h100", "--price", "2 $/Mtok"], "unit of $/Mtok, and this is in $/h"),
        (["mixtral-8x7b", "--price", "2 $/h"], "without --machine"),
        (["mixtral-8x7b", "--users", "many"], "give a whole number above 0"),
        (["mixtral-8x7b", "--set", "overlop=1"], "did you mean 'overlap'"),
        (["mixtral-8x7b", "--workload", "input=1,input=2"], "write input=VALUE once"),
        (["mixtral-8x7b", "--set", "served=1T"], "give the budget"),
        (["compare", "mixtral-8x7b"], "takes two models"),
        ([], "plan takes a MODEL"),
    ],
)
def test_what_makes_no_sense(moesaic, words, seen):
    ran = moesaic("plan", *words)
    assert ran.exit_code == 2
    assert seen in ran.err


def test_what_an_older_version_measured_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = hardware.here_file()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"device": {}, "kernels": {"linear": {}}}))
    for read in (measured_rates, hardware.measured_here):
        with pytest.raises(ConfigError, match=r"here.json is of another version, or damaged; take it away"):
            read()
    machine = hardware.find_machine("h100")
    rates = SimpleNamespace(busy="")
    monkeypatch.setattr(here, "measure", lambda: here.Here(machine, rates))  # type: ignore[arg-type]
    assert plan._here() is machine
    said = capsys.readouterr().err
    assert "of another version, or damaged: this machine is measured again" in said and "Error" not in said
