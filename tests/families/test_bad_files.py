"""What is wrong with a model's files is one line that names it: every family, each mistake once."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from moesaic import families
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.hub import load, read_config
from moesaic.hub.quantization import FORMATS
from moesaic.hub.streaming import convert
from moesaic.models.weight_map import file_shapes
from tests.families.cases import CASES, COMMON

FIRST = {name.partition("/")[0]: name for name in reversed(CASES)}
Tensors = dict[str, Tensor]


@pytest.fixture(params=FIRST)
def good(request: pytest.FixtureRequest, made: Callable[[str], Any], tmp_path: Path) -> Iterator[Path]:
    """A copy of a family's tiny model, to be spoiled."""
    shutil.copytree(made(FIRST[request.param]).folder, tmp_path / "m")
    yield tmp_path / "m"


def spoil(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def state(folder: Path, **fields: Any) -> Path:
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(described | fields), encoding="utf-8")
    return folder


def refused(kind: type[MoesaicError], action: Callable[..., object], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_of(folder: Path) -> list[str]:
    """Of the tensors in the files those of experts first."""
    config = read_config(folder)
    weight_map = families.family(config.family).weight_map(config)
    roles = {piece.name: spec.role for spec in config.tensors() for piece in weight_map[spec.name]}
    found = [
        name for name in file_shapes(config.tensors(), weight_map) if name in load_file(folder / "model.safetensors")
    ]
    return sorted(found, key=lambda name: roles[name] != "experts")


def test_what_is_missing_is_named(good: Path) -> None:
    """One by one, experts are named by their numbers; stacked ones, and all else, as the files name them."""
    name = names_of(good)[0]
    spoil(good, lambda tensors: tensors.pop(name))
    said = refused(CheckpointError, load, good)
    assert "lacks 1 of " in said and "correct the configuration or copy the weights again" in said
    assert name in said or (".experts.0." in name and "expert 0 of layer " in said)


def test_what_is_too_many_is_named_and_left_out_when_told(good: Path, tmp_path: Path) -> None:
    before = load(good).state_dict()
    spoil(good, lambda tensors: tensors.update({"surprise.weight": torch.zeros(3)}))
    for said in (refused(CheckpointError, load, good), refused(CheckpointError, convert, good, tmp_path / "out")):
        assert "surprise.weight" in said and "--allow-extra" in said and "allow_extra=True" in said
    for name, tensor in load(good, allow_extra=True).state_dict().items():
        assert torch.equal(tensor, before[name])
    assert convert(good, tmp_path / "out", allow_extra=True).left_out == ["surprise.weight"]


def test_what_is_no_number_is_named(good: Path, tmp_path: Path) -> None:
    name = names_of(good)[0]
    spoil(good, lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan")))
    said = refused(CheckpointError, convert, good, tmp_path / "out", check=True)
    assert said == f"{name} has NaN or infinite values; mend it or copy the weights again"


def test_what_has_another_shape_is_named(good: Path) -> None:
    name = names_of(good)[0]
    spoil(good, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    said = refused(CheckpointError, load, good)
    assert f"{name} in {good / 'model.safetensors'} is [" in said and "and its configuration describes [" in said


def test_quantization_that_is_not_known_or_not_that_of_the_files(good: Path, tmp_path: Path) -> None:
    said = refused(ConfigError, load, state(good, quantization_config={"quant_method": "awq", "bits": 4}))
    assert said.endswith(
        "quantization_config of method 'awq' is not supported; known: fp8, mxfp4, compressed-tensors, moesaic-uneven4"
    )
    said = refused(ConfigError, load, state(good, quantization_config="fp8"))
    assert "quantization_config='fp8'; it must be a table with its quant_method: fp8, mxfp4, compressed" in said
    state(good, quantization_config=None)
    packed = [format_ for format_ in FORMATS if format_ in ("fp8", "mxfp4") and can_pack(good, tmp_path, format_)]
    for format_ in packed:
        folder = tmp_path / format_
        tensors = load_file(folder / "model.safetensors")
        scale = next(name for name in tensors if name.endswith(("_scale_inv", ".scale", "_scales")))
        save_file(tensors | {scale: torch.zeros(3, 5)}, folder / "model.safetensors", metadata={"format": "pt"})
        assert f"{scale} in " in refused(CheckpointError, load, folder)
        tensors.pop(scale)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        said = refused(CheckpointError, load, folder)
        assert re.search(r"\S+(_scale_inv|\.scale|_scales) is missing; copy the weights again", said)
        said = refused(CheckpointError, load, state(folder, quantization_config=None))
        assert "does not say how it is packed; put the quantization_config there that came with these files" in said


def can_pack(folder: Path, out: Path, format_: Any) -> bool:
    """Whether files of this family can be packed so, at these sizes; if not, that is said."""
    try:
        convert(folder, out / format_, dtype=format_)
    except (ConfigError, CheckpointError) as error:
        assert re.search("use .*bf16|use another --dtype", str(error))
        return False
    return True


def test_activations_and_positions_that_are_not_known(good: Path) -> None:
    raw = json.loads((good / "config.json").read_text(encoding="utf-8"))
    field = "ffn_config" if "ffn_config" in raw else "hidden_act"
    value = raw[field] | {"ffn_act_fn": {"name": "relu6"}} if isinstance(raw[field], dict) else "relu6"
    said = refused(ConfigError, read_config, state(good, **{field: value}))
    assert str(good / "config.json") in said and "relu6" in said and "is not supported; known: silu" in said
    state(good, **{field: raw[field]})
    theta = (raw.get("attn_config") or {}).get("rope_theta", 1e4)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": theta}
    said = refused(ConfigError, read_config, state(good, rope_parameters=dynamic))
    assert "rope_parameters" in said and "'dynamic'" in said and "is not supported; known: " in said


# Fields of transformers' classes that change nothing about what a model computes while it answers.
_OF_NO_EFFECT = {
    "architectures", "attention_dropout", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states", "output_router_logits",
    "pretraining_tp", "problem_type", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "torch_dtype",
    "transformers_version", "use_cache", "_name_or_path", "_output_attentions", "resid_pdrop", "emb_pdrop",
}  # fmt: skip
# Of these families: what follows from other fields, or is read only where another one says so.
_FOLLOWS = {
    "deepseek_v2": {"head_dim", "qk_head_dim"},
    "deepseek_v3": {"head_dim", "qk_head_dim"},
    "deepseek_v32": {"head_dim", "qk_head_dim", "layer_types", "mlp_bias"},
    "glm_moe_dsa": {"head_dim", "qk_head_dim", "layer_types", "mlp_bias", "topk_group"},
    "glm4_moe": {"topk_group"},
    "llama4_text": {"intermediate_size_mlp"},
    "qwen2": {"sliding_window", "layer_types"},
    "qwen2_moe": {"sliding_window", "layer_types"},
    "qwen3": {"sliding_window", "layer_types"},
    "qwen3_moe": {"sliding_window"},
}


class Fields(dict[str, Any]):
    """A configuration that knows which of its fields were asked for."""

    def __init__(self, fields: dict[str, Any], asked: set[str] | None = None) -> None:
        super().__init__(fields)
        self.asked = set() if asked is None else asked

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def __or__(self, other: dict[str, Any]) -> "Fields":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Fields({**self, **other}, self.asked)

    def __ror__(self, other: dict[str, Any]) -> "Fields":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Fields({**other, **self}, self.asked)


@pytest.mark.parametrize("family", sorted(_FOLLOWS.keys() | {"llama", "mistral", "mixtral", "olmoe", "gpt_oss",
    "granitemoe", "granitemoeshared", "phimoe", "dbrx", "minimax_m2", "ernie4_5_moe"}))  # fmt: skip
def test_no_field_is_overlooked(family: str) -> None:
    """A field of transformers' configuration that we did not look at could change the model without our knowing."""
    described = AutoConfig.for_model(family, **COMMON | CASES[FIRST[family]]).to_dict()
    fields = Fields(described | {"model_type": family})
    families.from_hf(fields)
    assert described.keys() - fields.asked - _OF_NO_EFFECT <= _FOLLOWS.get(family, set())
