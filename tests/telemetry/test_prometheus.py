import math

import numpy as np
import pytest

from moesaic.errors import RunFolderError
from moesaic.telemetry.load import LayerLoad, LogitFacts, StepLoad
from moesaic.telemetry.prometheus import PrometheusFile, exposition

FACTS = LogitFacts(num_sampled=8, rms=1.5, peak=3.0, margin=0.25, flips_bf16=0.0, flips_noise=0.125)


def load(*counts: int, step: int = 1) -> StepLoad:
    counts_E = np.array(counts)
    layer = LayerLoad(
        layer=2, top_k=1, counts_E=counts_E, num_tokens=int(counts_E.sum()), router_entropy=math.nan, logits=FACTS
    )
    return StepLoad(step=step, layers=(layer,))


def samples(text: str) -> dict[tuple, float]:
    parser = pytest.importorskip("prometheus_client.parser")
    families = parser.text_string_to_metric_families(text)
    return {(each.name, *sorted(each.labels.items())): each.value for family in families for each in family.samples}


def test_the_official_parser_reads_it():
    found = samples(exposition(load(30, 10), labels={"run": 'a"b\\c\nd'}))
    run = ("run", 'a"b\\c\nd')
    assert found["moesaic_expert_rows_total", ("expert", "0"), ("layer", "2"), run] == 30
    assert found["moesaic_router_max_violation", ("layer", "2"), run] == 0.5
    assert found["moesaic_router_logit_flips_noise", ("layer", "2"), run] == 0.125
    assert not any("router_entropy" in name for name, *_ in found)  # unknown
    assert exposition(StepLoad(step=1, layers=())) == ""


def test_the_file_is_written_with_every_window_that_comes_late_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(PrometheusFile, "EVERY_S", 0.0)
    file = PrometheusFile(tmp_path / "metrics.prom")
    for rows in (10, 20, 30):
        file.add(load(10, 10))
        assert f'expert="0"}} {rows}\n' in (tmp_path / "metrics.prom").read_text()


def test_the_file_counts_on_and_shows_the_last_window(tmp_path):
    with PrometheusFile(tmp_path / "metrics.prom") as file:
        file.add(load(30, 10))
        assert 'expert="0"} 30\n' in (tmp_path / "metrics.prom").read_text()
        file.add(load(15, 20, step=2))
        file.add(load(5, 0, step=3))
        file.add(load(20, 20, step=4))
    text = (tmp_path / "metrics.prom").read_text()
    assert 'moesaic_expert_rows_total{layer="2",expert="0"} 70\n' in text
    assert 'moesaic_router_max_violation{layer="2"} 0\n' in text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]
    with pytest.raises(RunFolderError, match="cannot write"):
        PrometheusFile(tmp_path / "missing" / "metrics.prom").add(load(1, 1))
