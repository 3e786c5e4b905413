import pytest
import torch

from moesaic.engine.generate import generate
from moesaic.engine.sampling import Sampling, sample
from moesaic.errors import ConfigError, GenerationError
from moesaic.layers.kv_cache import KeyValueCache
from tests.tiny import lively, tiny_config

MODEL = lively(tiny_config(windows=(None, 5)))


def greedy_without_cache(prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(MODEL(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_whole_forwards():
    assert generate(MODEL, [3, 1, 4], 12) == greedy_without_cache([3, 1, 4], 12)


def test_prompts_of_different_lengths_get_what_they_get_alone():
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    assert generate(MODEL, prompts, 9) == [generate(MODEL, prompt, 9) for prompt in prompts]


def test_tensors_are_prompts_too():
    alone = generate(MODEL, [3, 1, 4], 4)
    assert generate(MODEL, torch.tensor([3, 1, 4]), 4) == alone
    assert generate(MODEL, torch.tensor([[3, 1, 4]]), 4) == [alone]


def test_a_seed_gives_the_same_text_and_another_seed_another():
    drawn = [generate(MODEL, [3], 30, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_ends_with_the_end_token_and_says_each_token():
    written = generate(MODEL, [3, 1, 4], 12)
    heard = []
    stop = written[5]
    until = generate(MODEL, [3, 1, 4], 12, eos_token_ids=[stop], on_token=lambda row, token: heard.append((row, token)))
    assert until == written[: written.index(stop) + 1]
    assert heard == [(0, token) for token in until]


def test_it_ends_where_the_context_is_full():
    assert len(generate(MODEL, [1] * 40, 100)) == MODEL.config.context_length - 40


def test_a_cache_goes_on_where_it_stood():
    model = lively(tiny_config(windows=(None, None)))
    cache = KeyValueCache(model.config, batch_size=1, max_length=48)
    first = generate(model, [3, 1, 4], 5, cache=cache)
    whole = [3, 1, 4, *first]
    assert cache.length == len(whole) - 1
    assert generate(model, [*whole, 7], 5, cache=cache) == generate(model, [*whole, 7], 5)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "an empty prompt"),
        ([1] * 48, "a prompt of 48 tokens leaves no room in a context of 48; shorten it to 47"),
        ([61], "the model knows 0 to 60"),
        ([[1], []], "an empty prompt"),
    ],
)
def test_impossible_prompts(prompt, words):
    with pytest.raises(GenerationError, match=words):
        generate(MODEL, prompt, 3)


def test_nothing_asked_for_is_nothing_written():
    assert generate(MODEL, [3], 0) == []


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_sampling(settings):
    with pytest.raises(ConfigError):
        Sampling(**settings)


def frequencies(sampling, logits, draws=4000):
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(draws, -1), sampling, generator)
    return torch.bincount(drawn, minlength=logits.numel()) / draws


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = (logits / 0.7).softmax(-1)
    assert torch.allclose(frequencies(Sampling(temperature=0.7), logits), expected, atol=0.03)


def test_tails_are_cut():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities 0.64, 0.24, 0.09, 0.03
    assert (frequencies(Sampling(temperature=1.0, top_k=2), logits) > 0).tolist() == [True, True, False, False]
    assert (frequencies(Sampling(temperature=1.0, top_p=0.9), logits) > 0).tolist() == [True, True, True, False]
    assert (frequencies(Sampling(temperature=1.0, top_p=1e-6), logits) > 0).tolist() == [True, False, False, False]
