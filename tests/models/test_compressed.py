"""A whole model of compressed layers, one of them with an indexer: its cache, padding, descriptions and texts."""

import pytest
import torch
from torch import Tensor

from moesaic.config import EntryIndexerConfig, ModelConfig
from moesaic.engine.generate import generate
from moesaic.errors import GenerationError
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.decoder import Decoder
from tests.tiny import compressed_config, lively

CONFIG = compressed_config(EntryIndexerConfig(num_heads=9, head_dim=6, top_k=3))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def cache(batch: int, length: int) -> KeyValueCache:
    return KeyValueCache(CONFIG, batch_size=batch, max_length=length)


def test_it_reads_back_as_it_was_written() -> None:
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_the_description(dtype: torch.dtype) -> None:
    built = Decoder(CONFIG, device="meta", dtype=dtype).state_dict()
    described = {spec.name: spec for spec in CONFIG.tensors()}
    assert list(built) == list(described)
    for name, tensor in built.items():
        assert tuple(tensor.shape) == described[name].shape
        assert tensor.dtype == (torch.float32 if described[name].dtype == "float32" else dtype)


@torch.no_grad()
def test_a_new_model_starts_with_sinks_and_positions_that_say_nothing() -> None:
    state = Decoder(CONFIG).initialize(0).state_dict()
    silent = [name for name in state if name.endswith(("sinks", "position_bias"))]
    assert len(silent) == 3 + 3
    assert not any(state[name].any() for name in silent)


@torch.no_grad()
def test_texts_of_unlike_lengths_are_what_they_are_alone() -> None:
    model = lively(CONFIG)
    prompts = [tokens(1, length)[0].tolist() for length in (11, 1, 6, 4)]
    alone = [generate(model, prompt, 13) for prompt in prompts]
    assert generate(model, prompts, 13) == alone
    assert len({tuple(text) for text in alone}) == len(prompts)


@torch.no_grad()
def test_a_long_text_with_a_cache_equals_the_whole_forward() -> None:
    model, ids = lively(CONFIG), tokens(2, 40)
    whole, kept = model(ids), cache(2, 40)
    steps = torch.cat([model(part, cache=kept) for part in ids.split([7, *[1] * 20, 13], dim=1)], dim=1)
    assert (steps - whole).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_a_cache_can_only_be_rolled_back_to_nothing() -> None:
    model, ids, kept = lively(CONFIG), tokens(1, 9), cache(1, 9)
    model(tokens(1, 7).flip(1), cache=kept)
    with pytest.raises(GenerationError, match="windowed or compressed layers cannot be rolled back; start a new one"):
        kept.rollback(3)
    kept.rollback(0)
    assert torch.equal(model(ids, cache=kept), model(ids, cache=cache(1, 9)))


@torch.no_grad()
def test_bfloat16_runs_with_a_cache() -> None:
    model, ids = lively(CONFIG), tokens(2, 15)
    expected = model(ids)
    rounded = Decoder(CONFIG, dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    kept = KeyValueCache(CONFIG, batch_size=2, max_length=15, dtype=torch.bfloat16)
    seen = torch.cat([rounded(part, cache=kept) for part in ids.split(4, dim=1)], dim=1)
    assert seen.dtype == torch.bfloat16
    # Rounded scores send tokens to other experts here and there.
    assert torch.nn.functional.cosine_similarity(seen.float(), expected, dim=-1).median() > 0.95


def test_training_moves_all_but_the_indexer() -> None:
    model = lively(CONFIG).train()
    torch.nn.functional.cross_entropy(model(tokens(4, 16)).flatten(0, 1), tokens(4, 16).flip(1).flatten()).backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved != (".indexer." in name), name
