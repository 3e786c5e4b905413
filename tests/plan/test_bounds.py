"""What is too much, too little, or no number: one line each, that says what would do."""

import pytest

from moesaic.cli.plan_options import read_count
from moesaic.errors import ConfigError
from moesaic.plan.hardware import find_machine
from moesaic.plan.plan import make_plan
from moesaic.plan.roofline import Speculation


@pytest.mark.parametrize("text", ["nan", "inf", "1e400", "-inf", "0", "-3", "2.5", "", "k"])
def test_counts_are_whole_and_finite(text):
    with pytest.raises(ConfigError, match=r"--users .*; give a whole number above 0"):
        read_count("--users", text)


def test_machines_and_drafts_have_an_end():
    with pytest.raises(ConfigError, match=r"99,999,999 devices; write 1,000,000 or fewer"):
        find_machine("99999999xh100")
    with pytest.raises(ConfigError, match=r"drafts=1000000; use 0 to 1000"):
        Speculation(drafts=1_000_000, acceptance=0.5)


def test_a_share_that_is_none_is_named_before_anything_is_tried():
    with pytest.raises(ConfigError, match=r"overlap=2\.0; use a share from 0 to 1"):
        make_plan("mixtral-8x7b", overlap=2.0)


def test_too_many_users_are_told_how_many_fit():
    line = make_plan("mixtral-8x7b", machine="8xh100", users=10**12).verdict.line
    assert "1,000,000,000,000 texts" in line and line.endswith("would fit: 536 texts at once")


def test_what_nothing_relieves_says_how_much_memory_it_takes():
    line = make_plan("deepseek-v3", machine="m3-max").verdict.line
    assert line.endswith("nothing tried here fits: it takes devices of 677.4 GB or more")
