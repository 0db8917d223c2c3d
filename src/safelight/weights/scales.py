"""Scales that lie beside the weights of a single file, as ComfyUI writes them for float8."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from safelight.weights.check import Header, refusal

_SCALE = (".scale_weight", ".weight_scale")
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
"""For products in float8, and the name of the type: both are not needed to decode a weight."""

_SCALED, _FLOATS = ("F8_E4M3", "F8_E5M2"), ("F16", "BF16", "F32")
_MARK = re.compile(r"(.*\.)?scaled_fp8")
"""A tensor that says of the network around it that it has scales."""


@dataclass(frozen=True, slots=True)
class Scales:
    """by_weight: the key of each scale, by that of its weight. beside: keys of what is not read."""

    by_weight: dict[str, str]
    beside: frozenset[str]


def read_scales(header: Header) -> Scales:
    """Return where a file has scales.

    Raises SafelightError for one that does not fit its weight: it is one number, or one for each
    row.
    """
    found: dict[str, str] = {}
    beside = {key for key in header.tensors if _MARK.fullmatch(key)}
    for key, info in header.tensors.items():
        module, dot, leaf = key.rpartition(".")
        weight = header.tensors.get(f"{module}.weight")
        if weight is None:
            continue
        if f"{dot}{leaf}" in _SCALE:
            if math.prod(info.shape) not in (1, weight.shape[0] if weight.shape else 1):
                raise refusal(header.name, f"{key!r:.70}: {info.shape} do not scale {weight.shape}")
            if weight.dtype not in _SCALED or info.dtype not in _FLOATS:
                raise refusal(
                    header.name,
                    f"{key!r:.60}: {info.dtype} for {weight.dtype}; floats for float8 are read",
                )
            if f"{module}.weight" in found:
                raise refusal(header.name, f"{module!r:.70} has two scales")
            found[f"{module}.weight"] = key
        elif f"{dot}{leaf}" in _BESIDE:
            beside.add(key)
    return Scales(found, frozenset(beside | set(found.values())))
