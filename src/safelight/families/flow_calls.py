"""Calls of networks of flow matching that take texts of one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.families.flow import Rows


def by_length(rows: Rows, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return what `call` returns of all rows, in the shape of rows.x.

    call: of states, timesteps and text states, without what fills up shorter texts. Rows of one
    length share a call.
    """
    import torch

    out = torch.empty_like(rows.x)
    for length in set(rows.lengths):
        here = [i for i, other in enumerate(rows.lengths) if other == length]
        out[here] = call(rows.x[here], rows.timestep[here], rows.tokens[here, :length])
    return out
