"""Every kind of bad input, through the command line: exit 2, one line of error, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moesaic.train.resume import RunFolder
from tests.cli.tiny_recipe import RECIPE
from tests.full_disk import full_disk

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
PROMPT = ("--prompt", "the quick", "--max-new-tokens", "2")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def transpose_router(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[ROUTER] = tensors[ROUTER].T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def index_absent_shard(folder: Path) -> None:
    present, absent = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / present)
    index = {"weight_map": dict.fromkeys(load_file(folder / present), present) | {ROUTER: absent}}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing safetensors": (lambda f: (f / "model.safetensors").unlink(), f"no model.safetensors and no {INDEX}"),
    "truncated safetensors": (lambda f: truncate(f / "model.safetensors"), "model.safetensors is cut short or damaged"),
    "wrong shape": (transpose_router, "is [24, 5] and its configuration describes [5, 24]"),
    "index names absent shards": (index_absent_shard, "names model-00002-of-00002.safetensors, absent from the folder"),
    "config contradicts weights": (lambda f: edit(f / "config.json", num_hidden_layers=3), "that its configuration"),
    "unknown model_type": (
        lambda f: edit(f / "config.json", model_type="gpt5"),
        "unknown model_type 'gpt5'. Known: dbrx, deepseek_v2,",
    ),
    "top_k above num_experts": (
        lambda f: edit(f / "config.json", num_experts_per_tok=9),
        "top_k=9 is more than num_experts=5; use 1 to 5",
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(moe_folder, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(moe_folder, tmp_path / "model"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A corpus that can be trained on, until a test spoils it."""
    (tmp_path / "corpus" / "prose").mkdir(parents=True)
    for number in range(30):
        text = f"{number}: the cat sat on the mat and looked at the dog. " * 6
        (tmp_path / "corpus" / "prose" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


@pytest.fixture
def train(moesaic, tmp_path, corpus) -> Callable[..., Any]:
    (tmp_path / "run.toml").write_text(RECIPE + "checkpoint_every = 1\n", encoding="utf-8")

    def run(out: Path, *more: str) -> Any:
        return moesaic("train", "--out", out, "--config", tmp_path / "run.toml", "--corpus", corpus, *more)

    return run


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, without locks, which are empty and stay."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}


def assert_refused(ran: Any, words: str) -> None:
    """One line of error, the last on stderr; before it stands only what the verb had to say by then."""
    *talk, last = ran.err.splitlines()
    assert (ran.exit_code, ran.out) == (2, ""), ran.err
    assert last.startswith("moesaic: error: ") and words in last
    assert not any("error" in line for line in talk)


def assert_one_line(ran: Any, words: str) -> None:
    assert_refused(ran, words)
    assert ran.err.count("\n") == 1, ran.err


@pytest.mark.parametrize("verb", ["generate", "chat", "convert"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole(moesaic, folder, tmp_path, damage, verb):
    spoil, words = DAMAGES[damage]
    spoil(folder)
    before = files(tmp_path)
    assert_one_line(moesaic(verb, folder, *((tmp_path / "out",) if verb == "convert" else PROMPT)), words)
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_cannot_be_counted(moesaic, folder):
    spoil, words = DAMAGES["top_k above num_experts"]
    spoil(folder)
    assert_one_line(moesaic("count", folder), words)


def test_an_unknown_model_type_is_counted_aloud(moesaic, folder):
    spoil, _ = DAMAGES["unknown model_type"]
    spoil(folder)
    ran = moesaic("count", folder)
    assert ran.exit_code == 0 and "model_type 'gpt5' is not known: taken for a decoder" in ran.err


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_prompt_that_is_not_utf8(moesaic, moe_folder, verb):
    assert_refused(moesaic(verb, moe_folder, stdin=b"caf\xe9 ole"), "standard input is not UTF-8 at byte 3; convert it")


def test_a_prompt_file_that_is_not_utf8(moesaic, moe_folder, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 ole")
    ran = moesaic("generate", moe_folder, "--prompt-file", tmp_path / "prompt.txt")
    assert_one_line(ran, "prompt.txt is not UTF-8 at byte 3; convert it")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_prompt_longer_than_the_context(moesaic, moe_folder, verb):
    assert_refused(moesaic(verb, moe_folder, "--prompt", "12345" * 30), "context of 96")


CORPORA: dict[str, tuple[Damage, str]] = {
    "not UTF-8": (lambda c: (c / "prose" / "00.txt").write_bytes(b"caf\xe9"), "00.txt is not UTF-8 at byte 3 (0xe9)"),
    "no files": (lambda c: [path.unlink() for path in c.rglob("*.txt")], "domain 'prose' has no text; put .txt"),
    "blank files": (lambda c: [path.write_text(" \n") for path in c.rglob("*.txt")], "domain 'prose' has no text"),
    "no domains": (lambda c: shutil.rmtree(c / "prose"), "has no subfolders; make one for each domain"),
    "no folder": (shutil.rmtree, "no folder"),
}


@pytest.mark.parametrize("damage", CORPORA)
def test_a_corpus_that_is_no_text(moesaic, train, corpus, tmp_path, damage):
    spoil, words = CORPORA[damage]
    spoil(corpus)
    before = files(tmp_path)
    assert_one_line(train(tmp_path / "run"), words)
    assert_one_line(moesaic("demo", "--out", tmp_path / "demo", "--corpus", corpus), words)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.num_experts_per_tok=9", "top_k=9 is more than num_experts=5; use 1 to 5"),
        ("model.model_type=gpt5", "unknown model_type 'gpt5'. Known: dbrx, deepseek_v2,"),
    ],
)
def test_a_recipe_that_cannot_be_leaves_the_folder_to_the_right_one(train, tmp_path, change, words):
    before = files(tmp_path)
    assert_one_line(train(tmp_path / "run", "--set", change), words)
    assert files(tmp_path) == before
    assert train(tmp_path / "run").exit_code == 0


def test_a_second_run_into_a_directory_in_use(moesaic, train, corpus, tmp_path):
    assert train(tmp_path / "run").exit_code == 0
    before = files(tmp_path)
    with RunFolder.claim(tmp_path / "run"):
        for more in ((), ("--resume",)):
            assert_one_line(train(tmp_path / "run", *more), "run is in use by another run; wait for it, or choose")
    with RunFolder.claim(tmp_path / "demo"):
        assert_one_line(moesaic("demo", "--out", tmp_path / "demo", "--corpus", corpus), "demo is in use by another")
    assert_one_line(moesaic("demo", "--out", tmp_path / "run", "--corpus", corpus), "run is not an empty folder")
    assert files(tmp_path) == before


@pytest.mark.parametrize("room_bytes", [0, 1_000, 10_000])
def test_a_full_disk_leaves_the_old_checkpoint(moesaic, moe_folder, dense_folder, tmp_path, room_bytes):
    assert moesaic("convert", dense_folder, tmp_path / "old").exit_code == 0
    before = files(tmp_path)
    for out in ("old", "new"):
        with full_disk(room_bytes):
            ran = moesaic("convert", moe_folder, tmp_path / out, "--overwrite")
        assert_refused(ran, f"cannot save to {tmp_path / out}: File too large; ")
        assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert moesaic("generate", tmp_path / "old", *PROMPT).exit_code == 0


@pytest.mark.parametrize("room_bytes", [0, 2_000, 60_000, 100_000])
def test_a_full_disk_in_training_leaves_the_old_checkpoint(train, tmp_path, room_bytes):
    out = tmp_path / "run"
    assert train(out).exit_code == 0
    whole = weights(out)
    shutil.rmtree(out / "checkpoints" / "step-000002")
    shutil.rmtree(out / "model")
    before = files(out)
    with full_disk(room_bytes):
        ran = train(out, "--resume")
    assert_refused(ran, "File too large")
    after = files(out)
    # The log of steps may have grown.
    assert after | {"metrics.jsonl": b""} == before | {"metrics.jsonl": b""}
    assert train(out, "--resume").exit_code == 0
    assert weights(out) == whole
