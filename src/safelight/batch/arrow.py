"""Apache Arrow, which Parquet and Ray need and nothing else does."""

from __future__ import annotations

from typing import Any

from safelight.errors import SafelightError


def arrow() -> Any:
    """Return the module pyarrow. Raises SafelightError if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise SafelightError(
            "Parquet needs pyarrow: pip install 'safelight[batch]'", code="not_installed"
        ) from None
    return pyarrow


def parquet() -> Any:
    """Return the module pyarrow.parquet; raises as `arrow`."""
    arrow()
    import pyarrow.parquet

    return pyarrow.parquet
