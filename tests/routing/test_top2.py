"""The three ways of a top-2 router to its second expert, while training; evaluation takes the two best in all."""

import pytest
import torch

from moesaic.config import RouterConfig, Top2Settings
from moesaic.errors import ConfigError
from moesaic.routing.routers import ROUTERS, RouterInput

LOGITS_E = torch.tensor([0.3, 2.0, 1.0, -0.5])


def chosen(second: str, *, training: bool, num_tokens: int = 4000) -> torch.Tensor:
    settings = RouterConfig(
        name="gshard_top2",
        num_experts=4,
        top_k=2,
        settings=Top2Settings(second=second),  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(3)
    choice = ROUTERS["gshard_top2"](RouterInput(LOGITS_E.expand(num_tokens, 4), training=training), settings)
    first, other = LOGITS_E.softmax(0)[choice.expert_ids_TM.clamp(min=0)].unbind(1)
    assert torch.allclose(choice.weights_TM[:, 0], first / (first + other)) or second == "random"
    return choice.expert_ids_TM


@pytest.mark.parametrize("second", ["random", "all", "sampling"])
def test_evaluation_takes_the_two_best(second: str) -> None:
    assert (chosen(second, training=False, num_tokens=5) == torch.tensor([1, 2])).all()


def test_all_keeps_the_second() -> None:
    assert (chosen("all", training=True) == torch.tensor([1, 2])).all()


def test_random_keeps_the_second_as_often_as_twice_its_share_says() -> None:
    ids_T2 = chosen("random", training=True)
    share = LOGITS_E[[1, 2]].softmax(0)[1].item()
    kept = (ids_T2[:, 1] == 2).float().mean().item()
    assert kept == pytest.approx(2 * share, abs=0.03) and ((ids_T2[:, 1] == 2) | (ids_T2[:, 1] == -1)).all()


def test_sampling_draws_the_second_by_the_probabilities_of_those_left() -> None:
    ids_T2 = chosen("sampling", training=True)
    assert (ids_T2[:, 0] == 1).all() and (ids_T2[:, 1] != 1).all()
    expected = LOGITS_E[[0, 2, 3]].softmax(0)
    seen = torch.bincount(ids_T2[:, 1], minlength=4)[[0, 2, 3]] / len(ids_T2)
    assert torch.allclose(seen, expected, atol=0.03)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="second='first' of a top-2 router; known: random, all, sampling"):
        Top2Settings(second="first")  # pyright: ignore[reportArgumentType]
