"""Event files: byte for byte what TensorBoard's own writer makes, and readable to its reader where it is installed."""

import importlib.util
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesaic.errors import RunFolderError
from moesaic.telemetry import tensorboard
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.telemetry.raw_file import write_whole
from moesaic.telemetry.tensorboard import EventFile, line_scalars

# tensorboard 2.21: RecordWriter(file).write(Event(wall_time=1000.5, step=300, summary=Summary(value=[
#   Summary.Value(tag="loss", simple_value=2.5), Summary.Value(tag="held_out_by_domain/prose", simple_value=1.25),
# ])).SerializeToString())
GOLDEN = bytes.fromhex(
    "3c00000000000000c8b7a352090000000000448f4010ac022a2e0a0b0a046c6f737315000020400a1f0a1868656c645f6f75745f62795f"
    "646f6d61696e2f70726f7365150000a03ff112494b"
)


def records(path: Path) -> list[bytes]:
    """The records of a file, framing removed."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found


def test_the_bytes_are_those_of_tensorboard(tmp_path):
    with EventFile(tmp_path, first_step=1) as events:
        events.add(300, {"loss": 2.5, "held_out_by_domain/prose": 1.25}, wall_time_s=1000.5)
    (path,) = tmp_path.iterdir()
    assert "tfevents" in path.name
    assert path.read_bytes().endswith(GOLDEN)
    version, start, scalars = records(path)
    assert version.endswith(b"brain.Event:2")
    assert scalars == GOLDEN[12:-4]
    assert start.endswith(bytes([2 << 3, 1, 7 << 3 | 2, 2, 1 << 3, 1]))  # step 1, session_log {status: START}


def test_the_checksum_is_crc_32c():
    """The check value of CRC-32C over "123456789" (RFC 3720, B.4 and every catalogue of CRCs) is e3069283."""
    (masked,) = struct.unpack("<I", tensorboard._masked_crc(b"123456789"))
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0xE3069283


@pytest.mark.parametrize("size", [4, 5, 31, 32, 33, 1000, 5003])
def test_checksums_of_any_size_are_those_of_the_loop_over_bits(size: int):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert tensorboard._crc(data) == crc ^ 0xFFFFFFFF


def test_nothing_is_written_without_scalars_and_files_stand_in_order(tmp_path):
    with EventFile(tmp_path / "board", first_step=1):
        pass
    assert not (tmp_path / "board").exists()
    for step in (1, 2):
        with EventFile(tmp_path / "board", first_step=step) as events:
            events.add(step, {"loss": 1.0})
    first, second = sorted((tmp_path / "board").iterdir())
    assert first.stat().st_mtime_ns <= second.stat().st_mtime_ns


def test_a_line_of_metrics_as_scalars():
    layers = tuple(
        LayerLoad(layer=layer, top_k=1, counts_E=np.array(counts), num_tokens=4000, router_entropy=math.log(2))
        for layer, counts in ((0, [2000, 2000]), (3, [4000, 0]))
    )
    line = {
        "step": 5,
        "loss": 2.0,
        "balance/switch": 1.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "load": StepLoad(step=5, layers=layers).to_json(),
        "held_out_bits_per_byte": 1.75,
        "held_out_by_domain": {"prose": 2.0, "code": 1.5},
    }
    scalars = line_scalars(line)
    assert scalars == line_scalars(line, StepLoad(step=5, layers=layers))
    assert scalars.pop("router/max_violation") == 0.5
    assert scalars.pop("router/layer 3/dead_experts") == 1.0
    assert scalars.pop("router/layer 0/load_entropy") == 1.0
    assert scalars.pop("router/layer 0/router_entropy") == pytest.approx(1.0)
    assert {name: value for name, value in scalars.items() if not name.startswith("router/")} == {
        "loss": 2.0,
        "balance/switch": 1.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "held_out_bits_per_byte": 1.75,
        "held_out_by_domain/prose": 2.0,
        "held_out_by_domain/code": 1.5,
    }
    assert "router/max_violation" not in line_scalars({"step": 1, "loss": 1.0, "load": {"step": 1, "layers": []}})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "board").write_text("a file")
    with (
        pytest.raises(RunFolderError, match=r"cannot write to .*board: .*; free space, or leave out --tensorboard"),
        EventFile(tmp_path / "board", first_step=1) as events,
    ):
        events.add(1, {"loss": 1.0})


def test_what_the_system_takes_in_parts_is_written_whole():
    class Slow:
        taken = b""

        def write(self, data):
            self.taken += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    write_whole(slow, b"a record of 21 bytes.")
    assert slow.taken == b"a record of 21 bytes."


READER = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print([(event.step, event.value) for event in events.Scalars("loss")])
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_it_and_forgets_the_steps_done_again(tmp_path):
    with EventFile(tmp_path, first_step=1) as events:
        for step in (1, 2, 3, 4):
            events.add(step, {"loss": step})
    with EventFile(tmp_path, first_step=3) as events:
        events.add(3, {"loss": 30})
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[(1, 1.0), (2, 2.0), (3, 30.0)]"
