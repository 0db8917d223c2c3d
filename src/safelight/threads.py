"""Settings for PyTorch before it is loaded: how many threads it has and how they wait, and how
many compiled primitives oneDNN keeps. This module imports nothing heavy.

OpenMP's threads spin while they wait. If other processes need the processor too, the spinning
threads keep off it the thread that they wait for: a picture beside two others took five times as
long as alone. Threads that sleep at once take a seventh longer for a small picture on a quiet
machine. Threads that spin for some microseconds and then sleep do well in both cases:
docs/performance.md and docs/decisions/0100 have the figures.
"""

import os

from safelight import processors

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user chooses how many threads there are. If one is set, that many are used,
but no more than there are processors: threads that take turns slow each other down."""

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user chooses how threads wait. If one is set, nothing is changed."""

BRIEFLY = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1500"}
"""Threads of GCC's OpenMP spin for this many turns before they sleep; LLVM's sleep at once."""

PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096"
"""A variable and its value: how many compiled primitives oneDNN keeps, of some 100 KB each.

oneDNN compiles one for each shape of a product. A call of `embedded` needs 150, and different ones
for each number of rows. With the default of 1,024, a server whose calls have 2 to 64 rows compiled
most of them again at each call, which took 20 ms."""


def before_torch() -> None:
    """Set how many threads there are, how they wait and how many primitives are kept.

    What the user has set stays, except a number of threads above that of the processors. Has an
    effect only before PyTorch is loaded.
    """
    wait_asleep()
    chosen, most = processors.choose(), processors.cores()
    asked = {name: os.environ[name] for name in COUNTS if name in os.environ}
    if chosen is not None and not asked:
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    for name, count in asked.items():
        if count.isdecimal() and int(count) > most:
            os.environ[name] = str(most)
    os.environ.setdefault(*PRIMITIVES)


def wait_asleep() -> None:
    """Let waiting threads spin briefly and then sleep, in this process and those that it starts.

    Has an effect only before PyTorch is loaded, as OpenMP reads its settings once.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ.update(BRIEFLY)
