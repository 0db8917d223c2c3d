"""What a test needs of the machine."""

import pytest

from safelight.fast import kernels


def needs(library: str) -> None:
    """Skip the test if this processor cannot run a library of kernels, or if it was not built."""
    if kernels.lacks(library):
        pytest.skip(f"this processor has no {kernels.lacks(library)}")
    if not kernels.built(library):
        pytest.skip("no C++ compiler was there to build the kernels")
