"""How unevenly experts are chosen, and what the busiest rank gets of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from moesaic.errors import ConfigError
from moesaic.plan.cluster.loads import RECORDED_QUANTILES, expert_loads
from moesaic.plan.cluster.placed import place
from moesaic.trace import Fingerprint, TokenRows, TracedForward, TraceWriter
from tests.plan.cluster.cluster_models import MODEL

RECORDED = Path(__file__).parents[4] / "shared" / "data" / "routing"
SHAPE = (4, 16)


@pytest.mark.parametrize("source", ["uniform", "recorded"])
def test_every_layer_has_k_choices(source: str) -> None:
    chances = expert_loads(MODEL, source)
    assert chances.shape == SHAPE and np.allclose(chances.sum(1), 2) and (chances <= 1).all()


def test_counts_of_a_file(tmp_path: Path) -> None:
    counts = np.ones(SHAPE)
    counts[:, 0] = 1000  # more than every token's first choice
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"loads": counts.tolist()}))
    chances = expert_loads(MODEL, str(path))
    assert np.allclose(chances[:, 0], 1) and np.allclose(chances[:, 1:], 1 / 15)
    path.write_text(json.dumps({"loads": counts[:3].tolist()}))
    with pytest.raises(ConfigError, match=r"loads of shape \(3, 16\) for 4 MoE layers of 16 experts"):
        expert_loads(MODEL, str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="one row of counts a MoE layer"):
        expert_loads(MODEL, str(path))
    with pytest.raises(ConfigError, match="unknown routing 'nowhere'"):
        expert_loads(MODEL, "nowhere")


def test_placing_by_load_lightens_the_busiest_rank() -> None:
    chances = expert_loads(MODEL, "recorded")
    in_order, eplb, refined = (
        place(MODEL, chances, ranks=4, redundant=4, method=method).mean_uneven
        for method in ("in_order", "eplb", "refined")
    )
    assert in_order > 1.1 > eplb >= refined >= 1


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded routing is not here")
def test_the_quantiles_are_those_of_the_recording() -> None:
    loads = np.zeros((26, 64))
    for task in ("intent", "summary", "translation"):
        with np.load(RECORDED / f"esft_dsv2lite_{task}.npz") as file:
            ids = file["expert_ids"]
        loads += np.stack([np.bincount(each.ravel(), minlength=64) for each in ids]) / ids.shape[1]
    relative = loads / loads.mean(1, keepdims=True)
    assert np.allclose(np.quantile(relative, np.linspace(0, 1, 21)), RECORDED_QUANTILES, atol=6e-4)


def test_counts_of_a_trace(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 16, (4, 50, 2))
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(MODEL)) as writer:
        rows = {
            layer: TokenRows(np.arange(51) * 2, ids[layer].ravel(), np.tile([0, 1], 50), np.ones(100, np.float32))
            for layer in range(4)
        }
        writer.append(TracedForward(rows=rows))
    chances = expert_loads(MODEL, str(tmp_path / "trace.npz"))
    counts = np.stack([np.bincount(each.ravel(), minlength=16) for each in ids])
    assert np.allclose(chances, counts / 50)
