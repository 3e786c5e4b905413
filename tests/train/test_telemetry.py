"""Steps are the same to the bit whether anybody listens or not."""

from typing import Any

import pytest
import torch

from moesaic.telemetry.recorder import LoadRecorder
from tests.tiny import tiny_config
from tests.train.step_helpers import batch, changed, cut, differences, lively_stepper, state_of


@pytest.mark.parametrize("router", ["softmax_topk", "noisy_topk", "sinkhorn", "relu"])
def test_training_is_the_same_recorded_or_not(router: str) -> None:
    config = tiny_config(windows=(None, None), router=router)
    runs = [lively_stepper(changed(precision="bf16", ema_decay=0.9), config) for _ in range(2)]
    recorder = LoadRecorder.for_model(config, num_domains=2)
    loads: list[Any] = []
    for run, listener in zip(runs, (None, recorder), strict=True):
        torch.manual_seed(1)
        loads += [run.run(step, cut(batch(step), 2), listener).load for step in range(2)]
    assert not differences(state_of(runs[0]), state_of(runs[1])) and loads[:2] == [None, None]
    (load,) = loads[-1].layers
    assert load.num_tokens == load.logits.num_sampled == 64
    assert load.domain_counts_ME.sum() == load.counts_E.sum()
