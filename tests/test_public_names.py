"""The public names and their signatures, frozen: what is written here is a promise to users."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moesaic

SIGNATURES = {
    "Engine": (
        "(path_or_model, *, bits=None, experts_bits=None, values='even', dtype=None, threads=None, max_length=None, "
        "cache_format=None, packed_file=None, mtp=False)"
    ),
    "lint": "(build, *, ranks=2)",
    "load": "(path_or_preset, *, dtype=None, device='cpu', allow_extra=False)",
    "place_experts": "(load_LE, *, num_slots, num_ranks, num_nodes=1, num_groups=1, method='refined')",
    "save": "(model, folder, *, tokenizer=None, max_shard_bytes=5000000000)",
    "route": "(model, token_ids_BS, mask_BS=None)",
}


def bare(signature: inspect.Signature) -> str:
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_the_names() -> None:
    names = [
        "Engine",
        "ModelConfig",
        "MoesaicError",
        "__version__",
        "generate",
        "lint",
        "load",
        "make_plan",
        "place_experts",
        "route",
        "save",
    ]
    assert moesaic.__all__ == names
    assert dir(moesaic) == sorted(moesaic.__all__)
    assert all(getattr(moesaic, name) is not None for name in moesaic.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures(name: str) -> None:
    assert bare(inspect.signature(getattr(moesaic, name))) == SIGNATURES[name]


def test_generate_starts_with_model_prompt_and_length() -> None:
    names = list(inspect.signature(moesaic.generate).parameters)
    assert names[:3] == ["model", "prompt_ids", "max_new_tokens"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = moesaic.nothing


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert moesaic.__version__ == project["version"]


def test_looking_at_names_and_reading_a_preset_load_no_torch() -> None:
    code = (
        "import sys, moesaic; moesaic.ModelConfig, moesaic.MoesaicError, moesaic.__version__; "
        "from moesaic.hub import read_config; read_config('mixtral-8x7b'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
