"""What holds for all tests."""

import os
import signal

# Processes that share the tests share the processors, too: torch's threads would wait in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests press Ctrl-C in processes of their own. A shell has what it runs in the background ignore that, and so would
# these processes, which inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
