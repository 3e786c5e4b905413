"""What the experts do is in the metrics, as the official client reads them."""

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from moesaic.engine.cache import Text
from moesaic.engine.engine import Piece
from moesaic.serve.live_routing import LiveRouting
from moesaic.serve.operation.metrics import Metrics, ModelState
from tests.serve import tiny

LABELS = ("model", "layer", "expert")


def test_counts_of_several_models_are_told_apart() -> None:
    engine = tiny.engine()
    busy, idle = LiveRouting(engine), LiveRouting(engine)
    engine.step([Piece(Text(), [5, 6, 7]), Piece(Text(), [8])])
    busy.hear()
    metrics = Metrics()
    for name, live in (("busy", busy), ("idle", idle)):
        metrics.watch(name, lambda: ModelState(0, 0), live)
    text = metrics.exposition(ready=True).decode()
    found = {
        (sample.name, *(sample.labels.get(name) for name in LABELS)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for layer, routed in engine.routed().items():
        ids = routed.expert_ids_TM.numpy()
        for expert, count in enumerate(np.bincount(ids.reshape(-1), minlength=5)):
            assert found["moesaic_expert_rows_total", "busy", str(layer), str(expert)] == count
            assert found["moesaic_expert_rows_total", "idle", str(layer), str(expert)] == 0
        assert found["moesaic_distinct_experts_total", "busy", str(layer), None] == len(np.unique(ids))
        assert 0 < found["moesaic_router_load_entropy", "busy", str(layer), None] <= 1
        assert ("moesaic_router_load_entropy", "idle", str(layer), None) not in found
    assert found["moesaic_routed_tokens_total", "busy", None, None] == 4
    assert found["moesaic_routed_steps_total", "busy", None, None] == 1
    metrics.forget("busy")
    assert 'model="busy"' not in metrics.exposition(ready=True).decode()
