"""Models in which tokens see later ones cannot write, and every command that writes says so."""

from dataclasses import replace

import pytest

from moesaic import hub
from moesaic.config import MoeConfig, RouterConfig, StackConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.models.decoder import Decoder
from tests.cli.conftest import TEMPLATE, TEXT, tiny_config


@pytest.fixture
def leaking_folder(tmp_path):
    tokenizer = Tokenizer(Tokenizer.train([TEXT], vocab_size=300).backend, chat_template=TEMPLATE)
    config = tiny_config("moesaic", tokenizer.vocab_size)
    router = RouterConfig(name="expert_choice", num_experts=5, top_k=2)
    layer = replace(config.layers[0], feed_forward=MoeConfig(router=router, intermediate_size=9))
    config = replace(config, decoder=StackConfig(layers=(config.layers[0], layer)))
    hub.save(Decoder(config).initialize(1), tmp_path, tokenizer=tokenizer)
    return tmp_path


@pytest.mark.parametrize("arguments", [("generate", "--prompt", "the quick"), ("chat", "--prompt", "the quick")])
def test_writing_is_refused_with_what_would_work(moesaic, leaking_folder, arguments):
    verb, *options = arguments
    ran = moesaic(verb, leaking_folder, *options)
    assert ran.exit_code == 2
    assert "layer 1 has router 'expert_choice', where tokens see later ones" in ran.err
    assert 'train one with another router, such as "softmax_topk"' in ran.err
    assert "Traceback" not in ran.err and not ran.out
