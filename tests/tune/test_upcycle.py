"""A dense model made into an MoE computes what it computed."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic import families
from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.hub import load, read_config, save
from moesaic.hub.embedded import embedded_gguf
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder, route
from moesaic.tune.upcycle import function_difference, read_record, smollm2_moe, upcycle

DENSE = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def dense(**fields: Any) -> Decoder:
    model = Decoder(families.from_hf(DENSE | fields), dtype=torch.float32)
    for spec, tensor in zip(model.config.tensors(), model.state_dict().values(), strict=True):
        tensor.normal_(float(spec.role == "norm"), 0.2, generator=torch.Generator().manual_seed(len(spec.name)))
    return model


TOKEN_IDS = torch.randint(131, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("copies", "shards", "top_k"), [(2, 4, 4), (1, 1, 1), (3, 1, 2), (3, 5, 5), (3, 2, 4), (2, 4, 8)]
)
def test_the_function_is_kept(copies: int, shards: int, top_k: int) -> None:
    source = dense()
    moe = upcycle(source, copies=copies, shards=shards, top_k=top_k, seed=3)
    assert function_difference(source, moe, TOKEN_IDS) <= 1e-5


def test_whole_copies_are_chosen_and_both_are_used() -> None:
    rows = route(upcycle(dense(), copies=2, shards=4, top_k=4), TOKEN_IDS)
    assert list(rows) == [0, 1, 2]
    chosen = torch.cat([each.as_topk()[0] for each in rows.values()])
    assert {tuple(sorted(row)) for row in chosen.tolist()} == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_the_active_parameters_stay() -> None:
    source = dense(hidden_size=96)
    moe = upcycle(source, copies=2, shards=4, top_k=4)
    routers = sum(spec.numel for spec in moe.config.tensors() if spec.role == "router")
    assert moe.config.active_all == source.config.active_all + routers
    assert moe.config.total > source.config.total


def test_the_dense_model_is_left_alone() -> None:
    source = dense()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    moe = upcycle(source)
    for tensor in moe.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def test_the_seed_decides_the_router() -> None:
    routers = [upcycle(dense(), seed=seed).state_dict()["layers.0.feed_forward.router.weight"] for seed in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])


def test_it_is_saved_as_mixtral(tmp_path: Path) -> None:
    source = dense()
    save(upcycle(source), tmp_path / "moe")
    assert read_config(tmp_path / "moe").family == "mixtral"
    assert function_difference(source, decoder_only(load(tmp_path / "moe"), "this test"), TOKEN_IDS) <= 1e-5


@pytest.mark.parametrize(
    ("fields", "cut", "message"),
    [
        ({}, {"shards": 7, "top_k": 7}, r"shards=7 does not divide intermediate_size=60; use one of \[1, 2, 3, 4, 5"),
        ({}, {"top_k": 3}, r"top_k=3 does not choose whole copies of 4 shards; use one of \[4, 8\]"),
        ({}, {"top_k": 12}, "top_k=12 does not choose whole copies"),
        ({}, {"top_k": 0}, "top_k=0 does not choose whole copies"),
        ({}, {"copies": 0}, "copies=0, shards=4; both must be at least 1"),
        ({"mlp_bias": True}, {}, "biases in its feed-forward block"),
        ({"attention_bias": True}, {}, "cannot be written as mixtral: .*attention.qkv_bias is True"),
        ({"model_type": "mixtral"}, {}, "has MoE layers already"),
    ],
)
def test_what_cannot_be_cut_is_one_line(fields: dict[str, Any], cut: dict[str, int], message: str) -> None:
    model = Decoder(families.from_hf(DENSE | fields), device="meta")
    with pytest.raises(ConfigError, match=message):
        upcycle(model, **cut)


@pytest.mark.slow
def test_smollm2_becomes_an_moe_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        source = decoder_only(load(embedded_gguf()), "this test")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    model = moesaic.load("smollm2-moe")
    folder = smollm2_moe()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder.parent == tmp_path and read_record(folder)["max_logit_difference"] <= 1e-5
    assert model.config == families.find_preset("smollm2-moe")
    assert abs(model.config.active_all / source.config.active_all - 1) < 0.01
    token_ids = torch.randint(49152, (1, 100), generator=torch.Generator().manual_seed(1))
    again = decoder_only(moesaic.load("smollm2-moe"), "this test")
    assert function_difference(source, again, token_ids) <= 1e-5
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
