"""`moesaic plan simulate`, `claims` and `disclosed` from the command line."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

SMALL = ("--machine", "8xh100", "--set", "prefill_ranks=4,decode_ranks=4,prefill_share=0.5,redundant=0,rate=40")


def test_serving_adds_up_and_is_drawn(moesaic, tmp_path: Path) -> None:
    picture = tmp_path / "serving.svg"
    more = ("--set", "seconds=1,prompt=512,output=32,seed=3", "--plot", picture)
    ran = moesaic("plan", "simulate", "olmoe-1b-7b", *SMALL, *more, "--json")
    assert ran.exit_code == 0
    places = ran.json["requests"]
    assert places["warm"] + places["came"] == sum(n for place, n in places.items() if place not in ("warm", "came"))
    assert ran.json["devices"] == 8 and ran.json["output_per_s"] > 0
    assert len(ElementTree.parse(picture).getroot().findall(".//{*}g")) == 3
    again = moesaic("plan", "simulate", "olmoe-1b-7b", *SMALL, *more[:2], "--json")
    assert again.json == ran.json


def test_the_table_of_a_training_step(moesaic) -> None:
    command = ("plan", "simulate", "olmoe-1b-7b", "--task", "train", "--machine", "8xh100", "--format", "bf16")
    ran = moesaic(*command, "--set", "micro_batches=4,sequence=1024")
    assert ran.exit_code == 0 and "a trillion tokens" in ran.out and "for 32.8K tokens" in ran.out
    staged = moesaic(*command, "--layout", "pp=4,dp=2,ep=2", "--set", "micro_batches=8", "--json")
    assert staged.json["chunks"] == 2 * 4 * 8 and staged.json["tokens"] == 2 * 8 * 4096


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate"], "plan simulate takes one model, and here are 0"),
        (["simulate", "olmoe-1b-7b"], "needs a --machine"),
        (["simulate", "olmoe-1b-7b", "--machine", "8xh100"], "8 devices for units of 32 and 144; use 176 or more"),
        (["simulate", "olmoe-1b-7b", *SMALL, "--set", "speed=3"], "unknown --set 'speed'"),
        (["simulate", "olmoe-1b-7b", *SMALL, "--set", "seed=x"], "--set seed=x; give a whole number"),
        (["simulate", "olmoe-1b-7b", *SMALL, "--set", "prompt=9000"], "this model takes 4,096, use fewer"),
        (["simulate", "olmoe-1b-7b", *SMALL, "--set", "redundant=3"], "num_slots=67 does not divide over 4 ranks"),
        (["simulate", "deepseek-v3", *SMALL], "GB of weights each"),
        (["simulate", "llama-2-70b", *SMALL], "has no experts to place"),
        (["simulate", "olmoe-1b-7b", *SMALL, "--layout", "ep=8"], "--layout is for --task train"),
        (["claims", "mixtral"], "it takes no further words"),
        (["disclosed", "all"], "it takes no further words"),
    ],
)
def test_what_makes_no_sense_is_refused(moesaic, words: list[str], message: str) -> None:
    ran = moesaic("plan", *words)
    assert ran.exit_code == 2 and message in ran.err and ran.out == ""


def test_claims_as_json_and_as_a_page(moesaic, tmp_path: Path) -> None:
    ran = moesaic("plan", "claims", "--json", "--report", tmp_path / "claims.md")
    assert ran.exit_code == 0
    assert {claim["verdict"] for claim in ran.json["claims"]} == {"true", "false", "it depends"}
    assert all(claim["claim"] in (tmp_path / "claims.md").read_text() for claim in ran.json["claims"])


def test_replicas_divide_over_the_units_that_are_asked_for(moesaic):
    pools = "prefill_ranks=4,decode_ranks=4,rate=5,seconds=5"
    ran = moesaic("plan", "simulate", "mixtral-8x7b", "--machine", "8xh100", "--set", pools)
    assert ran.exit_code == 0 and "prefill_ranks=4,decode_ranks=4,rate=10" in ran.err
    assert moesaic("plan", "simulate", "qwen3-next-80b-a3b", "--machine", "256xh100", "--json").exit_code == 0
