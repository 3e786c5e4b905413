"""`moesaic quantize`."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import families, hub
from moesaic.data.tokenizer import Tokenizer
from moesaic.models.decoder import Decoder
from tests.cli.conftest import TEXT

RAW: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.tensor([[5, 17, 200, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    place = tmp_path_factory.mktemp("models") / "tiny"
    model = Decoder(families.from_hf(RAW | {"vocab_size": tokenizer.vocab_size})).initialize(1)
    hub.save(model, place, tokenizer=tokenizer)
    (place / "LICENSE").write_text("as you like", encoding="utf-8")
    return place


def test_the_report(moesaic, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = moesaic("quantize", folder, "--bits", "8", "--experts-bits", "4")
    assert ran.exit_code == 0, ran.err
    out = tmp_path / "tiny-8bit"
    # 4 bits, 32 for a scale each 32 weights (of an fp32 model), 128 for the shape of each matrix of 2048.
    assert "bits a weight, experts 5.06" in ran.out and "worst tensor" in ran.out
    assert "expert" in ran.err and ran.err.splitlines()[-1].startswith("next: moesaic generate tiny-8bit")
    assert (out / "LICENSE").exists() and (out / "tokenizer.json").exists()
    assert moesaic("count", out, "--json").json["total"] == hub.read_config(folder).total
    assert moesaic("generate", out, "--prompt", "the", "--max-new-tokens", "2").exit_code == 0


def test_the_next_command_opens_uneven_values_as_such(moesaic, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = moesaic("quantize", folder, "--bits", "4", "--values", "uneven")
    assert ran.exit_code == 0, ran.err
    following = ran.err.splitlines()[-1].removeprefix("next: moesaic ")
    assert "--bits 4 --values uneven" in following
    assert moesaic(*shlex.split(following), "--max-new-tokens", "2").exit_code == 0


def test_judged_by_text(moesaic, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    for number in range(30):
        path = tmp_path / "corpus" / "foxes" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} {TEXT}", encoding="utf-8")
    arguments = ("--bits", "8", "--out", tmp_path / "out", "--data", tmp_path / "corpus", "--max-tokens", "256")
    ran = moesaic("quantize", folder, *arguments, "--json")
    assert ran.exit_code == 0, ran.err
    before, after = (ran.json["held_out"][when] for when in ("before", "after"))
    assert before["by_domain"].keys() == {"foxes"}
    assert 0 < abs(before["bits_per_byte"] - after["bits_per_byte"]) < 0.05 * before["bits_per_byte"]
    assert ran.json["bits_per_weight"]["experts"] < 9.2 and ran.json["bytes_after"] < ran.json["bytes_before"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "4", "--group", "64"), "groups of 64 do not divide the 32 inputs of .*; use --group 32"),
        (("--bits", "3"), "invalid choice"),
        ((), "--bits"),
        (("--bits", "4", "--max-tokens", "0"), "--max-tokens 0; give 1 or more"),
        (("--bits", "4", "--data", "nowhere", "--sequence-length", "99"), "this model takes 1 to 64 tokens"),
    ],
)
def test_bad_input_is_one_line(moesaic, folder, tmp_path, arguments, message):
    ran = moesaic("quantize", folder, "--out", tmp_path / "out", *arguments)
    line = ran.err.splitlines()[-1]
    assert ran.exit_code == 2 and line.startswith("moesaic: error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists() and ran.out == ""


def test_a_folder_in_use_and_a_packed_model(moesaic, folder, tmp_path):
    assert moesaic("quantize", folder, "--bits", "8", "--out", tmp_path / "out").exit_code == 0
    again = moesaic("quantize", folder, "--bits", "8", "--out", tmp_path / "out")
    assert again.exit_code == 2 and "choose another --out FOLDER or add --overwrite" in again.err
    twice = moesaic("quantize", tmp_path / "out", "--bits", "4", "--out", tmp_path / "twice")
    assert twice.exit_code == 2 and "packed already (compressed-tensors)" in twice.err
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
