import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.parallel import ALONE, ProcessGroup
from tests.parallel.gloo import on_ranks


def collectives(ranks, argument):
    tensor = torch.tensor([ranks.rank + 1.0, argument], dtype=torch.float64)
    summed = ranks.sum_(tensor)
    counts = ranks.sum_(torch.full((3,), 2**40 + ranks.rank, dtype=torch.int64))
    return {
        "place": (ranks.rank, ranks.size),
        "sum": summed.tolist(),
        "in place": summed is tensor,
        "counts": counts.tolist(),
        "gathered": ranks.gather({"rank": ranks.rank, "many": list(range(ranks.rank))}),
    }


def test_one_rank_is_a_group_of_itself():
    assert collectives(ALONE, 5.0) == {
        "place": (0, 1),
        "sum": [1.0, 5.0],
        "in place": True,
        "counts": [2**40] * 3,
        "gathered": [{"rank": 0, "many": []}],
    }


def test_ranks_sum_and_gather():
    found = on_ranks(3, "tests.parallel.test_ranks:collectives", 0.5)
    for rank, own in enumerate(found):
        assert own["place"] == (rank, 3)
        assert own["sum"] == [6.0, 1.5] and own["in place"]
        assert own["counts"] == [3 * 2**40 + 3] * 3
        assert own["gathered"] == [{"rank": other, "many": list(range(other))} for other in range(3)]


def test_a_group_must_have_been_made():
    with pytest.raises(ConfigError, match="no process group; call "):
        ProcessGroup()
