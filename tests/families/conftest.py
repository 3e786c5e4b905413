"""One tiny model for every corner of every family, with weights that are far from degenerate.

Made by transformers, but for our own family and what transformers' models lack (OUR_CASES).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.nllb_moe import modeling_nllb_moe as their_nllb

from moesaic import families
from moesaic.hub import save
from moesaic.models.decoder import Decoder
from tests.families.cases import ALONE, CASES, COMMON, OUR_CASES
from tests.families.encoder_decoder_cases import CASES as ENCODER_DECODERS
from tests.families.encoder_decoder_oracle import experts_as_chosen


class Oracle(NamedTuple):
    """A transformers model and the folder that transformers saved it to.

    goes_alone: each row has to go through it without padding (see ALONE).
    """

    model: Any
    folder: Path
    goes_alone: bool = False


def tiny_model(family: str, fields: dict[str, Any]) -> Any:
    """A transformers model with weights of std 0.2 and norms around 1."""
    config = AutoConfig.for_model(family, **COMMON | fields)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
        for name, parameter in model.named_parameters():
            if "norm" in name.split(".")[-2]:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).argsort(1)[:, : buffer.shape[1]])
    return model


def our_folder(family: str, fields: dict[str, Any], folder: Path) -> None:
    """A tiny model that only we have, saved by us."""
    model = Decoder(families.from_hf({"model_type": family, **COMMON, **fields}), dtype=torch.float32).initialize(7)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2, generator=generator)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator) / 10)
    save(model, folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Cases by name, each made once; our own have no model of theirs."""
    transformers.utils.logging.disable_progress_bar()

    @cache
    def make(case: str) -> Oracle:
        family = case.partition("/")[0]
        folder = tmp_path_factory.mktemp(family)
        if case in OUR_CASES:
            our_folder(family, OUR_CASES[case], folder)
            return Oracle(None, folder)
        model = tiny_model(family, CASES[case])
        model.save_pretrained(folder)
        return Oracle(model, folder, goes_alone=case in ALONE)

    return make


@pytest.fixture(params=CASES)
def oracle(request: pytest.FixtureRequest, made: Callable[[str], Oracle]) -> Oracle:
    return made(request.param)


@pytest.fixture(params=[*CASES, *OUR_CASES])
def folder(request: pytest.FixtureRequest, made: Callable[[str], Oracle]) -> Path:
    """A saved model of any family, ours too."""
    return made(request.param).folder


@pytest.fixture
def nllb_as_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' NLLB experts compute what they were chosen for (see `experts_as_chosen`)."""
    monkeypatch.setattr(their_nllb.NllbMoeExperts, "forward", experts_as_chosen)


@pytest.fixture(scope="session")
def families_in_cases() -> set[str]:
    return {name.partition("/")[0] for name in (*CASES, *OUR_CASES, *ENCODER_DECODERS)}
