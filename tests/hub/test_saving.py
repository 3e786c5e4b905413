"""Weights out: what lies on disk is always a whole checkpoint, the old one or the new one."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moesaic.errors import CheckpointError
from moesaic.families import mixtral
from moesaic.hub import load, save, saving, staging
from moesaic.hub.sources import SafetensorsFolder
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import Piece, check_weight_map


class OneFile:
    """Stands in for a tokenizer."""

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_files(model: Decoder, tmp_path: Path) -> None:
    save(model, tmp_path / "new" / "m", tokenizer=OneFile())
    assert sorted(contents(tmp_path / "new" / "m")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    with safe_open(tmp_path / "new/m/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "new/m/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MixtralForCausalLM"] and config["dtype"] == "float32"


def test_shards_and_their_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values())) and len(shards) > 2
    sizes = []
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118 (no mapping)
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 10_000 for size in sizes if size != 131 * 24 * 4)


def test_a_new_checkpoint_leaves_no_old_weights_and_other_files_alone(model: Decoder, folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("mine", encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    save(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes", "tokenizer.json",
    ]  # fmt: skip
    assert (folder / "notes/a.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]


def fail_at(number: int, error: BaseException, real: Any) -> Any:
    calls = iter(range(1000))

    def write(*args: Any) -> None:
        if next(calls) == number:
            raise error
        real(*args)

    return write


@pytest.mark.parametrize("at", [0, 3])
def test_a_full_disk_leaves_the_old_checkpoint(
    model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before = contents(folder)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(saving, "_write_safetensors", fail_at(at, full, saving._write_safetensors))
    with pytest.raises(CheckpointError, match="No space left on device; what was there is untouched; free") as caught:
        save(model.initialize(seed=9), folder, max_shard_bytes=10_000)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]


@pytest.mark.parametrize("step", ["_sync", "_swap", "_keep_others"])
def test_a_failure_after_writing_leaves_the_old_checkpoint(
    model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = contents(folder)
    monkeypatch.setattr(staging, step, fail_at(0, OSError(errno.EIO, "Input/output error"), None))
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(model, folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]


def test_a_failing_last_rename_is_undone(model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(model, folder)
    assert contents(folder) == before


def test_an_interrupt_leaves_the_old_checkpoint(model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    monkeypatch.setattr(saving, "_write_safetensors", fail_at(0, KeyboardInterrupt(), None))
    with pytest.raises(KeyboardInterrupt):
        save(model, folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root and permission to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_really_full(model: Decoder, small_disk: Path) -> None:
    save(model, small_disk / "m")
    before = contents(small_disk / "m")
    (small_disk / "ballast").write_bytes(b"0" * (256 * 1024 - sum(map(len, before.values())) - 40_000))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(model.initialize(seed=9), small_disk / "m")
    assert contents(small_disk / "m") == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "m"]
    load(small_disk / "m")


def test_places_that_cannot_be_saved_to(model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="file is a file; choose a folder"):
        save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot save to .*File exists"):
        save(model, tmp_path / "file" / "m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds the current folder"):
        save(model, ".")


def test_a_link_to_a_folder_stays_a_link(model: Decoder, folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    save(model.initialize(seed=9), link)
    assert link.is_symlink()
    assert torch.equal(load(folder).embedding.weight, model.embedding.weight)


def test_tensors_of_a_file_in_parts_transposed_and_interleaved(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, expert, attention = slice(None), "layers.0.feed_forward.experts", "layers.0.attention"
    halves = ((slice(0, 7), slice(0, None, 2)), (slice(7, 14), slice(1, None, 2)))
    rows = {"q": slice(0, 24), "k": slice(24, 36), "v": slice(36, 48)}
    fused = {
        f"{expert}.gate_up": tuple(
            Piece("gate_up", (every, own), (every, every, other), transposed=True) for own, other in halves
        ),
        f"{expert}.down": tuple(
            Piece("down", (e,), (slice(7 * e, 7 * e + 7),), transposed=True) for e in range(3)
        ),
    } | {f"{attention}.{name}_proj.weight": (Piece("qkv", file_index=(at,)),) for name, at in rows.items()}  # fmt: skip
    weight_map = mixtral.weight_map(model.config) | fused
    check_weight_map(model.config.tensors(), weight_map)
    monkeypatch.setattr(mixtral, "weight_map", lambda config: weight_map)
    save(model, tmp_path / "fused", max_shard_bytes=5_000)
    with safe_open(SafetensorsFolder(tmp_path / "fused").tensors["gate_up"].file, framework="pt") as file:
        both = file.get_tensor("gate_up")
    assert torch.equal(both[:, :, 1::2].mT, model.state_dict()[f"{expert}.gate_up"][:, 7:])
    for name, tensor in load(tmp_path / "fused").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
