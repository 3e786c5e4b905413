"""What holds for all tests."""

import signal

# Tests press Ctrl-C in processes of their own. A shell has what it runs in the background ignore that, and so would
# these processes, which inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
