"""What a test needs of the machine."""

import pytest

from safelight.fast import kernels
from tests import emulated_amx


def needs(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test if this processor cannot run a library of kernels, or if it was not built.

    AMX is emulated where that is possible.
    """
    if kernels.lacks(library):
        if library != "amx":
            pytest.skip(f"this processor has no {kernels.lacks(library)}")
        if why := emulated_amx.lacks():
            pytest.skip(why)
        emulated_amx.emulate(monkeypatch)
    if not kernels.built(library):
        pytest.skip("no C++ compiler was there to build the kernels")
