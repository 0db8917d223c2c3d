"""How PyTorch's threads wait for one another. This module imports nothing heavy.

OpenMP's threads spin while they wait. Beside another process they so keep off the processor the
very thread they wait for: a picture beside two others took five times as long as alone. Threads
that sleep instead cost next to nothing on a quiet machine.
"""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user may have chosen: then nothing is changed."""


def wait_asleep() -> None:
    """Let waiting threads sleep, in this process and in those that it starts.

    Has an effect only before PyTorch is loaded, as OpenMP reads its settings once.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
