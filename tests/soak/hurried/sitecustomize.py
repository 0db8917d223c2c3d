"""Shortens a fleet's patience, in all of its processes: a lease lasts SAFELIGHT_TEST_LEASE seconds.

Python runs a module of this name at its start. fleet.py uses it.
"""

import importlib.abc
import importlib.util
import os
import sys

LEASE = float(os.environ["SAFELIGHT_TEST_LEASE"])
PATCHES = {
    "safelight.server.claims": {"LEASE": LEASE},
    "safelight.server.roster": {"GONE": LEASE, "BEAT": LEASE / 4},
}


class Finder(importlib.abc.MetaPathFinder):
    """Patches modules as they are imported."""

    def __init__(self):
        self.left = dict(PATCHES)

    def find_spec(self, name, path, target=None):
        if name not in self.left:
            return None
        patches = self.left.pop(name)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def execute(module):
            real(module)
            vars(module).update(patches)

        spec.loader.exec_module = execute
        return spec


sys.meta_path.insert(0, Finder())
