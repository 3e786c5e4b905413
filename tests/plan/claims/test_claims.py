"""Claims: the page is fresh, and verdicts follow from numbers counted by hand."""

from pathlib import Path

import pytest

from moesaic.plan.claims import Claim, all_claims, page
from moesaic.plan.claims.page import COMMAND

PAGE = Path(__file__).parents[3] / "docs" / "claims.md"


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return all_claims()


def test_the_page_is_fresh(claims: list[Claim]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(claims), f"stale; run `{COMMAND}`"


@pytest.mark.parametrize(
    ("words", "verdict", "number"),
    [
        ("24 GB at 4 bits", "false", "46.7B x 4.5 / 8 = 24.5 GiB"),
        ("two 24 GB cards at 8 bits", "it depends", "at 8.0 bits 43.5 GiB"),
        ("90 GB at 16 bits", "false", "93.4 GB"),
        ("95 GB at 16 bits", "true", "93.4 GB"),
        ("four H100 at FP8", "false", "four H100 have 314 GiB"),
        ("8 GPUs at 4 bits", "true", "671B x 4.5 / 8 = 352 GiB"),
        ("200 GB for each token", "false", "100B x 1 byte = 100 GB"),
        ("5 % to 15 %", "false", "Mixtral 8x7B 27.6%, DeepSeek-V3 5.6%"),
        ("saves $980", "false", "$97.30"),
        ("at small batches", "it depends", "ratio"),
        ("at large batches", "it depends", "sqrt(total x active)"),
        ("memory grows faster", "false", "312 -> 989 -> 2,250 TFLOP/s (x7.2); memory 80 -> 80 -> 180 GiB (x2.2)"),
        ("as good as a dense model of its total size", "false", "79.5 on SuperGLUE"),
    ],
)
def test_verdicts(claims: list[Claim], words: str, verdict: str, number: str) -> None:
    found = [claim for claim in claims if words in claim.claim]
    assert len(found) == 1 and found[0].verdict == verdict and number in found[0].numbers
