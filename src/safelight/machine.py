"""What a picture's last bits depend on besides its settings: processor, threads, versions.

The order in which a product's terms are added decides how it is rounded. Libraries choose that
order by instruction set, number of threads and shapes. A recipe records them, so that a difference
between two pictures of one recipe can be explained.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from safelight.errors import SafelightError
from safelight.fast import memory, variant

COMPANY = {"float32": 2, "bfloat16": 64}
"""By how much of 255 a pixel may differ if a picture is drawn in a batch with others, not alone.

About twice the largest difference that was measured on CPUs, because rare pictures differ more than
most: see docs/reliability.md and `tests/soak/company.py`. Other precisions were not measured.
"""

_WORDS = {
    "safelight": "the version of Safelight was",
    "device": "the device was",
    "dtype": "the precision was",
    "instructions": "the instruction set was",
    "processor": "the processor was",
    "threads": "the number of threads was",
    "torch": "the version of PyTorch was",
    "kernels": "the kernels were",
}


def pick_device(name: str | torch.device) -> torch.device:
    """Return a device by its name. Raises SafelightError, with the devices there, for others."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if str(name) == "auto":
        return torch.device(there[0])
    if str(name) not in there:
        known = "only cpu" if there == ["cpu"] else ", ".join(there)
        hint = "" if str(name).split(":")[0] in ("cuda", "mps") else "; a GPU is called cuda or mps"
        raise SafelightError(f"device {str(name)!r:.40} is not there; there is {known}{hint}")
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what decides the last bits of a picture that is drawn on this device now.

    instructions: those that PyTorch uses, and others of this processor for matrix products.
    processor: its architecture, or the name of a GPU. threads: how many share a product. torch:
    PyTorch's version. kernels: the libraries that compute products.
    """
    return {
        "instructions": _instructions(),
        "processor": _processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": variant(device),
    }


def device_memory(device: torch.device) -> int | None:
    """Return the MiB of memory that a device has, None if it does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory >> 20
    return memory.total() >> 20 or None


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    has = torch.cpu.get_capabilities()
    return " ".join(str(has[key]) for key in ("architecture", "cpu_name") if has.get(key))


def _instructions() -> str:
    has = torch.cpu.get_capabilities()
    more = [name for name in ("avx512_bf16", "amx_bf16", "amx_fp16", "bf16") if has.get(name)]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    told = [torch.backends.cpu.get_cpu_capability(), *more]
    return " ".join(told + ([f"limited to {limit}"] if limit else []))


def recorded_machine(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says about how it was drawn; it may be a stranger's recipe.

    The keys are those of `describe_machine`, and `exact`: whether the picture shared no call of
    the network with others. What is missing, or of another type, is left out.
    """
    drawn = recipe.get("drawn")
    kinds = {**dict.fromkeys(_WORDS, str), "threads": int, "exact": bool}
    found = {k: v for k, v in drawn.items() if k in kinds} if isinstance(drawn, dict) else {}
    return {k: v for k, v in found.items() if type(v) is kinds[k] and _short(v)}


def _short(value: Any) -> bool:
    return len(value) <= 200 if isinstance(value, str) else -1 <= value < 2**31


@contextlib.contextmanager
def threads_of(recorded: Mapping[str, Any]) -> Iterator[None]:
    """Draw with as many threads as a recipe says, if this machine has processors for them."""
    before, wanted = torch.get_num_threads(), recorded.get("threads", 0)
    if 1 <= wanted <= max(before, os.cpu_count() or 1):
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what differs between two machines, one phrase each: "… was X, and Y here"."""
    return [
        f"{word} {recorded[key]}, and {here[key]} here"
        for key, word in _WORDS.items()
        if key in recorded and key in here and recorded[key] != here[key]
    ]


def expected_difference(
    recorded: Mapping[str, Any], here: Mapping[str, Any], dtype: str
) -> tuple[int | None, str]:
    """Return by how much of 255 a picture may change if it is drawn again, alone; and why.

    0: not at all. None: no bound is known.
    """
    if not recorded:
        return None, "its recipe does not say what machine it was drawn on"
    apart = differences(recorded, here)
    if apart:
        return None, f"another machine rounds differently: {'; '.join(apart)}"
    if recorded.get("exact", True):
        return 0, "nothing in the recipe explains a difference"
    bound = COMPANY.get(dtype)
    told = "no bound is known" if bound is None else f"at most {bound} of 255 apart"
    return bound, f"it was drawn in company with others in {dtype}, {told}; --exact has none"
