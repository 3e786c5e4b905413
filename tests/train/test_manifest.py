import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.train.manifest import MANIFEST, damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(200)))
    (tmp_path / "facts.json").write_text('{"step": 4}\n')
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_a_folder_as_it_was_written_has_no_damage(folder):
    assert damage(folder) is None


def test_a_file_that_is_not_listed_is_damage(folder):
    (folder / "weights.safetensors").write_bytes(b"of another step")
    assert damage(folder) == f"{folder / 'weights.safetensors'} is there, and {MANIFEST} does not list it"


def test_a_line_that_was_cut_out_is_damage(folder):
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(lines[1:]))
    assert "does not list it" in str(damage(folder))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_reads_it_too(folder):
    def check():
        command = ["sha256sum", "--strict", "--check", MANIFEST]
        return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode

    assert check() == 0
    (folder / "facts.json").write_text('{"step": 5}\n')
    assert check() != 0


@given(data=st.data())
@settings(max_examples=300)
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "weights.bin").write_bytes(bytes(range(60)))
    (folder / "facts.json").write_text('{"step": 4}\n')
    write_manifest(folder)
    name = data.draw(st.sampled_from(["weights.bin", "facts.json", MANIFEST]))
    content = bytearray((folder / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(content)
    found = damage(folder)
    assert found is not None and "\n" not in found
    assert str(folder) in found
    if name != MANIFEST:
        assert str(folder / name) in found


@pytest.mark.parametrize("name", ["weights.bin", "empty", MANIFEST])
def test_a_file_that_is_gone_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} is missing" in str(damage(folder))


def test_an_emptied_list_is_damage(folder):
    (folder / MANIFEST).write_text("")
    assert damage(folder) == f"{folder / MANIFEST} is empty"
