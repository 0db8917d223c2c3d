"""The suite runs in as many processes as there are processors: one thread each."""

import os

# Read when PyTorch is imported, and by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
