"""The loss of layers that predict further tokens, against a slow reading of DeepSeek-V3's eq. 24-25."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.loss import losses
from moesaic.train.step import Stepper
from tests.tiny import lively, tiny_config
from tests.train.step_helpers import batch, changed, cut, differences, state_of

PLAIN = tiny_config(windows=(None, None), router="sigmoid_topk", selection_bias=True)
AHEAD = dataclasses.replace(PLAIN, mtp=(PLAIN.layers[0], PLAIN.layers[0]))


def slow(model: Decoder, inputs_BS: Tensor, documents_BS: Tensor, depth: int) -> list[Tensor]:
    """-log p of each further token of this depth, document by document, without packing or masks."""
    found = []
    for inputs_S, documents_S in zip(inputs_BS, documents_BS, strict=True):
        for document in documents_S.unique():
            ids_S = inputs_S[documents_S == document][None]
            places = torch.nonzero(documents_S == document).flatten()
            hidden = model.hidden(ids_S)
            for k in range(1, depth + 1):
                if ids_S.shape[1] <= k:
                    break
                hidden = model.hidden_ahead(hidden[:, : ids_S.shape[1] - k], ids_S[:, k:], depth=k)
            else:
                log_p = model.logits(hidden)[0].log_softmax(-1)
                for place, each in zip(places.tolist(), log_p, strict=False):
                    target = place + depth + 1
                    if target < len(inputs_S):
                        found.append(-each[inputs_S[target]])
    return found


@pytest.mark.parametrize("documents", [(16,), (5, 1, 2, 8), (1, 15)])
def test_the_equations(documents: tuple[int, ...]) -> None:
    model = lively(AHEAD)
    inputs_BS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(1))
    targets_BS = torch.cat([inputs_BS[:, 1:], torch.full((2, 1), -100)], dim=1)
    documents_BS = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(2, -1)
    parts = losses(model, inputs_BS, targets_BS, (), RoutingTape(), document_ids_BS=documents_BS, mtp_coefficient=0.25)
    expected = [sum(slow(model, inputs_BS, documents_BS, depth)) / 30 for depth in (1, 2)]
    torch.testing.assert_close(torch.stack(parts.mtp), torch.stack([torch.as_tensor(each) for each in expected]))
    torch.testing.assert_close(parts.prediction, parts.cross_entropy + 0.25 * sum(parts.mtp) / 2)


def test_padding_counts_nowhere() -> None:
    model = lively(AHEAD)
    ids_BS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    alone = losses(model, ids_BS[:, :-1], ids_BS[:, 1:], (), RoutingTape(), mtp_coefficient=1.0)
    padded_BS = torch.cat([ids_BS[:, :-1], torch.zeros(2, 3, dtype=torch.long)], dim=1)
    targets_BS = torch.cat([ids_BS[:, 1:], torch.full((2, 3), -100)], dim=1)
    mask_BS = (torch.arange(11) < 8).expand(2, -1)
    parts = losses(model, padded_BS, targets_BS, (), RoutingTape(), mask_BS=mask_BS, mtp_coefficient=1.0)
    torch.testing.assert_close(torch.stack(parts.mtp), torch.stack(alone.mtp))


def test_too_short_for_further_tokens() -> None:
    model = lively(AHEAD)
    parts = losses(model, torch.tensor([[3, 4]]), torch.tensor([[4, 5]]), (), RoutingTape(), mtp_coefficient=1.0)
    assert len(parts.mtp) == 1
    parts.total.backward()


def stepper(config: ModelConfig = AHEAD, **settings: object) -> Stepper:
    return Stepper(lively(config), changed(**settings))


def test_a_step_moves_the_further_layers_and_their_biases() -> None:
    trained = stepper(mtp_coefficient=0.5, selection_bias_rate=0.01)
    before = state_of(trained)
    recorder = LoadRecorder.for_model(AHEAD, num_domains=2)
    result = trained.run(0, [batch(1)], recorder)
    assert len(result.mtp) == 2 and all(3 < each < 12 for each in result.mtp)
    moved = set(differences(before, state_of(trained)))
    still = {name for name in trained.model.state_dict() if name.startswith("mtp.")} - moved
    assert not still
    assert result.load is not None
    tokens = {layer.layer: layer.num_tokens for layer in result.load.layers}
    assert tokens == {0: 64, 2: 60, 3: 56}
    for layer in result.load.layers:
        assert layer.domain_counts_ME is not None and int(layer.domain_counts_ME.sum()) == 2 * layer.num_tokens


def test_at_zero_they_stay_and_nothing_else_changes() -> None:
    without, at_zero = stepper(PLAIN), stepper(mtp_coefficient=0.0)
    at_zero.model.load_state_dict(without.model.state_dict(), strict=False)
    before = state_of(at_zero)
    assert at_zero.run(0, [batch(1)]).mtp == ()
    without.run(0, [batch(1)])
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(tensor, at_zero.model.state_dict()[name]), name
    assert not [name for name in differences(before, state_of(at_zero)) if name.startswith("mtp.")]


@pytest.mark.parametrize("loss", ["global_running", "global_exact"])
def test_micro_batches_are_one_batch(loss: str) -> None:
    settings = {"mtp_coefficient": 0.5, "balance_losses": ((loss, 0.1),), "clip_norm": 1e9}
    whole, parts = stepper(**settings), stepper(**settings)
    one, two = whole.run(0, [batch(3)]), parts.run(0, cut(batch(3), 2))
    np.testing.assert_allclose(one.mtp, two.mtp, rtol=1e-5)
    if loss == "global_exact":
        np.testing.assert_allclose(one.gradient_norm, two.gradient_norm, rtol=1e-4)


def test_recomputed_layers_give_the_same_bits() -> None:
    plain, again = stepper(mtp_coefficient=0.5), stepper(mtp_coefficient=0.5, recompute="layers")
    plain.run(0, [batch(4)])
    again.run(0, [batch(4)])
    assert not differences(state_of(plain), state_of(again))
