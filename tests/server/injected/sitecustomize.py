"""Makes a worker hang once. A file says where and how, as "finish loops". For test_hung.py.

Python runs a module of this name at its start, in the server's processes, too.
"""

import importlib.abc
import importlib.util
import os
import sys
import threading
from pathlib import Path

FILE = Path(os.environ["SAFELIGHT_TEST_HANG"])


def loops():
    """Loop for ever in Python."""
    while True:
        pass


def computes():
    """Loop for ever over calls of native code."""
    import torch

    a = torch.ones(64, 64)
    while True:
        b = a @ a
        a = b / b.norm()


def waits():
    """Wait for a lock that nobody releases."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


HOW = {one.__name__: one for one in (loops, computes, waits)}


def patch(core):
    for place in ("advance", "finish"):
        setattr(core, place, hanging(place, getattr(core, place)))


def hanging(place, real):
    def call(*given):
        if FILE.exists() and FILE.read_text().split()[0] == place:
            how = FILE.read_text().split()[1]
            FILE.unlink()  # once
            HOW[how]()
        return real(*given)

    return call


class Finder(importlib.abc.MetaPathFinder):
    """Patches the engine when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "safelight.engine.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def execute(module):
            real(module)
            patch(module)

        spec.loader.exec_module = execute
        return spec


sys.meta_path.insert(0, Finder())
