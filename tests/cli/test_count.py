"""`moesaic count`."""

import json

import pytest

from moesaic import families, hub
from moesaic.cli.count import describe


def test_json_holds_the_counts(moesaic, moe_folder):
    config = hub.read_config(moe_folder)
    ran = moesaic("count", moe_folder, "--json", "--context", "7", "--dtype", "fp32")
    assert ran.exit_code == 0
    assert ran.err == ""
    assert {key: ran.json[key] for key in ("total", "active_gemm", "active_all", "roles")} == {
        "total": config.total,
        "active_gemm": config.active_gemm,
        "active_all": config.active_all,
        "roles": config.roles,
    }
    assert sum(ran.json["roles"].values()) == config.total
    assert sum(ran.json["active_roles"].values()) == config.active_all
    assert ran.json["weight_bytes"] == 4 * config.total
    assert ran.json["state_bytes_per_token"] == 2 * 2 * (2 * 6) * 4  # layers, keys and values, heads x size, bytes
    assert ran.json["state_bytes"] == 7 * ran.json["state_bytes_per_token"]
    assert ran.json["flops_per_token"] == config.flops_per_token(7)
    assert ran.json["experts"] == ["2 of 5"]


def test_counts_are_those_of_the_files(moesaic, moe_folder):
    from safetensors import safe_open

    with safe_open(next(moe_folder.glob("*.safetensors")), "pt") as file:
        numel = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no iteration)
    assert moesaic("count", moe_folder, "--json").json["total"] == numel


def test_table_names_the_rules(moesaic, moe_folder):
    ran = moesaic("count", moe_folder / "config.json")
    assert ran.exit_code == 0
    for seen in ("active_gemm", "multiplied for one token", "experts", "2 of 5 experts a token", "sparsity", "FLOPs"):
        assert seen in ran.out


def test_dense_models_have_no_sparsity(dense_folder):
    document = describe("dense", hub.read_config(dense_folder))
    assert (document["sparsity"], document["experts"], document["moe_layers"]) == (0, [], 0)


def test_all_lists_every_preset(moesaic):
    models = moesaic("count", "--all", "--json").json["models"]
    assert {model["model"]: model["total"] for model in models} == {
        name: families.find_preset(name).total for name in families.presets()
    }
    ran = moesaic("count", "--all")
    assert all(model["model"] in ran.out for model in models)
    assert ran.err.startswith("next: moesaic count ")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8", "int8", "int4"])
def test_every_preset_and_dtype(dtype):
    for name in families.presets():
        document = describe(name, families.find_preset(name), dtype=dtype)
        assert json.loads(json.dumps(document)) == document
        assert 0 < document["active_gemm"] <= document["active_all"] <= document["total"]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["mixtral-8x7"], "mixtral-8x7b"),
        (["/nowhere/at-all"], "/nowhere/at-all"),
        ([], "--all"),
        (["mixtral-8x7b", "--all"], "--all"),
        (["mixtral-8x7b", "--context", "0"], "--context 0"),
        (["mixtral-8x7b", "--dtype", "fp7"], "fp32"),
    ],
)
def test_mistakes(moesaic, arguments, seen):
    ran = moesaic("count", *arguments)
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("moesaic: error: ")
    assert seen in ran.err
