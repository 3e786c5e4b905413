"""What every family must do, against what transformers' own model of it answers: the same logits, both ways, byte for
byte.

Answers are the recorded ones (see golden.py), and in the slow tests live. Our own family has no model there: it goes
through what needs none, and through test_moesaic.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moesaic import families
from moesaic.hub import read_config, save
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import check_weight_map
from tests.families.decoder_oracle import loaded, num_learned, padding_mask, their_logits, token_ids
from tests.families.golden import golden
from tests.families.same import assert_same, assert_same_bytes


def test_every_family_has_a_case(families_in_cases: set[str]) -> None:
    assert families_in_cases == set(families.names())


@torch.no_grad()
def test_their_checkpoint_gives_their_logits(oracle: Any) -> None:
    assert_same(oracle.ours(token_ids())[..., oracle.columns], oracle.answer("logits"))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens(oracle: Any, side: str) -> None:
    mask_BS = padding_mask(side)
    seen = oracle.ours(token_ids(), mask_BS)
    assert seen.isfinite().all()
    assert_same(seen[mask_BS.bool()][..., oracle.columns], oracle.answer(f"logits, padded {side}"))


@torch.no_grad()
def test_they_load_what_we_save(live: Any, tmp_path: Path) -> None:
    save(live.ours, tmp_path / "ours")
    theirs = loaded(AutoModelForCausalLM, tmp_path / "ours", experts_implementation="eager")
    assert_same(their_logits(theirs, token_ids()), live.answer("logits"))
    assert theirs.config.eos_token_id == live.model.config.eos_token_id


@torch.no_grad()
def test_they_load_a_model_born_here(live: Any, tmp_path: Path) -> None:
    model = Decoder(read_config(live.folder), dtype=torch.float32).initialize()  # for its tables
    model = model.eval()  # routers may draw while training
    generator = torch.Generator().manual_seed(11)
    for spec, tensor in zip(model.config.tensors(), model.state_dict().values(), strict=True):
        if tensor.is_floating_point():
            tensor.normal_(float(spec.role == "norm"), 0.2, generator=generator)
    save(model, tmp_path / "ours", max_shard_bytes=20_000)
    theirs = loaded(AutoModelForCausalLM, tmp_path / "ours", experts_implementation="eager")
    assert_same(model(token_ids()), their_logits(theirs, token_ids()))


def test_they_write_the_checkpoint_that_we_read(live: Any, tmp_path: Path) -> None:
    live.model.save_pretrained(tmp_path)
    theirs, drawn = (load_file(folder / "model.safetensors") for folder in (tmp_path, live.folder))
    assert theirs.keys() == drawn.keys()
    assert all(torch.equal(theirs[name].view(torch.uint8), drawn[name].view(torch.uint8)) for name in drawn)


def test_a_round_trip_keeps_every_byte(any_case: Any, folder: Path, tmp_path: Path) -> None:
    save(any_case.ours, tmp_path / "ours")
    assert_same_bytes(tmp_path / "ours", folder)
    assert read_config(tmp_path / "ours") == read_config(folder)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 1, 6], [9, 4]])
def test_the_cache_changes_nothing(oracle: Any, chunks: list[int]) -> None:
    model, ids_BS = oracle.ours, token_ids()
    cache = KeyValueCache(model.config, batch_size=3, max_length=13)
    seen = torch.cat([model(part, cache=cache) for part in ids_BS.split(chunks, dim=1)], dim=1)
    assert_same(seen[..., oracle.columns], oracle.answer("logits"))


@torch.no_grad()
def test_the_cache_changes_nothing_for_us(any_case: Any) -> None:
    model, ids_BS = any_case.ours, token_ids()
    cache = KeyValueCache(model.config, batch_size=3, max_length=13)
    seen = torch.cat([model(part, cache=cache) for part in ids_BS.split([5, 1, 1, 6], dim=1)], dim=1)
    assert_same(seen, model(ids_BS))


def test_counts_are_the_built_models(folder: Path) -> None:
    config = read_config(folder)
    model = Decoder(config, device="meta")
    described = {spec.name: spec.shape for spec in config.tensors()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == described
    assert config.total + config.mtp_total == sum(parameter.numel() for parameter in model.parameters())


def test_counts_are_theirs(oracle: Any) -> None:
    assert read_config(oracle.folder).total == golden(oracle.case).num_learned


def test_counts_are_theirs_now(live: Any) -> None:
    assert read_config(live.folder).total == num_learned(live.model)


def test_the_family_describes_itself_both_ways(folder: Path) -> None:
    config = read_config(folder)
    own = families.family(config.family)
    assert families.from_hf(families.to_hf(config)) == config
    check_weight_map(config.tensors(), own.weight_map(config))
