"""The LSTM that carried the 2017 layer: against a plain-Python LSTM, its masks, its counts, its training."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from moesaic.config import MlpConfig, MoeConfig, RouterConfig
from moesaic.config.router import HashSettings
from moesaic.errors import ConfigError
from moesaic.models.recurrent import RecurrentConfig, RecurrentModel
from moesaic.routing import RoutingTape
from moesaic.routing.balancers import mean_over_layers

VOCAB, HIDDEN = 11, 6
DENSE = MlpConfig(intermediate_size=5)


def moe(name="noisy_topk", **settings):
    return MoeConfig(router=RouterConfig(name=name, num_experts=4, top_k=2, **settings), intermediate_size=3)


def config(block):
    return RecurrentConfig(vocab_size=VOCAB, hidden_size=HIDDEN, feed_forward=block)


def token_ids(rows=3, length=7, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def router_weights(model):
    return [parameter for name, parameter in model.named_parameters() if ".router." in name]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def product(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def lstm_by_hand(lstm, inputs):
    """Outputs of one row: i, f, g, o stand in this order in torch's matrices."""
    w_in, w_out = lstm.weight_ih_l0.tolist(), lstm.weight_hh_l0.tolist()
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).tolist()
    hidden, cell, outputs = [0.0] * HIDDEN, [0.0] * HIDDEN, []
    for x in inputs:
        z = [a + b + c for a, b, c in zip(product(w_in, x), product(w_out, hidden), bias, strict=True)]
        for d in range(HIDDEN):
            i, f, o = (sigmoid(z[part * HIDDEN + d]) for part in (0, 1, 3))
            cell[d] = f * cell[d] + i * math.tanh(z[2 * HIDDEN + d])
            hidden[d] = o * math.tanh(cell[d])
        outputs.append(list(hidden))
    return outputs


def moe_by_hand(layer, x):
    """Without noise: softmax over the two best logits; SwiGLU experts (arXiv:1701.06538, eqs. 1 and 3 to 5)."""
    logits = product(layer.router.weight.tolist(), x)
    best = sorted(range(4), key=lambda e: (-logits[e], e))[:2]
    total = sum(math.exp(logits[e]) for e in best)
    y = [0.0] * HIDDEN
    for e in best:
        both = product(layer.experts.gate_up[e].tolist(), x)
        inner = [g * sigmoid(g) * u for g, u in zip(both[:3], both[3:], strict=True)]
        for d, value in enumerate(product(layer.experts.down[e].tolist(), inner)):
            y[d] += math.exp(logits[e]) / total * value
    return y


def test_a_tiny_model_by_hand():
    model = RecurrentModel(config(moe()), seed=1).double().eval()
    for weight in router_weights(model):
        torch.nn.init.normal_(weight)
    ids = token_ids(rows=2, length=5)
    logits = model(ids)
    for row in range(2):
        x = [model.embedding.weight[i].tolist() for i in ids[row].tolist()]
        x = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(x, lstm_by_hand(model.lower, x), strict=True)]
        x = [[a + b for a, b in zip(each, moe_by_hand(model.feed_forward, each), strict=True)] for each in x]
        x = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(x, lstm_by_hand(model.upper, x), strict=True)]
        for position, each in enumerate(x):
            assert logits[row, position].tolist() == pytest.approx(product(model.head.weight.tolist(), each), rel=1e-9)


@pytest.mark.parametrize("block", [DENSE, moe(), moe("softmax_topk"), moe("sigmoid_topk", selection_bias=True)])
def test_counted_parameters_are_real_ones(block):
    model = RecurrentModel(config(block))
    assert config(block).total == sum(parameter.numel() for parameter in model.parameters())
    idle = 2 * 3 * 3 * HIDDEN if isinstance(block, MoeConfig) else 0  # two of four experts, three matrices each
    assert config(block).active_all == config(block).total - idle
    for spec in config(block).feed_forward_tensors():
        assert model.state_dict()[spec.name].shape == spec.shape


@pytest.mark.parametrize("block", [DENSE, moe(), moe("softmax_topk")])
def test_no_token_sees_a_later_one(block):
    model = RecurrentModel(config(block)).double().eval()
    ids = token_ids()
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCAB
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_padding_is_not_routed_and_changes_nothing():
    model = RecurrentModel(config(moe("softmax_topk"))).double().eval()
    ids = token_ids(rows=2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:] = False
    tape = RoutingTape()
    logits = model(ids, mask, tape=tape)
    decision = tape.decisions[0]
    assert decision.rows.counts_E.sum() == 2 * (7 + 4)
    assert set(decision.rows.token_ids_R.tolist()) == set(range(7 + 4))
    torch.testing.assert_close(logits[1, :4], model(ids[1:, :4])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[0], model(ids[:1])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(ids, mask.long()), logits)


def test_a_seed_is_a_model_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [RecurrentModel(config(moe("softmax_topk")), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_noisy_router_starts_at_0_and_spreads_the_load():
    model = RecurrentModel(config(moe()), seed=0)
    assert len(router_weights(model)) == 2 and not any(weight.any() for weight in router_weights(model))
    torch.manual_seed(0)
    tape = RoutingTape()
    model(token_ids(rows=40, length=20), tape=tape)
    counts = tape.decisions[0].rows.counts_E
    assert counts.max() < 1.2 * counts.float().mean()


def test_a_hash_router_has_its_table():
    block = moe("hash", settings=HashSettings(vocab_size=VOCAB))
    tape = RoutingTape()
    ids = token_ids()
    RecurrentModel(config(block))(ids, tape=tape)
    chosen_TK = tape.decisions[0].rows.as_topk()[0]
    assert chosen_TK.min() >= 0
    flat = ids.flatten()
    for token in flat.unique():
        assert len(chosen_TK[flat == token].unique(dim=0)) == 1


def train(block, seed, steps=60):
    """A text that repeats itself: the losses of each step."""
    text = token_ids(rows=1, length=13, seed=3)[0].repeat(30)
    windows = torch.stack([text[start : start + 17] for start in range(0, 340, 17)])
    model = RecurrentModel(config(block), seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    torch.manual_seed(seed)
    values = []
    for _ in range(steps):
        tape = RoutingTape()
        loss = cross_entropy(model(windows[:, :-1], tape=tape).flatten(0, 1), windows[:, 1:].flatten())
        values.append(loss.item())
        for name in ("importance", "load") if tape.decisions else ():
            loss = loss + 0.1 * mean_over_layers(name, tape.decisions.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values, model


@pytest.mark.parametrize("block", [DENSE, moe()], ids=["dense", "noisy_topk"])
def test_it_learns_and_a_seed_decides_everything(block):
    values, model = train(block, seed=0)
    assert values[0] == pytest.approx(math.log(VOCAB), rel=0.15)
    assert values[-1] < 0.5 * values[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert train(block, seed=0, steps=5)[0] == values[:5]
    assert train(block, seed=1, steps=5)[0] != values[:5]


def test_wrong_shapes_and_padding_before_tokens_are_refused():
    model, ids = RecurrentModel(config(DENSE)), token_ids(rows=2, length=4)
    with pytest.raises(ConfigError, match=r"token ids of shape \(4,\); give \[batch, sequence\]"):
        model(ids[0])
    with pytest.raises(ConfigError, match=r"a mask of shape \(2, 3\) for token ids of \(2, 4\); they must match"):
        model(ids, torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"padding before a token, .* put all padding at the end of its row"):
        model(ids, torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))


def test_impossible_sizes_are_refused():
    for sizes in ({"vocab_size": 0, "hidden_size": 4}, {"vocab_size": 4, "hidden_size": -1}):
        with pytest.raises(ConfigError, match="in RecurrentConfig; it must be a whole number above 0"):
            RecurrentConfig(feed_forward=DENSE, **sizes)
