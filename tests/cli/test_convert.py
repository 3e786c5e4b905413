"""`moesaic convert`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import hub
from moesaic.cli.convert import parse_size, parse_upcycling
from moesaic.cli.text import open_tokenizer
from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.hub.embedded import embedded_gguf

TOKEN_IDS = torch.tensor([[5, 17, 200, 3]])


def test_a_folder_becomes_the_same_model(moesaic, moe_folder, tmp_path):
    ran = moesaic("convert", moe_folder, tmp_path / "out", "--max-shard-size", "1MB")
    assert (ran.exit_code, ran.out) == (0, "")
    assert ran.err.splitlines()[-1].startswith(f"next: moesaic generate {tmp_path / 'out'}")
    assert torch.equal(hub.load(tmp_path / "out")(TOKEN_IDS), hub.load(moe_folder)(TOKEN_IDS))
    assert open_tokenizer(str(tmp_path / "out")).encode("naïve") == open_tokenizer(str(moe_folder)).encode("naïve")
    assert open_tokenizer(str(tmp_path / "out")).chat_template == open_tokenizer(str(moe_folder)).chat_template
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"


def test_dtype(moesaic, moe_folder, tmp_path):
    assert moesaic("convert", moe_folder, tmp_path / "out", "--dtype", "bf16").exit_code == 0
    assert {tensor.dtype for tensor in hub.load(tmp_path / "out").state_dict().values()} == {torch.bfloat16}


def test_json_says_what_was_written(moesaic, moe_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for path in moe_folder.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "LICENSE").write_text("as you like")
    ran = moesaic("convert", tmp_path / "in", tmp_path / "out", "--layout", "fused", "--check", "--json")
    assert ran.exit_code == 0 and ran.json["folder"] == str(tmp_path / "out")
    assert ran.json["weight_files"] == ["model.safetensors"] and ran.json["left_out"] == []
    assert {"LICENSE", "tokenizer.json"} <= set(ran.json["kept_files"])
    assert ran.json["num_bytes"] == sum(t.nbytes for t in hub.load(tmp_path / "out").state_dict().values())
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert torch.equal(hub.load(tmp_path / "out")(TOKEN_IDS), hub.load(moe_folder)(TOKEN_IDS))


def test_fp8_there_and_back(moesaic, moe_folder, tmp_path):
    assert moesaic("convert", moe_folder, tmp_path / "fp8", "--dtype", "fp8").exit_code == 0
    assert moesaic("count", tmp_path / "fp8", "--json").json["total"] == hub.read_config(moe_folder).total
    assert moesaic("convert", tmp_path / "fp8", tmp_path / "back", "--dtype", "fp32").exit_code == 0
    seen = hub.load(tmp_path / "back")(TOKEN_IDS)
    assert torch.equal(seen, hub.load(tmp_path / "fp8", dtype=torch.float32)(TOKEN_IDS))
    assert not torch.equal(seen, hub.load(moe_folder)(TOKEN_IDS))


def test_extra_tensors_are_named(moesaic, moe_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for path in moe_folder.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(moe_folder / "model.safetensors") | {"model.more": torch.zeros(2)}
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    ran = moesaic("convert", tmp_path / "in", tmp_path / "out")
    assert (ran.exit_code, ran.err.count("\n")) == (2, 1) and "model.more" in ran.err and "--allow-extra" in ran.err
    ran = moesaic("convert", tmp_path / "in", tmp_path / "out", "--allow-extra")
    assert ran.exit_code == 0 and "left out 1 tensors: model.more" in ran.err


def test_licences_go_with_what_is_made_of_a_model(moesaic, dense_folder, tmp_path):
    shutil.copytree(dense_folder, tmp_path / "in")
    others = ("LICENSE", "NOTICE", "USE_POLICY.md", "README.md", "chat_template.jinja")
    for name in others:
        (tmp_path / "in" / name).write_text(f"{name} of the model")
    for number, options in enumerate((["--dtype", "bf16"], ["--upcycle", "2x4"])):
        out = tmp_path / f"{number}"
        assert moesaic("convert", tmp_path / "in", out, *options).exit_code == 0
        assert all((out / name).read_text() == f"{name} of the model" for name in others)
        assert hub.read_config(out).eos_token_ids == hub.read_config(dense_folder).eos_token_ids
    assert hub.read_config(tmp_path / "1").family == "mixtral"


def test_upcycling_keeps_the_function(moesaic, dense_folder, tmp_path):
    ran = moesaic("convert", dense_folder, tmp_path / "out", "--upcycle", "2x4")
    assert ran.exit_code == 0, ran.err
    counts = moesaic("count", tmp_path / "out", "--json").json
    assert counts["experts"] == ["4 of 8"]
    dense, moe = hub.load(dense_folder)(TOKEN_IDS), hub.load(tmp_path / "out")(TOKEN_IDS)
    assert (dense - moe).abs().max() <= 1e-5 * dense.abs().max()


def test_an_occupied_folder_is_left_alone(moesaic, moe_folder, dense_folder, tmp_path):
    out = tmp_path / "out"
    assert moesaic("convert", moe_folder, out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    ran = moesaic("convert", dense_folder, out)
    assert (ran.exit_code, ran.err) == (
        2,
        f"moesaic: error: {out} is not empty; choose another OUT_FOLDER or add --overwrite\n",
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert moesaic("convert", dense_folder, out, "--overwrite").exit_code == 0
    assert hub.read_config(out) == hub.read_config(dense_folder)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--max-shard-size", "12"], "1MB or more"),
        (["--max-shard-size", "2XB"], "500MB"),
        (["--upcycle", "8"], "2x4"),
        (["--dtype", "int3"], "bf16"),
        (["--dtype", "mxfp4"], "mxfp4 packs experts"),
        (["--upcycle", "2x4", "--layout", "fused"], "--layout does not go with --upcycle"),
        (["--upcycle", "2x4", "--dtype", "fp8"], "--dtype fp8 does not go with --upcycle"),
    ],
)
def test_mistakes(moesaic, moe_folder, tmp_path, options, seen):
    ran = moesaic("convert", moe_folder, tmp_path / "out", *options)
    assert (ran.exit_code, ran.err.count("\n")) == (2, 1)
    assert seen in ran.err
    assert not (tmp_path / "out").exists()


def test_targets_that_cannot_be(moesaic, moe_folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is the checkpoint" in moesaic("convert", moe_folder, moe_folder, "--overwrite").err
    assert "is a file" in moesaic("convert", moe_folder, tmp_path / "file").err
    assert moesaic("convert", "/nowhere/at-all", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1MB", 10**6), ("2gb", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("5000000", 5 * 10**6)]
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["2x", "x4", "0x4", "2x-1", "2*4", "2x4x1"])
def test_upcycling_that_means_nothing(text):
    with pytest.raises(ConfigError, match="2x4"):
        parse_upcycling(text)


@pytest.mark.slow
def test_gguf_becomes_a_folder_that_chats_alike(moesaic, tmp_path):
    try:
        gguf = embedded_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert moesaic("convert", gguf, tmp_path / "out").exit_code == 0
    assert hub.read_config(tmp_path / "out") == hub.read_config(gguf)
    arguments = ("--prompt", "What is 2+2?", "--max-new-tokens", "8", "--json")
    ours, theirs = (moesaic("chat", model, *arguments).json for model in (tmp_path / "out", gguf))
    assert ours["token_ids"] == theirs["token_ids"]
