import torch

from moesaic.routing import RoutingDecision, Rows
from moesaic.train.counts import StepCounts


def decision(expert_ids, mask=None):
    mask_T = None if mask is None else torch.tensor(mask)
    rows = Rows.from_topk(torch.tensor(expert_ids), torch.ones(len(expert_ids), 1), 3, mask_T=mask_T)
    zeros_TE = torch.zeros(len(expert_ids), 3)
    return RoutingDecision(rows, zeros_TE, zeros_TE, mask_T=mask_T)


class Three:
    """Three ranks that all chose the same."""

    rank, size = 1, 3

    def sum_(self, tensor):
        return tensor.mul_(3)

    def gather(self, item):
        return [item] * 3


def test_micro_batches_and_ranks_add_up_layer_by_layer():
    counts = StepCounts(Three())
    counts.add({0: decision([[0], [1]]), 4: decision([[2], [2]])})
    assert counts.of("running", 0).tolist() == [3, 3, 0] and counts.of("running", 4).tolist() == [0, 0, 6]
    counts.add({0: decision([[0], [1]], [True, False]), 4: decision([[2], [1]], [True, False])})
    assert counts.of("running", 0).tolist() == [6, 3, 0] and counts.of("step", 4).tolist() == [0, 0, 9]
    assert counts.num_tokens == {0: 9, 4: 9}


def test_a_first_pass_knows_the_whole_step():
    counts = StepCounts(whole={0: torch.tensor([5.0, 6.0, 7.0])})
    counts.add({0: decision([[0]])})
    assert counts.of("step", 0).tolist() == [5, 6, 7] and counts.of("running", 0).tolist() == [1, 0, 0]


def test_a_dense_model_counts_nothing():
    counts = StepCounts(Three())
    counts.add({})
    assert counts.so_far == {} and counts.num_tokens == {}
