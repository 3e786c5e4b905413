"""What every family must do, against transformers' own model of it: the same logits, both ways, byte for byte.

Our own family has no model there: it goes through what needs none, and through test_moesaic.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic import families
from moesaic.hub import load, read_config, save
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import check_weight_map
from tests.families.counting import num_learned

TOLERANCE = 1e-5  # of the logits' scale


def token_ids(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    if mask_BS is None:
        return model(input_ids=ids_BS).logits
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS).logits


def assert_same(seen: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1, "degenerate logits prove nothing"
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_every_family_has_a_case(families_in_cases: set[str]) -> None:
    assert families_in_cases == set(families.names())


@torch.no_grad()
def test_their_checkpoint_gives_their_logits(oracle: Any) -> None:
    ids_BS = token_ids()
    assert_same(load(oracle.folder)(ids_BS), their_logits(oracle.model, ids_BS))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens(oracle: Any, side: str) -> None:
    ids_BS = token_ids()
    mask_BS = torch.ones_like(ids_BS)
    for row, padding in enumerate((0, 2, 6)):
        if padding:
            mask_BS[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    real = mask_BS.bool()
    seen = load(oracle.folder)(ids_BS, mask_BS)
    assert seen.isfinite().all()
    if oracle.goes_alone:
        rows = zip(ids_BS, real, strict=True)
        expected = torch.cat([their_logits(oracle.model, row[kept][None])[0] for row, kept in rows])
    else:
        expected = their_logits(oracle.model, ids_BS, mask_BS)[real]
    assert_same(seen[real], expected)


@torch.no_grad()
def test_they_load_what_we_save(oracle: Any, tmp_path: Path) -> None:
    save(load(oracle.folder), tmp_path / "ours")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        dtype="auto",
    )
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids_BS = token_ids()
    assert torch.equal(their_logits(theirs.eval(), ids_BS), their_logits(oracle.model, ids_BS))
    assert theirs.config.eos_token_id == oracle.model.config.eos_token_id


@torch.no_grad()
def test_they_load_a_model_born_here(oracle: Any, tmp_path: Path) -> None:
    model = Decoder(read_config(oracle.folder), dtype=torch.float32).initialize()  # for its tables
    model = model.eval()  # routers may draw while training
    generator = torch.Generator().manual_seed(11)
    for spec, tensor in zip(model.config.tensors(), model.state_dict().values(), strict=True):
        if tensor.is_floating_point():
            tensor.normal_(float(spec.role == "norm"), 0.2, generator=generator)
    save(model, tmp_path / "ours", max_shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    assert_same(model(token_ids()), their_logits(theirs, token_ids()))


def test_a_round_trip_keeps_every_byte(folder: Path, tmp_path: Path) -> None:
    save(load(folder), tmp_path / "ours")
    saved, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    family = read_config(folder).family
    theirs = {families.released_name(family, name): tensor for name, tensor in saved.items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert read_config(tmp_path / "ours") == read_config(folder)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 1, 6], [9, 4]])
def test_the_cache_changes_nothing(oracle: Any, chunks: list[int]) -> None:
    model, ids_BS = load(oracle.folder), token_ids()
    cache = KeyValueCache(model.config, batch_size=3, max_length=13)
    seen = torch.cat([model(part, cache=cache) for part in ids_BS.split(chunks, dim=1)], dim=1)
    assert_same(seen, their_logits(oracle.model, ids_BS))


@torch.no_grad()
def test_the_cache_changes_nothing_for_us(folder: Path) -> None:
    model, ids_BS = load(folder), token_ids()
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
    assert read_config(oracle.folder).total == num_learned(oracle.model)


def test_the_family_describes_itself_both_ways(folder: Path) -> None:
    config = read_config(folder)
    own = families.family(config.family)
    assert families.from_hf(families.to_hf(config)) == config
    check_weight_map(config.tensors(), own.weight_map(config))
