"""Help, exit codes, and errors in one line."""

import argparse
import errno
import os
import subprocess
import sys

import pytest

from moesaic.cli import count, main
from moesaic.errors import CheckpointError


@pytest.fixture
def failing_count(monkeypatch):
    """Make `moesaic count x` raise what the test says."""

    def install(error: BaseException) -> None:
        def run(args: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(count, "run", run)

    return install


def test_help_has_a_line_for_every_verb_and_an_example(capsys):
    for arguments in ([], ["--help"]):
        assert main.main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {verb} " in out for verb in main.VERBS)
        assert out.endswith(f"{main.EXAMPLE}\n")


@pytest.mark.parametrize("verb", main.VERBS)
def test_each_help_ends_with_an_example(verb, capsys):
    assert main.main([verb, "--help"]) == 0
    assert capsys.readouterr().out.rstrip().split("\n\n")[-1].startswith(f"example: moesaic {verb}")


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moesaic ")


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["cout"], "did you mean 'count'?"),
        (["--cout"], "unrecognized arguments: --cout; see `moesaic --help`"),
        (["count", "--jsn"], "unrecognized arguments: --jsn; see `moesaic count --help`"),
        (["count", "x", "--context", "many"], "see `moesaic count --help`"),
        (["generate"], "MODEL"),
    ],
)
def test_misuse_is_one_line_and_2(arguments, seen, capsys):
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moesaic: error: ")
    assert captured.err.count("\n") == 1
    assert seen in captured.err


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (CheckpointError("two\nlines"), 2, "moesaic: error: two lines"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "moesaic: error: Permission denied: /x; choose"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "moesaic: error: No space left on device"),
        (MemoryError(), 2, "moesaic: error: out of memory; use a smaller model"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "moesaic: error: out of memory; use a smaller model, a smaller train.batch_size with more",
        ),
        (RuntimeError("shapes cannot be multiplied"), 1, "moesaic: this is a bug in moesaic (RuntimeError"),
        (KeyboardInterrupt(), 130, "moesaic: interrupted"),
        (
            ZeroDivisionError("ouch"),
            1,
            "moesaic: this is a bug in moesaic (ZeroDivisionError: ouch); run it again with",
        ),
    ],
)
def test_failures(failing_count, capsys, error, exit_code, line):
    failing_count(error)
    assert main.main(["count", "x"]) == exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "count", "x"], ["count", "x", "--debug"]])
def test_debug_shows_the_traceback_and_then_the_line(failing_count, capsys, arguments):
    failing_count(CheckpointError("no such file"))
    assert main.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("moesaic: error: no such file\n")


def test_verbose_says_which_kernels(monkeypatch, capsys):
    monkeypatch.setattr(count, "run", lambda args: 0)
    assert main.main(["count", "x", "--verbose"]) == 0
    assert main.main(["--verbose", "count", "x"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kernels: ")]
    assert len(lines) == 2


def test_a_reader_that_hangs_up_is_no_error():
    """The pipe is closed before anything is written."""
    program = "import os, sys; os.dup2(int(sys.argv.pop()), 1); from moesaic.cli.main import main; sys.exit(main())"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "--help", str(write_end)],
        pass_fds=[write_end],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["count", "--help"], ["count", "--all"]])
def test_needs_no_torch(arguments):
    program = (
        "import sys; from moesaic.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit('torch was loaded' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr if done.returncode else "") == (0, "")
