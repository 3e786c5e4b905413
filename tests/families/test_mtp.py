"""Layers that predict further tokens: by the equations, against transformers' MtpModel, and in the released files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from moesaic import families
from moesaic.config import MoeConfig
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub import load, read_config, save
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape

CASES = ["deepseek_v3/two further tokens", "deepseek_v3/a further token, tied", "glm4_moe/a further token"]


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, made: Callable[[str], Any]) -> Path:
    return made(request.param).folder


def token_ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(5))


def close(seen: Tensor, expected: Tensor) -> bool:
    assert expected.abs().max() > 0.5
    return bool((seen - expected).abs().max() <= 1e-5 * expected.abs().max())


@torch.no_grad()
def ahead(model: Decoder, ids_BS: Tensor) -> list[Tensor]:
    """h^0, h^1, ... of the places that have all their next tokens."""
    num_places = ids_BS.shape[1] - len(model.mtp)
    hidden = [model.hidden(ids_BS)[:, :num_places]]
    for depth in range(1, len(model.mtp) + 1):
        hidden.append(model.hidden_ahead(hidden[-1], ids_BS[:, depth : depth + num_places], depth=depth))
    return hidden


@torch.no_grad()
def test_the_equations(folder: Path) -> None:
    """arXiv:2412.19437, eq. 21-23, in the released order of M: the embedding first."""
    model, ids_BS = decoder_only(load(folder), "mtp"), token_ids()
    state, hidden = model.state_dict(), ahead(model, ids_BS)

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    places = hidden[0].shape[1]
    for depth in range(1, len(hidden)):
        prefix = f"mtp.{depth - 1}"
        embedded = state["embedding.weight"][ids_BS[:, depth : depth + places]]
        both = torch.cat(
            [rms(embedded, f"{prefix}.embedding_norm"), rms(hidden[depth - 1], f"{prefix}.hidden_norm")], -1
        )
        # The block in the middle is an ordinary one, so a model that has it as its first layer runs it.
        block = dataclasses.replace(model.config.decoder, layers=(model.config.mtp[depth - 1],))
        lone = Decoder(dataclasses.replace(model.config, decoder=block, mtp=()), device="meta")
        inner = {
            name.removeprefix(f"{prefix}.layer."): value for name, value in state.items() if f"{prefix}.layer." in name
        }
        outer = {name: state[name] for name in ("embedding.weight", "head.weight") if name in state}
        outer["final_norm.weight"] = state[f"{prefix}.final_norm.weight"]
        lone.load_state_dict(outer | {f"layers.0.{name}": value for name, value in inner.items()}, assign=True)
        projected = both @ state[f"{prefix}.projection.weight"].T
        lone.embedding.register_forward_hook(lambda *_, projected=projected: projected)
        assert close(hidden[depth], lone.eval().hidden(torch.zeros(both.shape[:2], dtype=torch.long)))


@torch.no_grad()
def test_transformers_reads_them_and_gets_the_same(folder: Path) -> None:
    model, ids_BS = decoder_only(load(folder), "mtp"), token_ids()
    hidden = ahead(model, ids_BS)
    main: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\."]  # they know the released numbers of layers
    theirs: Any = MtpModel.from_pretrained(main).eval()
    places = hidden[0].shape[1]
    last = main.model(input_ids=ids_BS).last_hidden_state[:, :places]
    assert close(hidden[0], last)
    for depth in range(1, len(hidden)):
        position_ids = torch.arange(depth, depth + places)[None]
        cache = MtpCache(config=main.config.get_mtp_config())
        next_ids = ids_BS[:, depth : depth + places]
        last = theirs.forward_layer(depth - 1, last, position_ids, cache, input_ids=next_ids)
        assert close(hidden[depth], last)
        assert close(model.logits(hidden[depth]), theirs.shared_head(last))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 5]])
def test_their_cache_changes_nothing(folder: Path, chunks: list[int]) -> None:
    model, ids_BS = decoder_only(load(folder), "mtp"), token_ids(length=10 + len(read_config(folder).mtp))
    hidden = ahead(model, ids_BS)
    for depth in range(1, len(hidden)):
        layers = model.config.mtp[depth - 1 : depth]
        cache = KeyValueCache(model.config, batch_size=2, max_length=10, layers=layers)
        parts = zip(hidden[depth - 1].split(chunks, 1), ids_BS[:, depth : depth + 10].split(chunks, 1), strict=True)
        seen = [model.hidden_ahead(before, ids, depth=depth, cache=cache) for before, ids in parts]
        assert close(torch.cat(seen, 1), hidden[depth])


@torch.no_grad()
def test_padding_changes_nothing_for_them(folder: Path) -> None:
    model, ids_BS = decoder_only(load(folder), "mtp"), token_ids()
    hidden = ahead(model, ids_BS)
    padded = torch.cat([torch.full((2, 3), 7), ids_BS], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones_like(ids_BS)], dim=1).bool()
    places = hidden[0].shape[1]
    before = model.hidden(padded, mask)[:, : places + 3]
    seen = model.hidden_ahead(before, padded[:, 1 : places + 4], mask[:, : places + 3])
    assert close(seen[:, 3:], hidden[1])


@torch.no_grad()
def test_a_tape_hears_them_after_the_last_layer(folder: Path) -> None:
    model, tape = decoder_only(load(folder), "mtp"), RoutingTape()
    hidden = model.hidden(token_ids(), tape=tape)
    model.hidden_ahead(hidden[:, :-1], token_ids()[:, 1:], tape=tape)
    assert list(tape.decisions) == [*model.config.moe_layers, 3]


def test_files_hold_them_as_released(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    config = read_config(folder)
    for layer in range(3, 3 + len(config.mtp)):
        prefix = f"model.layers.{layer}"
        assert stored[f"{prefix}.eh_proj.weight"].shape == (48, 96)
        for name in ("enorm", "hnorm", "shared_head.norm", "input_layernorm", "post_attention_layernorm"):
            assert stored[f"{prefix}.{name}.weight"].shape == (48,)
        assert torch.equal(stored[f"{prefix}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        assert torch.equal(stored[f"{prefix}.shared_head.head.weight"], stored[head])
        assert f"{prefix}.mlp.experts.5.gate_proj.weight" in stored
        assert f"{prefix}.mlp.gate.e_score_correction_bias" in stored


def copied(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_copies_may_be_absent_but_not_different(folder: Path, tmp_path: Path) -> None:
    names = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    without = copied(folder, tmp_path / "without", lambda tensors: [tensors.pop(name) for name in names])
    save(load(without), tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    for name in names:
        other = copied(folder, tmp_path / name.split(".")[-2], lambda tensors, name=name: tensors[name].mul_(2))
        with pytest.raises(CheckpointError, match=f"{name} in .* differs from .*, of which it should be a copy"):
            load(other)


def test_they_are_counted_beside(folder: Path) -> None:
    config = read_config(folder)
    without = dataclasses.replace(config, mtp=())
    assert (config.total, config.active_all, config.roles) == (without.total, without.active_all, without.roles)
    assert without.mtp_total == 0
    block = sum(spec.numel for spec in config.mtp[0].tensors("", 48) if spec.is_parameter)
    assert config.mtp_total == len(config.mtp) * (block + 3 * 48 + 48 * 96)
    routed = sum(spec.numel for spec in config.mtp[0].tensors("", 48) if spec.role == "experts")
    moe = config.mtp[0].feed_forward
    assert isinstance(moe, MoeConfig)
    top_k, num_experts = moe.router.top_k, moe.router.num_experts
    assert config.mtp_active == config.mtp_total - len(config.mtp) * routed * (num_experts - top_k) // num_experts


def test_what_does_not_fit_is_one_line(folder: Path) -> None:
    model = decoder_only(load(folder), "mtp")
    hidden = model.hidden(token_ids())
    with pytest.raises(ConfigError, match=r"depth=3; this model has \d layers that predict further tokens"):
        model.hidden_ahead(hidden, token_ids(), depth=3)
    with pytest.raises(ConfigError, match=r"next token ids of shape \(2, 11\) for hidden states of \(2, 12, 48\)"):
        model.hidden_ahead(hidden, token_ids()[:, 1:])


def test_their_number_counts_where_it_is_stated(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["num_nextn_predict_layers"]
    assert families.from_hf(raw).mtp == ()


@torch.no_grad()
def test_transformers_drops_them_and_keeps_the_rest(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert len(read_config(tmp_path).mtp) == len(read_config(folder).mtp)
    before, after = load(folder), load(tmp_path)
    assert after.config == dataclasses.replace(before.config, mtp=())
    state = before.state_dict()
    assert state.keys() - after.state_dict().keys() == {name for name in state if name.startswith("mtp.")}
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, state[name])
