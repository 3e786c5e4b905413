"""Files of packed weights: what comes back is what was written, and what is not whole is refused."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moesaic.errors import CheckpointError
from moesaic.hub import packed_files
from moesaic.hub.packed_files import Source, read_packed, source_of, write_packed
from moesaic.kernels import blocks, uneven
from moesaic.kernels.blocks import PackedMatrices, PackedShape
from moesaic.kernels.rounding import round_to_ints

SOURCE = Source("some/model", "0123")
REMEDY = "run `again`"


def matrices() -> dict[str, PackedMatrices]:
    weight = (torch.arange(2 * 34 * 70) % 29 - 14).view(2, 34, 70) / 16
    codes = (weight * 16 + 14).to(torch.uint8) & 15
    exponents = torch.full((2, 34, 3), 120, dtype=torch.uint8)
    fp8 = weight.to(torch.float8_e4m3fn)
    return {
        "fp32": blocks.pack_floats(weight, "fp32"),
        "bf16": blocks.pack_floats(weight, "bf16", paired=True),
        "int8": blocks.pack_ints(*round_to_ints(weight, 8, 64), 8, group=64),
        "int4": blocks.pack_ints(*round_to_ints(weight, 4, 32), 4, group=32, paired=True),
        "mxfp4": blocks.pack_mxfp4(codes, exponents),
        "fp8": blocks.pack_fp8(fp8, torch.ones(2, 34, 1)),
        "none": blocks.pack_floats(weight[:0], "fp32"),
        "uneven4": blocks.pack_uneven4(*uneven.round_to_codes(weight)),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    write_packed(path, matrices(), SOURCE)
    return path


def test_what_was_written_comes_back_mapped(written: Path) -> None:
    found, wanted = read_packed(written, SOURCE, REMEDY), matrices()
    assert found.keys() == wanted.keys()
    for name, packed in found.items():
        assert packed.shape == wanted[name].shape
        assert torch.equal(packed.data, wanted[name].data)
        assert packed.data.data_ptr() % 64 == 0 or not packed.data.numel()
    assert len({packed.data.untyped_storage().data_ptr() for packed in found.values()}) == 1
    found["fp32"].data[0, 0] += 1  # a private page
    assert torch.equal(read_packed(written, SOURCE, REMEDY)["fp32"].data, wanted["fp32"].data)


def test_safetensors_reads_it(written: Path) -> None:
    with safe_open(written, "pt") as file:
        for name, packed in matrices().items():
            assert torch.equal(file.get_tensor(name), packed.data)


def test_no_matrices(tmp_path: Path) -> None:
    write_packed(tmp_path / "none", {}, SOURCE)
    assert read_packed(tmp_path / "none", SOURCE, REMEDY) == {}


def test_bytes_of_a_shape() -> None:
    for packed in matrices().values():
        assert packed.shape.num_bytes == packed.data.shape[1]


def test_the_layout_has_its_version() -> None:
    """A change of these bytes is a new layout: raise LAYOUT_VERSION, then write the new digest here."""
    digest = hashlib.sha256()
    for packed in matrices().values():
        digest.update(packed.data.numpy().tobytes())
    assert (packed_files.LAYOUT_VERSION, digest.hexdigest()[:16]) == (2, "e8d19af035d8d27c")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_that_was_cut_short_is_refused(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = written.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    place = st.one_of(st.integers(0, 16), st.integers(0, header), st.integers(0, len(whole) - 1))
    short = tmp_path / "short"
    short.write_bytes(whole[: data.draw(place)])
    with pytest.raises(CheckpointError, match=r"^[^\n]*short is cut short or damaged; run `again`$"):
        read_packed(short, SOURCE, REMEDY)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_refused_in_one_line(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(written.read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole)
    try:
        found = read_packed(damaged, SOURCE, REMEDY)
    except CheckpointError as error:
        assert str(error).endswith(REMEDY) and "\n" not in str(error)
        return
    for packed in found.values():
        assert packed.data.shape[1] == packed.shape.num_bytes


def changed(path: Path, to: Path, **contents: object) -> Path:
    """A copy whose own entry says something else."""
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    entry = json.loads(header["__metadata__"]["moesaic_packed"]) | contents
    header["__metadata__"]["moesaic_packed"] = json.dumps(entry)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    to.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
    return to


def test_other_versions_and_sources_are_refused(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(CheckpointError, match=r"other is of version 2\.2 and this is 1\.2; run `again`"):
        read_packed(changed(written, other, file_version=2), SOURCE, REMEDY)
    with pytest.raises(CheckpointError, match=r"other is of version 1\.7 and this is 1\.2; run `again`"):
        read_packed(changed(written, other, layout_version=7), SOURCE, REMEDY)
    with pytest.raises(CheckpointError, match="was packed from some/model and not from another; run `again`"):
        read_packed(written, Source("another", "0123"), REMEDY)
    with pytest.raises(CheckpointError, match="was packed from another state of some/model; run `again`"):
        read_packed(written, Source("some/model", "4567"), REMEDY)
    with pytest.raises(CheckpointError, match=r"cannot read .*missing \(No such file or directory\); run `again`"):
        read_packed(tmp_path / "missing", SOURCE, REMEDY)


def test_shapes_that_do_not_fit_are_refused(written: Path, tmp_path: Path) -> None:
    for shapes in ({}, {name: {} for name in matrices()}, [], {"fp32": {"format": "fp32", "outputs": 1, "inputs": 1}}):
        with pytest.raises(CheckpointError, match="cut short or damaged; run `again`"):
            read_packed(changed(written, tmp_path / "other", shapes=shapes), SOURCE, REMEDY)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_packed(path, {}, SOURCE)
    before = path.read_bytes()
    broken = PackedMatrices(
        torch.zeros(1, 128, dtype=torch.uint8, device="meta"), PackedShape(format="fp32", outputs=1, inputs=1)
    )
    with pytest.raises(Exception, match="meta"):
        write_packed(path, {"broken": broken}, SOURCE)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["weights"]
    with pytest.raises(
        CheckpointError, match=r"cannot write .*No such file or directory; free space or choose another"
    ):
        write_packed(tmp_path / "missing" / "weights", {}, SOURCE)


def test_sources_differ_in_their_bytes_and_names(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(10**5))
    second.write_bytes(b"x")
    before = source_of("m", [first, second])
    assert before == source_of("m", [second, first]) and before.name == "m"
    for place in (0, 99_999):
        data = bytearray(10**5)
        data[place] = 1
        first.write_bytes(data)
        assert source_of("m", [first, second]) != before
    first.write_bytes(bytes(10**5 + 1))
    assert source_of("m", [first, second]) != before
    assert source_of("m", [second]) != before
    with pytest.raises(CheckpointError, match=r"cannot read .*missing"):
        source_of("m", [tmp_path / "missing"])
