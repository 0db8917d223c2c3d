"""The suite runs in as many processes as there are processors: one thread each."""

import os
import signal

# Read when PyTorch is imported, and by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts something in the background lets it ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
