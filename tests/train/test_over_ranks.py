import torch

from moesaic.train.over_ranks import average_statistics, sum_gradients
from tests.train.step_helpers import changed, lively_stepper


class Twins:
    """Two ranks; the other one has twice every gradient, and one of "elsewhere" where this rank has none."""

    rank, size = 0, 2

    def __init__(self, weights, elsewhere):
        self.elsewhere = [weight.name in elsewhere for weight in weights]
        self.calls = 0

    def sum_(self, tensor):
        self.calls += 1
        if self.calls == 1:  # who has a gradient
            return tensor.add_(torch.tensor(self.elsewhere).to(tensor))
        return tensor.mul_(3).add_(1.0)

    def gather(self, item):
        return [item, item]


def test_gradients_are_summed_also_where_this_rank_has_none():
    """A weight without one on any rank keeps none: the optimizer leaves it alone."""
    for precision in ("fp32", "bf16"):
        trained = lively_stepper(changed(precision=precision))
        gradients = trained.optimizer.gradients
        experts = "layers.0.feed_forward.experts.down"
        ranks = Twins(gradients.weights, {experts, "final_norm.weight", "embedding.weight"})
        with gradients.collecting():
            trained.model.embedding.weight.sum().backward()
            sum_gradients(gradients, ranks)
            found = {weight.name: gradients.of(weight) for weight in gradients.weights}
            assert {name for name, gradient in found.items() if gradient is not None} == {
                experts,
                "final_norm.weight",
                "embedding.weight",
            }
            assert (found["embedding.weight"] == 4).all()  # 3 * 1 + 1
            assert (found[experts] == 1).all() and (found["final_norm.weight"] == 1).all()


def test_statistics_become_the_mean_of_all_ranks():
    class Other:
        rank, size = 0, 2

        def sum_(self, tensor):
            return tensor.add_(torch.tensor([3.0, 5.0]))

        def gather(self, item):
            return [item, item]

    mean = torch.tensor([1.0, -1.0])
    average_statistics([mean], Other())
    assert mean.tolist() == [2.0, 2.0]
