import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.corpus import Corpus
from moesaic.data.packed import Index, document_ids, is_packed, open_packed
from moesaic.data.packing import pack
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "p"
    pack(corpus, tokenizer, folder, shard_tokens=500)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "p"))


def test_every_flipped_bit_is_found_and_its_file_named(folder: Path) -> None:
    assert is_packed(folder)
    data_files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(data_files) > 8
    for number, path in enumerate(data_files):
        good = path.read_bytes()
        place = (len(good) - 1) * number // len(data_files)
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << number % 7]) + good[place + 1 :])
        with pytest.raises(Exception, match=r".") as caught:
            open_packed(folder)
        if path.suffix in (".bin", ".starts"):
            assert isinstance(caught.value, DataError)
            assert f"{path} is damaged (its sha256 is " in str(caught.value)
            assert f"; delete {folder} and pack the text again" in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(good)
    open_packed(folder)


def test_files_that_are_cut_short_or_gone(folder: Path) -> None:
    shard = folder / "000-code" / "train-00001.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(DataError, match=rf"train-00001\.bin is damaged \(it has {len(good) - 2} bytes and should have"):
        open_packed(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin is damaged \(it cannot be read: No such file"):
        open_packed(folder)


def test_an_index_that_is_damaged_or_foreign(folder: Path) -> None:
    place = folder / "index.json"
    good = place.read_text()
    place.write_text(good.replace('"tokens": 5', '"tokens": 6', 1))
    with pytest.raises(DataError, match=r"index\.json is damaged \(its checksum does not fit\)"):
        open_packed(folder)
    for text in ("", "{", "[1]", '{"weight_map": {}}'):
        place.write_text(text)
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            open_packed(folder)
    place.unlink()
    with pytest.raises(DataError, match=r"is no packed text: it has no index\.json; make one with `moesaic pack`"):
        open_packed(folder)
    assert not is_packed(folder)


def rewritten(folder: Path, change) -> None:
    """index.json changed, with a checksum that fits again."""
    place = folder / "index.json"
    tree = json.loads(place.read_text())
    del tree["checksum"]
    change(tree)
    checksum = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    place.write_text(json.dumps({**tree, "checksum": checksum}))


def first_shard(tree: dict) -> dict:
    return tree["domains"]["code"]["train"]["shards"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(dtype="O"),
        lambda tree: tree.update(dtype="<f8"),
        lambda tree: tree.update(domains=[]),
        lambda tree: tree.update(more=1),
        lambda tree: tree.pop("digest"),
        lambda tree: tree["domains"]["code"].pop("held_out"),
        lambda tree: first_shard(tree).pop("sha256"),
        lambda tree: first_shard(tree).update(sha256=["0"]),
        lambda tree: first_shard(tree).update(tokens="5"),
        lambda tree: first_shard(tree).update(tokens=-1),
        lambda tree: first_shard(tree).update(path="/etc/passwd"),
        lambda tree: first_shard(tree).update(path="000-code/../../up"),
        lambda tree: first_shard(tree).update(path=""),
        lambda tree: first_shard(tree).update(path=5),
    ],
)
def test_an_index_that_says_what_packing_never_says(folder: Path, change) -> None:
    rewritten(folder, change)
    with pytest.raises(DataError, match=r"index\.json is damaged \(.*; delete .* and pack the text again") as caught:
        open_packed(folder)
    assert "\n" not in str(caught.value)


def test_shards_and_parts_with_nothing_in_them_are_opened(folder: Path) -> None:
    nothing = hashlib.sha256(b"").hexdigest()

    def empty(tree: dict) -> None:
        tree["domains"]["code"]["held_out"]["shards"] = []
        shard = {"path": "000-code/empty", "tokens": 0, "documents": 0, "sha256": [nothing, nothing]}
        tree["domains"]["code"]["train"]["shards"].insert(0, shard)

    before = open_packed(folder).domains[0]
    for suffix in (".bin", ".starts"):
        (folder / "000-code" / f"empty{suffix}").write_bytes(b"")
    rewritten(folder, empty)
    code = open_packed(folder).domains[0]
    assert len(code.train) == len(before.train) and len(code.held_out) == 0
    assert code.train_starts is not None and before.train_starts is not None
    assert np.array_equal(code.train_starts, before.train_starts)


def test_text_beside_an_index_of_another_kind_is_text(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text("of cats")
    (tmp_path / "index.json").write_text('{"of": "a web page"}')
    assert not is_packed(tmp_path)


def test_another_tokenizer_is_noticed(folder: Path, corpus: Corpus) -> None:
    Tokenizer.train(["something else altogether " * 9], 280).save(folder / "tokenizer")
    with pytest.raises(DataError, match="it is not the tokenizer that the text was packed with"):
        open_packed(folder)


def test_the_index_goes_through_json(whole: Path) -> None:
    index = Index.read(whole)
    assert json.loads(index.to_json()) == json.loads((whole / "index.json").read_text())


@given(
    starts=st.lists(st.integers(0, 60), unique=True).map(sorted),
    first=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    length=st.integers(1, 30),
)
def test_document_ids_count_the_starts_within_a_row(starts: list[int], first: list[int], length: int) -> None:
    ids = document_ids(np.array(starts, dtype=np.int64), np.array(first), length)
    assert ids.shape == (len(first), length)
    for row, begin in enumerate(first):
        expected = [sum(begin < start <= place for start in starts) for place in range(begin, begin + length)]
        assert ids[row].tolist() == expected
