"""Weights in: kept to the byte, and refused with one line when anything is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.hub import load, save
from moesaic.models.decoder import Decoder

SHARD = "model-00002-of-00005.safetensors"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Merge the shards into one file, changed."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def make_pickle(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def forget_indexed(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    edit(folder / "model.safetensors.index.json", weight_map=index | {"model.more": SHARD})


def name_outside(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "../" + SHARD})


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no path on this machine and no preset"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in .*give a folder"),
    "config cut short": (lambda f: truncate(f / "config.json", 40), "config.json is not valid JSON"),
    "config no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list, not a JSON object"),
    "unknown family": (lambda f: edit(f / "config.json", model_type="gpt5"), "unknown model_type 'gpt5'.*mixtral"),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("model*")],
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "pickles": (make_pickle, r"pytorch_model.bin\), which can run code.*convert them to safetensors"),
    "absent shard": (lambda f: (f / SHARD).unlink(), f"index.json names {SHARD}, absent from the folder"),
    "index leaves folder": (name_outside, "absent from the folder"),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map of tensor names to files",
    ),
    "index names more": (forget_indexed, "names tensors that its files lack: model.more"),
    "shard cut short": (lambda f: truncate(f / SHARD, 5000), f"{SHARD} is cut short or damaged: its tensors end"),
    "header cut short": (lambda f: truncate(f / SHARD, 100), f"{SHARD} is cut short or damaged: its header"),
    "empty shard": (lambda f: truncate(f / SHARD, 0), f"{SHARD} is cut short or damaged"),
    "no safetensors": (lambda f: (f / SHARD).write_bytes(b"\x10" + b"\0" * 99), f"{SHARD} is cut short or damaged"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update({ROUTER: torch.zeros(24, 3)})),
        rf"{ROUTER} in .*model.safetensors is \[24, 3\] and its configuration describes \[3, 24\]",
    ),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda tensors: tensors.pop(ROUTER)),
        f"lacks 1 of 35 tensors that its configuration describes: {ROUTER}",
    ),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update({"model.surprise": torch.zeros(3)})),
        "holds 1 tensors that its configuration does not describe: model.surprise",
    ),
    "quantized tensor": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update({ROUTER: torch.zeros(3, 24).to(torch.float8_e4m3fn)})),
        f"{ROUTER} in .* is of type F8_E4M3, and config.json does not say how it is packed; put",
    ),
    "config with more experts": (
        lambda f: edit(f / "config.json", num_local_experts=4),
        r"gate.weight in .* is \[3, 24\] and its configuration describes \[4, 24\]",
    ),
    "config with more layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "lacks 16 of 51 tensors"),
    "config with fewer layers": (lambda f: edit(f / "config.json", num_hidden_layers=1), "holds 16 tensors that its"),
    "config with tied head": (lambda f: edit(f / "config.json", vocab_size=7), "embed_tokens.*describes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_one_line(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_harmless_extras_are_ignored(model: Decoder, folder: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    edit_tensors(folder, lambda tensors: tensors.update(more))
    assert torch.equal(load(folder).state_dict()["final_norm.weight"], model.final_norm.weight)
    edit(folder / "config.json", tie_word_embeddings=True)
    assert load(folder).head is None


def test_every_tensor_comes_back(model: Decoder, folder: Path) -> None:
    loaded = load(folder)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_or_converted(model: Decoder, tmp_path: Path, dtype: torch.dtype) -> None:
    save(model.to(dtype), tmp_path / "m")
    assert {tensor.dtype for tensor in load(tmp_path / "m").state_dict().values()} == {dtype}
    assert {tensor.dtype for tensor in load(tmp_path / "m", dtype=torch.float32).state_dict().values()} == {
        torch.float32
    }


def test_mixed_dtypes_survive_a_round_trip(model: Decoder, tmp_path: Path) -> None:
    model.bfloat16()
    model.final_norm.float()
    save(model, tmp_path / "m")
    save(load(tmp_path / "m"), tmp_path / "n")
    assert (tmp_path / "m/model.safetensors").read_bytes() == (tmp_path / "n/model.safetensors").read_bytes()
    assert load(tmp_path / "n").final_norm.weight.dtype == torch.float32


def test_end_tokens_of_the_generation_config_count(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[2, 9])
    assert load(folder).config.eos_token_ids == (2, 9)
    edit(folder / "generation_config.json", eos_token_id="end")
    with pytest.raises(ConfigError, match="eos_token_id='end'"):
        load(folder)


def test_a_loaded_model_can_be_trained(folder: Path) -> None:
    model = load(folder)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_preset_without_weights_says_what_to_do() -> None:
    with pytest.raises(MoesaicError, match="preset 'mixtral-8x7b' is a configuration without weights; download them"):
        load("mixtral-8x7b")


def test_a_config_file_has_no_weights(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json holds no weights; give the folder"):
        load(folder / "config.json")
