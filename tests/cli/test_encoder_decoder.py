"""Commands and a model with an encoder: those that take it, and those that say in one line that they do not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic import families, hub
from moesaic.cli.text import open_tokenizer
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.generate import generate
from moesaic.models.build import build
from tests.cli.conftest import TEXT, Ran

Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def switch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Switch Transformer whose targets end with token 0, as its sources do."""
    tokenizer = Tokenizer(Tokenizer.train([TEXT], vocab_size=300).backend)
    fields = {
        "model_type": "switch_transformers",
        "vocab_size": tokenizer.vocab_size,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 20,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 5,
        "eos_token_id": 0,
    }
    folder = tmp_path_factory.mktemp("models") / "switch"
    hub.save(build(families.from_hf(fields)).initialize(seed=3), folder, tokenizer=tokenizer)
    return folder


def test_generate_writes_a_target(moesaic: Command, switch_folder: Path) -> None:
    options = ("--max-new-tokens", "6", "--json")
    ran = moesaic("generate", switch_folder, "--prompt", "the quick", "--target-prefix", "fox", *options)
    tokenizer = open_tokenizer(str(switch_folder))
    source = [*tokenizer.encode("the quick"), 0]
    expected = generate(hub.load(switch_folder), source, 6, target_prefix=tokenizer.encode("fox"))
    assert ran.exit_code == 0
    assert ran.json["prompt_token_ids"] == source
    assert ran.json["token_ids"] == expected
    other = moesaic("generate", switch_folder, "--prompt", "the quick", *options)
    assert other.json["token_ids"] == generate(hub.load(switch_folder), source, 6)


def test_a_target_prefix_is_for_targets(moesaic: Command, moe_folder: Path) -> None:
    ran = moesaic("generate", moe_folder, "--prompt", "the", "--target-prefix", "fox")
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "--target-prefix with a model that has no encoder; put that text at the end of the prompt" in ran.err


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("chat", "MODEL", "--prompt", "hello"), "chat"),
        (("trace", "MODEL", "--text", __file__, "--out", "OUT"), "trace"),
        (("convert", "MODEL", "OUT", "--upcycle", "2x2"), "upcycling"),
    ],
)
def test_others_say_in_one_line_that_they_need_a_decoder(
    moesaic: Command, switch_folder: Path, tmp_path: Path, command: tuple[str, ...], what: str
) -> None:
    places = {"MODEL": str(switch_folder), "OUT": str(tmp_path / "out.npz")}
    ran = moesaic(*(places.get(word, word) for word in command))
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{what} needs a model that only decodes, and this switch_transformers model has an encoder" in ran.err
    assert not (tmp_path / "out.npz").exists()


def test_convert_goes_there_and_back(moesaic: Command, switch_folder: Path, tmp_path: Path) -> None:
    assert moesaic("convert", switch_folder, tmp_path / "small", "--max-shard-size", "1MB").exit_code == 0
    assert hub.read_config(tmp_path / "small") == hub.read_config(switch_folder)
    before, after = hub.load(switch_folder).state_dict(), hub.load(tmp_path / "small").state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert moesaic("convert", switch_folder, tmp_path / "half", "--dtype", "bf16").exit_code == 0
    assert {str(each.dtype) for each in hub.load(tmp_path / "half").state_dict().values()} == {"torch.bfloat16"}


def test_count_tells_of_both_stacks(moesaic: Command, switch_folder: Path) -> None:
    document = moesaic("count", switch_folder, "--json").json
    assert document["total"] == hub.read_config(switch_folder).total
    assert (document["layers"], document["encoder_layers"], document["moe_layers"]) == (4, 2, 2)
    # Keys and values of 4 heads of 6, of the target's token and of the source's, in 2 layers, 2 bytes each.
    assert document["state_bytes_per_token"] == 2 * 2 * (2 * 4 * 6) * 2
    shown = moesaic("count", "switch-base-8").out
    assert "12 layers that read and 12 that write, 12 of them MoE, 1 of 8 experts a token" in shown
    assert "619,339,008" in shown
