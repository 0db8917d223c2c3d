"""The suite runs in several processes of one thread each."""

import os
import signal

# Read when PyTorch is imported, and by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts something in the background lets it ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: who drives a browser or waits for a server leaves one idle."""
    return (os.cpu_count() or 1) + 1
