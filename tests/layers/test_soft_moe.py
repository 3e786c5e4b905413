import math
from dataclasses import replace

import pytest
import torch

from moesaic.config import ModelConfig, SoftMoeConfig, StackConfig
from moesaic.errors import ConfigError
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.layers.soft_moe import SoftMoeLayer
from moesaic.models.decoder import Decoder
from moesaic.routing import TokenFacts
from tests.tiny import lively, tiny_config

HIDDEN, EXPERTS, SLOTS, INNER = 5, 3, 2, 4
CONFIG = SoftMoeConfig(num_experts=EXPERTS, slots_per_expert=SLOTS, intermediate_size=INNER)


def make_layer(seed=0):
    layer = SoftMoeLayer(CONFIG, HIDDEN).double()
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return layer


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector) + 1e-6)
    return [x / length for x in vector]


def dot(one, other):
    return sum(x * y for x, y in zip(one, other, strict=True))


def softmax(values):
    powers = [math.exp(x - max(values)) for x in values]
    return [power / sum(powers) for power in powers]


def expert(layer, index, x):
    rows = [dot(row, x) for row in layer.experts.gate_up[index].tolist()]
    inner = [g / (1 + math.exp(-g)) * u for g, u in zip(rows[:INNER], rows[INNER:], strict=True)]
    return [dot(row, inner) for row in layer.experts.down[index].tolist()]


def plain(layer, tokens):
    """arXiv:2308.00951, eqs. 1-3, for one text: a list of vectors."""
    slots = [slot for of_expert in layer.slots.tolist() for slot in of_expert]
    scores = [[layer.scale.item() * dot(unit(x), unit(slot)) for slot in slots] for x in tokens]
    outputs = []
    for index in range(len(slots)):
        shares = softmax([row[index] for row in scores])
        mean = [dot(shares, column) for column in zip(*tokens, strict=True)]
        outputs.append(expert(layer, index // SLOTS, mean))
    return [[dot(softmax(row), column) for column in zip(*outputs, strict=True)] for row in scores]


def test_every_token_is_a_mixture_of_all_slots():
    layer = make_layer()
    x_BSD = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    y_BSD = layer(x_BSD)
    for x_SD, y_SD in zip(x_BSD.tolist(), y_BSD, strict=True):
        assert torch.allclose(y_SD, torch.tensor(plain(layer, x_SD), dtype=torch.float64), rtol=1e-11)


def test_padding_and_other_documents_have_no_part():
    layer = make_layer()
    x_BSD = torch.randn(3, 6, HIDDEN, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0] * 6]).bool()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3], [4] * 6])
    y_TD = layer(x_BSD, TokenFacts(mask_T=mask.flatten(), document_ids_T=documents.flatten())).flatten(0, 1)
    for text in range(5):
        ids = [t for t in range(18) if documents.flatten()[t] == text and mask.flatten()[t]]
        wanted = plain(layer, x_BSD.flatten(0, 1)[ids].tolist()) if ids else []
        assert torch.allclose(y_TD[ids], torch.tensor(wanted, dtype=torch.float64).reshape(-1, HIDDEN), rtol=1e-11)
    assert not y_TD[~mask.flatten()].any()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_tokens_give_none(shape):
    assert make_layer()(torch.zeros(*shape, HIDDEN, dtype=torch.float64)).shape == (*shape, HIDDEN)


def test_gradients_of_input_and_every_weight():
    layer = make_layer()
    names, weights = zip(*layer.named_parameters(), strict=True)
    facts = TokenFacts(mask_T=torch.tensor([True, True, False, True, True, True, True, True]))
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *given: torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x, facts)),
        (x, *weights),
        fast_mode=True,
    )


# --- in a model -------------------------------------------------------------------------------------------------------


def soft_config() -> ModelConfig:
    config = tiny_config(windows=(None, None))
    soft = SoftMoeConfig(num_experts=4, slots_per_expert=3, intermediate_size=7)
    return replace(config, decoder=StackConfig(layers=(replace(config.layers[0], feed_forward=soft), config.layers[1])))


def test_a_model_with_a_soft_layer_has_its_tensors_and_description():
    config = soft_config()
    assert ModelConfig.from_dict(config.to_dict()) == config
    model = Decoder(config).initialize(1)
    state = model.state_dict()
    assert [(spec.name, spec.shape) for spec in config.tensors()] == [(n, tuple(v.shape)) for n, v in state.items()]
    assert state["layers.0.feed_forward.scale"].tolist() == [1.0]
    assert sum(p.numel() for p in model.parameters()) == config.total


def test_counts_and_flops_of_a_soft_layer_by_hand():
    """Slots and experts are all active; 12 slots are computed for a text of any length."""
    config, hidden = soft_config(), 20
    slots, experts = 4 * 3 * hidden + 1, 4 * 3 * 7 * hidden
    assert config.active_all == config.total
    outside = 2 * (config.active_gemm - slots - experts)
    for length in (1, 12, 48):
        attention = sum(layer.attention.score_flops(length) for layer in config.layers)
        mixing = 3 * 2 * 12 * hidden
        assert config.flops_per_token(length) == outside + attention + mixing + 12 * 2 * 3 * 7 * hidden // length


def test_a_token_sees_what_follows_it_so_the_model_refuses_to_decode():
    model = lively(soft_config())
    ids = torch.randint(0, 61, (1, 8), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 61
    assert not torch.allclose(model(ids)[0, 0], model(changed)[0, 0], atol=1e-6)
    assert model.config.leaks_future
    with pytest.raises(ConfigError, match="layer 0 has Soft MoE, where tokens see later ones"):
        model(ids, cache=KeyValueCache(model.config, batch_size=1, max_length=9))
