"""What became of the routers between two checkpoints."""

import dataclasses

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.telemetry.probe import routed_layers
from moesaic.train.doctor.change import changes
from moesaic.train.doctor.examination import Examination, Question, examine
from tests.tiny import lively, tiny_config
from tests.train.doctor.sick import CONFIG

TOKENS = torch.randint(61, (8, 40), generator=torch.Generator().manual_seed(0))


def seen(change=None, config=CONFIG, tokens=TOKENS) -> Examination:
    model = lively(config)
    with torch.no_grad():
        if change is not None:
            change(routed_layers(model)[0].router)
    return examine(model, [Question(part) for part in tokens.split(2)])


def test_the_same_model_has_settled():
    (change,) = changes(seen(), seen())
    assert change.shared.share == 1 and change.moved == 0 and change.state == "settled"
    assert not change.died and not change.revived


def test_a_new_router_shares_what_chance_gives():
    def anew(router) -> None:
        router.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(9))

    (change,) = changes(seen(), seen(anew))
    assert change.state == "unsettled" and abs(change.beyond_chance) < 0.5
    assert "goes to other tokens" in change.sentence


def test_an_expert_that_died_and_one_that_came_back():
    def close(router) -> None:
        router.bias[2] = -50.0

    before, after = seen(), seen(close)
    (change,) = changes(before, after)
    assert change.died == (2,) and "experts 2 have died since" in change.sentence and change.moved > 0
    (back,) = changes(after, before)
    assert back.revived == (2,) and back.died == ()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="other tokens"):
        changes(seen(), seen(tokens=TOKENS.flip(0)))
    fewer = tiny_config(windows=(None, None))
    layer = fewer.layers[0]
    router = dataclasses.replace(layer.feed_forward.router, num_experts=4)  # type: ignore[union-attr]
    moe = dataclasses.replace(layer.feed_forward, router=router)
    stack = dataclasses.replace(fewer.decoder, layers=(dataclasses.replace(layer, feed_forward=moe), fewer.layers[1]))
    with pytest.raises(ConfigError, match="other numbers of experts"):
        changes(seen(), seen(config=dataclasses.replace(fewer, decoder=stack)))
