"""Files of uneven values: what they hold, that they read back exactly, and that an engine takes their codes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import Engine
from moesaic.cli.main import main
from moesaic.engine.cache import Text
from moesaic.engine.engine import Piece
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub import load, read_config
from moesaic.hub.sources import SafetensorsFolder
from moesaic.hub.streaming import convert
from moesaic.kernels.uneven import dequantized, round_to_codes
from moesaic.plan.files import formats_of_files
from moesaic.quantize.files import quantize_checkpoint
from moesaic.quantize.report import report
from tests.quantize.test_files import EXPERT, LATENT, TINY, WEIGHT, saved

IDS = [7, 3, 130, 11, 64, 2]


def uneven(plain: Path) -> Path:
    quantize_checkpoint(plain, plain.with_name("uneven"), 4, values="uneven")
    return plain.with_name("uneven")


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return Engine(folder, threads=1, **options).step([Piece(Text(), IDS, "all")])


def test_a_file_holds_codes_and_words(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain")
    tensors = load_file(uneven(plain) / "model.safetensors")
    assert tensors[f"{EXPERT}_codes"].dtype == torch.uint8 and tensors[f"{EXPERT}_codes"].shape == (64, 16)
    assert tensors[f"{WEIGHT}_words"].dtype == torch.int16 and tensors[f"{WEIGHT}_words"].shape == (64, 2)
    original = load_file(plain / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"):
        assert torch.equal(tensors[name], original[name])


def test_any_part_reads_back_as_what_was_rounded_to(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain")
    expected = dequantized(round_to_codes(load_file(plain / "model.safetensors")[WEIGHT]))
    source = SafetensorsFolder(uneven(plain))
    for index in (
        (),
        (slice(3, 9),),
        (slice(0, 64, 5), slice(33, 60)),
        (slice(None), slice(1, 64, 3)),
        (4, slice(7, 8)),
    ):
        assert torch.equal(source.read(WEIGHT, index), expected[index])


@pytest.mark.parametrize("raw", [TINY, LATENT], ids=["shared experts", "latent attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_engine_has_the_bits_of_the_original(tmp_path: Path, raw: dict[str, Any], dtype: torch.dtype) -> None:
    plain = saved(tmp_path / "plain", raw, dtype)
    expected = logits(plain, bits=4, values="uneven")
    assert torch.equal(logits(uneven(plain), bits=4, values="uneven"), expected)


def test_without_bits_an_engine_takes_the_codes(tmp_path: Path) -> None:
    folder = uneven(saved(tmp_path / "plain"))
    program = Engine(folder, threads=1).program
    assert program.formats["experts"] == "uneven4" and program.formats["head"] == "fp32"
    with torch.no_grad():
        expected = load(folder)(torch.tensor([IDS]))[0]
    assert (logits(folder) - expected).norm() < 0.05 * expected.norm()  # rows have 8 bits in the engine


def test_files_are_unpacked_by_convert(tmp_path: Path) -> None:
    folder = uneven(saved(tmp_path / "plain"))
    convert(folder, tmp_path / "wide", dtype="fp32")
    assert torch.equal(
        load_file(tmp_path / "wide" / "model.safetensors")[EXPERT], SafetensorsFolder(folder).read(EXPERT)
    )


def test_the_report_and_the_plan_know_the_bits(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain")
    quantized = quantize_checkpoint(plain, tmp_path / "uneven", 4, values="uneven")
    told = report(quantized, read_config(plain).total)
    even = report(quantize_checkpoint(plain, tmp_path / "even", 4), read_config(plain).total)
    assert told["bits_per_weight"]["experts"] == 4.5
    assert 0.05 < told["error"] < 0.9 * even["error"]
    formats = formats_of_files(tmp_path / "uneven", read_config(tmp_path / "uneven"))
    assert formats.of("experts").bits == 4.5 and formats.of("head").bits == 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 8}, "uneven values in 8 bits"),
        ({"bits": 4, "experts_bits": 8}, "uneven values in 8 bits"),
        ({"bits": 4, "head_bits": 8}, "a head of 8 bits"),
        ({"bits": 4, "group": 64}, "groups of 64"),
        ({"bits": 4, "values": "odd"}, "values='odd'; known: even, uneven"),
    ],
    ids=["eight", "experts", "head", "group", "unknown"],
)
def test_what_does_not_go_with_uneven_values(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    asked: dict[str, Any] = {"values": "uneven"} | options
    with pytest.raises(ConfigError, match=named):
        quantize_checkpoint(saved(tmp_path / "plain"), tmp_path / "out", **asked)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = uneven(saved(tmp_path / "plain"))
    tensors = load_file(folder / "model.safetensors")
    words = tensors.pop(f"{WEIGHT}_words")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="_words is missing"):
        SafetensorsFolder(folder)
    save_file(tensors | {f"{WEIGHT}_words": words[:, :1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="a word for each 32 inputs"):
        SafetensorsFolder(folder)
    save_file(tensors | {f"{WEIGHT}_words": words.int()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="known: I16"):
        SafetensorsFolder(folder)


def test_rounding_even_steps_once_more_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = saved(tmp_path / "plain")
    quantize_checkpoint(plain, tmp_path / "even", 4)
    with caplog.at_level(logging.WARNING):
        Engine(plain, bits=4, values="uneven", threads=1)
        assert not caplog.messages
        Engine(tmp_path / "even", bits=4, values="uneven", threads=1)
    (said,) = caplog.messages
    assert "four bits of even steps" in said


def test_the_verb_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = saved(tmp_path / "plain")
    arguments = ["quantize", str(plain), "--bits", "4", "--values", "uneven", "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["values"], document["head_bits"]) == ("uneven", 16)
    assert document["bits_per_weight"]["rounded"] == 4.5
