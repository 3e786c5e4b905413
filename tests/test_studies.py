"""The studies in benchmarks/: what is finished is not done again; tables and plots say what was measured."""

import json
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.errors import ConfigError, DataError
from moesaic.models.decoder import Decoder
from moesaic.train.loop import Trainer
from tests.benchmark_programs import imported
from tests.train.tiny_run import packed_text

MODULES = ("scatter", "studies", "balance_study", "design_study")
TEXT: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=61), packed=packed_text())
RECIPE = {
    "vocab_size": 61,
    "model": {
        "model_type": "moesaic",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "router": "switch",
    },
    "train": {"steps": 3, "batch_size": 4, "sequence_length": 16, "balance_losses": []},
}


@pytest.fixture(scope="module")
def programs() -> Iterator[Any]:
    with imported(MODULES) as found:
        yield found


@pytest.fixture
def study(programs: Any) -> Any:
    cell = programs.studies.Cell
    limited = cell("limited", {"capacity": {"factor": 0.5}}, {"balance_losses": [["switch", 0.1]]})
    return programs.studies.Study(RECIPE, [cell("plain"), limited])


def run(programs: Any, study: Any, out: Path, seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    return programs.studies.run(study, study.cells, seeds, TEXT, programs.studies.Results.in_folder(out))


def test_what_is_finished_is_not_done_again(programs: Any, study: Any, tmp_path: Path) -> None:
    first = run(programs, study, tmp_path)
    assert [(result["cell"], result["seed"]) for result in first] == [
        (name, seed) for seed in (0, 1) for name in ("plain", "limited")
    ]
    place = tmp_path / "results.jsonl"
    lines = place.read_bytes()
    assert run(programs, study, tmp_path) == first
    assert place.read_bytes() == lines

    place.write_bytes(lines[:-40])  # killed while it wrote its last line
    again = run(programs, study, tmp_path)
    assert place.read_bytes().startswith(lines[: lines[:-1].rfind(b"\n") + 1])
    timed = ("seconds", "tokens_per_s")
    assert [{k: v for k, v in one.items() if k not in timed} for one in again] == [
        {k: v for k, v in one.items() if k not in timed} for one in first
    ]


def test_what_is_measured(programs: Any, study: Any, tmp_path: Path) -> None:
    plain, limited = run(programs, study, tmp_path, seeds=(0,))
    assert plain["dropped"] == 0 and plain["capacity_gap"] is None
    assert 0.4 < limited["dropped"] < 0.9 and isinstance(limited["capacity_gap"], float)
    for result in (plain, limited):
        assert result["max_violation"] == pytest.approx(sum(result["max_violation_by_layer"]) / 2)
        assert 0 <= result["max_violation"] <= 3
        assert result["bits_per_byte"] == pytest.approx(sum(result["by_domain"].values()) / 2)
        assert result["tokens"] == 3 * 4 * 16


def test_results_of_other_settings_are_refused(programs: Any, study: Any, tmp_path: Path) -> None:
    run(programs, study, tmp_path, seeds=(0,))
    other = programs.studies.Study({**RECIPE, "train": {**RECIPE["train"], "steps": 4}}, study.cells)
    with pytest.raises(DataError, match="of other settings or other text; choose another --out"):
        run(programs, other, tmp_path, seeds=(0,))
    (tmp_path / "results.jsonl").write_text("what\n")
    with pytest.raises(DataError, match="has a line that is no JSON"):
        run(programs, study, tmp_path)


def test_an_impossible_cell_is_refused_before_the_first_is_trained(programs: Any, study: Any, tmp_path: Path) -> None:
    bad = programs.studies.Study(RECIPE, [*study.cells, programs.studies.Cell("bad", {"router": "gshard_top2"})])
    with pytest.raises(ConfigError, match="it always has 2"):
        run(programs, bad, tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
    with pytest.raises(ConfigError, match="--cells 'none'; known: plain, limited"):
        study.chosen(["none"])


@pytest.mark.parametrize("name", ["balance_study", "design_study"])
def test_every_cell_can_be(programs: Any, name: str) -> None:
    study = getattr(programs, name).study(40)
    names = [cell.name for cell in study.cells]
    assert len(set(names)) == len(names)
    active = [study.recipe_of(cell, 0).model_config(4096, 0).active_all for cell in study.cells]
    assert max(active) < 1.02 * min(active)  # the routers themselves differ a little
    if name == "design_study":
        assert {cell for section in programs.design_study.SECTIONS.values() for cell in section} == set(names)


def test_one_expert_gets_80_percent(programs: Any) -> None:
    model = {**RECIPE["model"], "router": {"name": "sigmoid_topk", "renormalize": False, "selection_bias": True}}
    train = {**RECIPE["train"], "steps": 60, "learning_rate": 1e-3, "selection_bias_rate": 0.0}
    recipe = programs.studies.Study({**RECIPE, "model": model, "train": train}, []).recipe_of(
        programs.studies.Cell("skewed"), 0
    )
    trainer = Trainer(Decoder(recipe.model_config(61, 0)).initialize(0), recipe.train, TEXT.packed)
    shares = []
    while trainer.step < 60:
        report = trainer.train_step()
        programs.design_study.prefer_one(trainer, report)
        shares.append([layer.counts_E[0] / layer.counts_E.sum() for layer in report.load.layers])
    for share in zip(*shares[-20:], strict=True):
        assert sum(share) / 20 == pytest.approx(0.8, abs=0.1)


def test_the_scatter_plot_places_what_it_names(programs: Any) -> None:
    dot = programs.scatter.Dot
    dots = [dot("low & even", [(0.01, 2.0), (0.02, 2.1)]), dot("high", [(1.0, 2.5)], True), dot("same", [(1.0, 2.0)])]
    picture = programs.scatter.scatter(dots, title="a < b", x_label="x", y_label="y")
    svg = xml.etree.ElementTree.fromstring(picture)
    circles = [each for each in svg.iter() if each.tag.endswith("circle") and list(each)]
    at = {(each[0].text, float(each.get("cx") or 0), float(each.get("cy") or 0)) for each in circles}
    marks = {name: (x, y) for name, x, y in at if x < 600}
    legend = {name for name, x, _ in at if x > 600}
    assert legend == marks.keys() == {"low & even", "high", "same"}
    assert marks["low & even"][0] < marks["high"][0] == marks["same"][0]
    assert marks["high"][1] < marks["low & even"][1] < marks["same"][1]  # down is less


def test_the_verdict_takes_the_best_of_each_kind(programs: Any) -> None:
    def result(cell: str, loss: float, violation: float) -> dict[str, Any]:
        return {"cell": cell, "bits_per_byte": loss, "max_violation": violation}

    results = [
        result("none", 1.0, 5.0),
        result("switch 0.1", 2.1, 0.2),
        result("switch 0.01", 2.0, 0.4),
        result("aux-free 0.01", 1.99, 0.09),
        result("aux-free 0.003", 1.9, 0.3),
    ]
    said = programs.balance_study.verdict(results)
    assert said.startswith("aux-free 0.01 reaches MaxVio 0.1 (0.090) at 1.9900 bits per byte, no worse than the best")
    assert "switch 0.01: 2.0000 at MaxVio 0.400" in said
    assert "does not reach" in programs.balance_study.verdict([results[1], results[4]])


def test_a_mistake_is_one_line(
    programs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = programs.balance_study
    monkeypatch.setattr("sys.argv", ["balance_study.py", "--cells", "nothing"])
    with pytest.raises(SystemExit) as left:
        programs.studies.conduct(None, study.EXAMPLE, study.study, study.show, steps=4, seeds=[0])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --cells 'nothing'; known: none, switch 0.001") and said.count("\n") == 1


def test_the_list_is_json_in_columns(
    programs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = programs.design_study
    monkeypatch.setattr("sys.argv", ["design_study.py", "--list"])
    programs.studies.conduct(None, study.EXAMPLE, study.study, study.show, steps=4, seeds=[0])
    printed = capsys.readouterr().out
    assert all(cell.name in printed for cell in study.study(4).cells)
    assert json.dumps({"capacity": {"factor": 1.25}}) in printed
