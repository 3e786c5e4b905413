"""lm-eval's local-completions against the server: the scores of transformers on the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve import tiny
from tests.serve.http.conftest import MODEL, Server

QUESTIONS = [
    {"query": f"{start} the", "choices": [" dog", " fox", " café"], "gold": index % 3}
    for index, start in enumerate(
        ["over", "the lazy dog,", "naïve", "quick brown", "12345.", "jumps", "fox", "lazy"] * 3
    )
]
TASK = """
task: moesaic_served
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def scores(model: str, arguments: dict[str, Any], tasks: Path) -> tuple[dict[str, float], list[list[float]]]:
    """The task's metrics, and the log likelihoods of every choice."""
    import lm_eval  # pyright: ignore[reportMissingImports]  it is not always installed
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["moesaic_served"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        batch_size=4,
    )
    samples = sorted(found["samples"]["moesaic_served"], key=lambda sample: sample["doc_id"])
    likelihoods = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    metrics = found["results"]["moesaic_served"]
    return {name: metrics[f"{name},none"] for name in ("acc", "acc_norm")}, likelihoods


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the package's own imports
def test_scores_are_those_of_transformers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="runs where the extra eval is installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    served = {
        "model": MODEL,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(tiny.folder()),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 2,
        "max_length": 511,
    }
    own = {"pretrained": str(tiny.folder()), "dtype": "float32", "device": "cpu", "max_length": 511}
    own["prefix_token_id"] = 0  # the tiny tokenizer names none, and lm-eval wants one
    ours, ours_each = scores("local-completions", served, tmp_path)
    theirs, theirs_each = scores("hf", own, tmp_path)
    assert ours == theirs
    for mine, wanted in zip(ours_each, theirs_each, strict=True):
        assert mine == pytest.approx(wanted, abs=1e-3)
