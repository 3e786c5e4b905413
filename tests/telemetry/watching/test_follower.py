import os

from moesaic.telemetry.watching.follower import Follower, NewLines


def test_a_line_counts_once_and_when_it_ends(tmp_path):
    path = tmp_path / "f"
    follower = Follower(path)
    assert follower.read() == NewLines([], False)
    path.write_bytes(b"one\ntw")
    assert follower.read() == NewLines([b"one"], False)
    assert follower.read() == NewLines([], False)
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert follower.read() == NewLines([b"two", b"three"], False)


def test_what_a_restart_cut_off_is_read_anew(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"step 1\nstep 2\nstep 3\n")
    follower = Follower(path)
    follower.read()
    os.truncate(path, 7)
    assert follower.read() == NewLines([b"step 1"], True)
    # Cut and grown past the old end between two looks.
    path.write_bytes(b"step 1\nSTEP 2, another\nstep 3\n")
    assert follower.read() == NewLines([b"STEP 2, another", b"step 3"], False)
    path.write_bytes(b"step 1\nstep 2, a third one\nstep 3\nstep 4\n")
    assert follower.read() == NewLines([b"step 1", b"step 2, a third one", b"step 3", b"step 4"], True)
    path.unlink()
    assert follower.read() == NewLines([], True)
    assert follower.read() == NewLines([], False)


def test_long_files_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.telemetry.watching.follower._CHUNK_BYTES", 7)
    path = tmp_path / "f"
    lines = [b"x" * size for size in range(40)]
    path.write_bytes(b"\n".join(lines) + b"\nrest")
    assert Follower(path).read() == NewLines(lines, False)
