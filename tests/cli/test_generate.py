"""`moesaic generate`."""

import pytest
import torch

from moesaic import hub
from moesaic.cli.text import open_tokenizer
from moesaic.engine.generate import generate


def greedy(folder, prompt, num_tokens) -> list[int]:
    written = generate(hub.load(folder), open_tokenizer(str(folder)).encode(prompt), num_tokens)
    return [int(token) for token in torch.tensor(written)]


def test_json_is_what_the_engine_writes(moesaic, moe_folder):
    ran = moesaic("generate", moe_folder, "--prompt", "the quick", "--max-new-tokens", "9", "--json")
    assert ran.exit_code == 0
    token_ids = greedy(moe_folder, "the quick", 9)
    tokenizer = open_tokenizer(str(moe_folder))
    prompt_ids = tokenizer.encode("the quick")
    assert ran.json["token_ids"] == token_ids
    assert ran.json["text"] == tokenizer.decode(prompt_ids + token_ids)[len("the quick") :]
    assert ran.json["prompt_token_ids"] == prompt_ids
    assert (ran.json["prompt_tokens"], ran.json["new_tokens"]) == (len(prompt_ids), 9)
    assert ran.json["seconds"] > 0


def test_prompt_may_come_three_ways(moesaic, moe_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve\r\n", encoding="utf-8", newline="")
    options = ("--max-new-tokens", "5", "--json")
    by_option = moesaic("generate", moe_folder, "--prompt", "naïve", *options).json
    by_file = moesaic("generate", moe_folder, "--prompt-file", tmp_path / "prompt.txt", *options).json
    by_pipe = moesaic("generate", moe_folder, *options, stdin="naïve\n".encode()).json
    assert by_option["prompt"] == by_file["prompt"] == by_pipe["prompt"] == "naïve"
    assert by_option["token_ids"] == by_file["token_ids"] == by_pipe["token_ids"]


def test_text_streams_to_stdout_and_speed_to_stderr(moesaic, moe_folder):
    arguments = ("generate", moe_folder, "--prompt", "the", "--max-new-tokens", "12")
    ran = moesaic(*arguments)
    assert ran.out == moesaic(*arguments, "--json").json["text"] + "\n"
    assert "tokens/s" in ran.err


def test_seed_decides(moesaic, moe_folder):
    def sample(seed: int) -> list[int]:
        options = ("--temperature", "5", "--top-k", "200", "--top-p", "0.99", "--seed", str(seed), "--json")
        return moesaic("generate", moe_folder, "--prompt", "the", *options).json["token_ids"]

    assert sample(1) == sample(1) != sample(2)


def test_text_ends_where_the_context_does(moesaic, moe_folder):
    ran = moesaic("generate", moe_folder, "--prompt", "the", "--max-new-tokens", "1000", "--json")
    assert ran.json["prompt_tokens"] + ran.json["new_tokens"] == hub.read_config(moe_folder).context_length


def test_empty_prompt_starts_with_the_models_own_token(moesaic, dense_folder):
    ran = moesaic("generate", dense_folder, "--prompt", "", "--max-new-tokens", "2", "--json")
    assert (ran.exit_code, ran.json["prompt_token_ids"]) == (0, [0])


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--prompt", "12345" * 30], "context of 96"),
        (["--prompt", ""], "empty prompt"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2"),
        (["--prompt-file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
    ],
)
def test_mistakes(moesaic, moe_folder, options, seen):
    ran = moesaic("generate", moe_folder, *options)
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("moesaic: error: ")
    assert seen in ran.err


def test_a_prompt_too_long_says_both_lengths(moesaic, moe_folder):
    prompt = "12345" * 30
    ran = moesaic("generate", moe_folder, "--prompt", prompt)
    assert str(len(open_tokenizer(str(moe_folder)).encode(prompt))) in ran.err


def test_text_that_is_not_utf8(moesaic, moe_folder):
    ran = moesaic("generate", moe_folder, stdin=b"caf\xe9 ole")
    assert (ran.exit_code, ran.err) == (
        2,
        "moesaic: error: standard input is not UTF-8 at byte 3; convert it, with iconv for example\n",
    )


@pytest.mark.parametrize("model", ["/nowhere/at-all", "mixtral-8x7b", "mixtral-8x7"])
def test_models_without_weights(moesaic, model):
    ran = moesaic("generate", model, "--prompt", "a")
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
