import pytest
import torch

from moesaic.errors import ConfigError, GenerationError
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.decoder import Decoder, route
from moesaic.routing import RoutingTape
from tests.tiny import compressed_config, lively, tiny_config

CONFIGS = {
    "plain": tiny_config(),
    "windows": tiny_config(windows=(3, None, 5)),
    "sigmoid, bias, shared": tiny_config(router="sigmoid_topk", selection_bias=True, shared=True),
    "tied": tiny_config(tied=True),
    "compressed": compressed_config(),
}


@pytest.fixture(params=CONFIGS.values(), ids=list(CONFIGS))
def model(request) -> Decoder:
    return lively(request.param)


def tokens(batch, length, seed=1):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def scale_of(logits):
    return logits.abs().max().item()


def test_tensors_are_those_of_the_description(model):
    described = [(spec.name, spec.shape) for spec in model.config.tensors()]
    assert [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()] == described
    assert model.config.total == sum(parameter.numel() for parameter in model.parameters())


def test_meta_models_have_shapes_and_no_memory():
    model = Decoder(CONFIGS["plain"], device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def test_token_by_token_with_a_cache_equals_the_whole_forward(model):
    ids = tokens(3, 17)
    whole = model(ids)
    cache = KeyValueCache(model.config, batch_size=3, max_length=17)
    steps = [model(ids[:, :4], cache=cache), model(ids[:, 4:9], cache=cache)]
    steps += [model(ids[:, i : i + 1], cache=cache) for i in range(9, 17)]
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-5 * scale_of(whole)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model):
    ids, whole = tokens(1, 9), None
    whole = model(ids)[0]
    for left, right in ((3, 0), (0, 4), (2, 2)):
        padded = torch.cat([tokens(1, left, 7), ids, tokens(1, right, 8)], dim=1)
        mask = torch.tensor([[0] * left + [1] * 9 + [0] * right])
        got = model(padded, mask)[0, left : left + 9]
        assert (got - whole).abs().max() <= 1e-5 * scale_of(whole)


@torch.no_grad()
def test_a_batch_gives_each_sequence_what_it_gets_alone(model):
    ids = tokens(4, 11)
    together = model(ids)
    for row in range(4):
        assert (model(ids[row : row + 1])[0] - together[row]).abs().max() <= 1e-5 * scale_of(together)


@torch.no_grad()
def test_the_future_is_invisible(model):
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 61
    before, after = model(ids)[0, :8], model(changed)[0, :8]
    assert (before - after).abs().max() <= 1e-6 * scale_of(before)


@torch.no_grad()
def test_a_window_forgets():
    """Two layers of window 3 carry a token at most 2 + 2 places on."""
    model = lively(tiny_config(windows=(3, 3)))
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 61
    difference = (model(ids) - model(changed))[0].abs().amax(-1)
    assert (difference[:5] > 1e-6).any()
    assert (difference[5:] <= 1e-6).all()


@torch.no_grad()
def test_a_tape_hears_every_moe_layer_and_can_dictate(model):
    ids = tokens(2, 7)
    heard = RoutingTape()
    logits = model(ids, tape=heard)
    assert tuple(heard.decisions) == model.config.moe_layers
    replayed = model(ids, tape=RoutingTape({layer: d.rows for layer, d in heard.decisions.items()}))
    assert torch.equal(replayed, logits)
    other = model(tokens(2, 7, seed=5), tape=(other_tape := RoutingTape()))
    assert not torch.equal(other, logits)
    dictated = model(ids, tape=RoutingTape({layer: d.rows for layer, d in other_tape.decisions.items()}))
    assert not torch.allclose(dictated, logits)


@torch.no_grad()
def test_route_gives_rows_of_every_layer_and_leaves_padding_out(model):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    rows = route(model, tokens(2, 5), mask)
    assert tuple(rows) == model.config.moe_layers
    for layer_rows in rows.values():
        expert_ids, weights = layer_rows.as_topk()
        assert expert_ids.shape == (10, 2)
        assert (expert_ids[:2] == -1).all() and (expert_ids[2:] >= 0).all()
        assert layer_rows.counts_E.sum() == 8 * 2
        assert torch.allclose(weights[2:].sum(-1), torch.ones(8))


DOCUMENTS = [(5, 1, 9), (7, 8), (15,)]
"""Lengths of the documents of three rows of 15 tokens."""


def document_ids():
    rows = [[index for index, length in enumerate(lengths) for _ in range(length)] for lengths in DOCUMENTS]
    return torch.tensor(rows)


def spans():
    for row, lengths in enumerate(DOCUMENTS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        yield from ((row, end - length, end) for length, end in zip(lengths, ends, strict=True))


@pytest.mark.parametrize("model", [*CONFIGS.values(), tiny_config(windows=(3, 4))], indirect=True)
@pytest.mark.parametrize("way", ["mask", "segments"])
def test_documents_of_a_row_get_what_they_get_alone(model, way, monkeypatch):
    """Logits, routing and gradients."""
    monkeypatch.setattr("moesaic.layers.attention.MASKED_LENGTH", 0 if way == "segments" else 15)
    ids, weigh = tokens(3, 15), torch.randn(3, 15, 61, generator=torch.Generator().manual_seed(4))
    tape = RoutingTape()
    packed = model(ids, tape=tape, document_ids_BS=document_ids())
    (packed * weigh).sum().backward()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    experts = {layer: d.rows.as_topk()[0].view(3, 15, -1) for layer, d in tape.decisions.items()}
    for number, (row, start, end) in enumerate(spans()):
        tape_alone = RoutingTape()
        alone = model(ids[row : row + 1, start:end], tape=tape_alone)
        assert (packed[row, start:end] - alone[0]).abs().max() <= 1e-5 * scale_of(packed)
        (alone[0] * weigh[row, start:end]).sum().backward()
        for layer, decision in tape_alone.decisions.items():
            assert torch.equal(experts[layer][row, start:end], decision.rows.as_topk()[0])
            numbers = tape.decisions[layer].document_ids_T
            assert numbers is not None and (numbers.view(3, 15)[row, start:end] == number).all()
    for name, parameter in model.named_parameters():
        difference = (packed_gradients[name] - parameter.grad).abs().max()
        assert difference <= 2e-5 * parameter.grad.abs().max(), name


@torch.no_grad()
def test_documents_and_padding_together(model):
    """Padding on either side is seen by nobody, whatever its document ids."""
    ids = tokens(3, 15)
    whole = model(ids, document_ids_BS=document_ids())
    for left, right in ((3, 0), (0, 4), (2, 2)):
        padded = torch.cat([tokens(3, left, 7), ids, tokens(3, right, 8)], dim=1)
        mask = torch.tensor([[0] * left + [1] * 15 + [0] * right] * 3)
        documents = torch.nn.functional.pad(document_ids(), (left, right))
        documents[:, left + 15 :] = documents[:, left + 14 : left + 15]
        got = model(padded, mask, document_ids_BS=documents)[:, left : left + 15]
        assert (got - whole).abs().max() <= 1e-5 * scale_of(whole)


@torch.no_grad()
def test_rows_of_one_document_take_the_plain_way(model):
    ids, tape, plain = tokens(3, 15), RoutingTape(), RoutingTape()
    one_each = model(ids, tape=tape, document_ids_BS=torch.tensor([[3] * 15, [0] * 15, [1] * 15]))
    assert torch.equal(one_each, model(ids, tape=plain))
    for layer, decision in plain.decisions.items():
        other = tape.decisions[layer].document_ids_T
        assert other is not None and decision.document_ids_T is not None
        assert torch.equal(decision.document_ids_T, other)
        assert decision.document_ids_T.tolist() == [0] * 15 + [1] * 15 + [2] * 15


def test_every_parameter_gets_a_gradient(model):
    model.train()
    torch.nn.functional.cross_entropy(model(tokens(4, 16)).flatten(0, 1), tokens(4, 16, 3).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_same_seed_draws_the_same_weights():
    first, second, other = (Decoder(CONFIGS["plain"]).initialize(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_wrong_shapes_are_named(model):
    with pytest.raises(ConfigError, match=r"shape \(7,\); give \[batch, sequence\]"):
        model(tokens(1, 7)[0])
    with pytest.raises(ConfigError, match="mask of shape"):
        model(tokens(1, 7), torch.ones(1, 6))
    with pytest.raises(ConfigError, match="document ids of shape"):
        model(tokens(1, 7), document_ids_BS=torch.zeros(1, 6))
    cache = KeyValueCache(model.config, batch_size=1, max_length=7)
    with pytest.raises(ConfigError, match="together with a cache; give each document its own row"):
        model(tokens(1, 7), cache=cache, document_ids_BS=torch.zeros(1, 7))


@torch.no_grad()
def test_a_full_cache_says_so_and_a_window_cannot_be_rolled_back():
    config = CONFIGS["windows"]
    cache = KeyValueCache(config, batch_size=1, max_length=4)
    lively(config)(tokens(1, 4), cache=cache)
    with pytest.raises(GenerationError, match="do not fit a cache of 4"):
        lively(config)(tokens(1, 1), cache=cache)
    with pytest.raises(GenerationError, match="cannot be rolled back"):
        cache.rollback(2)


@torch.no_grad()
def test_rollback_forgets():
    model = lively(tiny_config(windows=(None, None)))
    ids = tokens(1, 9)
    cache = KeyValueCache(model.config, batch_size=1, max_length=9)
    model(tokens(1, 6, seed=9), cache=cache)
    cache.rollback(0)
    model(ids[:, :5], cache=cache)
    cache.rollback(3)
    assert (model(ids[:, 3:], cache=cache) - model(ids)[:, 3:]).abs().max() <= 1e-5
