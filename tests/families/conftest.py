"""A checkpoint of every case: as transformers writes it, or, of our own family and what their models lack, by us."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from moesaic import families
from moesaic.hub import load, save
from tests.families import decoder_oracle, encoder_decoder_oracle
from tests.families.cases import CASES, COMMON, OUR_CASES
from tests.families.encoder_decoder_cases import CASES as ENCODER_DECODERS
from tests.families.golden import COLUMNS, golden
from tests.tiny import lively_decoder


@dataclass(frozen=True)
class Oracle:
    """A case's checkpoint, and what transformers' model of it answered: of logits the `columns`."""

    case: str
    folder: Path
    columns: ClassVar[slice] = COLUMNS

    def answer(self, question: str) -> Tensor:
        return golden(self.case).answers[question]

    @property
    def about(self) -> Any:
        """The module that knows transformers' models of this kind."""
        return encoder_decoder_oracle if self.case in ENCODER_DECODERS else decoder_oracle

    @cached_property
    def model(self) -> Any:
        """transformers' own."""
        return self.about.their_model(self.case, self.folder)

    @cached_property
    def ours(self) -> Any:
        """Our model, for all tests that change nothing of it."""
        return load(self.folder)


class Live(Oracle):
    """The same, asked now, and in all columns."""

    columns: ClassVar[slice] = slice(None)

    def answer(self, question: str) -> Tensor:
        return self.about.QUESTIONS[question](self.model, self.case)


Made = Callable[..., Oracle]


def our_folder(case: str, folder: Path) -> None:
    """A tiny model that only we have, saved by us."""
    fields = {"model_type": case.partition("/")[0], **COMMON, **OUR_CASES[case]}
    save(lively_decoder(families.from_hf(fields)), folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Cases by name, each made once."""

    @cache
    def folder_of(case: str) -> Path:
        folder = tmp_path_factory.mktemp(case.partition("/")[0])
        if case in OUR_CASES:
            our_folder(case, folder)
        else:
            golden(case).write(folder)
        return folder

    return cache(lambda case, kind=Oracle: kind(case, folder_of(case)))


def _live(cases: Any) -> list[Any]:
    return [pytest.param((case, Live), id=f"{case}, live", marks=pytest.mark.slow) for case in cases]


def _asked(cases: Any) -> list[Any]:
    """As recorded, and in the slow tests live."""
    return [*(pytest.param((case, Oracle), id=case) for case in cases), *_live(cases)]


@pytest.fixture(params=_asked(CASES))
def oracle(request: pytest.FixtureRequest, made: Made) -> Oracle:
    return made(*request.param)


@pytest.fixture(params=_live(CASES))
def live(request: pytest.FixtureRequest, made: Made) -> Oracle:
    return made(*request.param)


@pytest.fixture(params=_asked(ENCODER_DECODERS))
def oracle_of_pairs(request: pytest.FixtureRequest, made: Made) -> Oracle:
    """Of an encoder-decoder."""
    return made(*request.param)


@pytest.fixture(params=_live(ENCODER_DECODERS))
def live_of_pairs(request: pytest.FixtureRequest, made: Made) -> Oracle:
    return made(*request.param)


@pytest.fixture(params=[*CASES, *OUR_CASES])
def any_case(request: pytest.FixtureRequest, made: Made) -> Oracle:
    """Of any family, ours too, of which nobody else answers."""
    return made(request.param)


@pytest.fixture
def folder(any_case: Oracle) -> Path:
    return any_case.folder


@pytest.fixture(scope="session")
def families_in_cases() -> set[str]:
    return {name.partition("/")[0] for name in (*CASES, *OUR_CASES, *ENCODER_DECODERS)}
