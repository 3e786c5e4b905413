"""What holds for all tests."""

import os
import signal

# Processes that share the tests share the processors, too: torch's threads would wait in each other's way. Torch
# counts them as it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Tests press Ctrl-C in processes of their own. A shell has what it runs in the background ignore that, and so would
# these processes, which inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compare bits, which a CPU repeats; those that are for a GPU name it.
os.environ["MOESAIC_DEVICE"] = "cpu"

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch finds"))


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What training and bench foretell and measure here is no measurement of the machine: it stays out of its file."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(params=[GPU])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """A GPU; without one the test is skipped."""
    return torch.device(request.param)
