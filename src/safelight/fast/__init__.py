"""The same networks, faster on a CPU.

`accelerate` gives the leaves of a loaded network the classes of `layers`, which

- pack each weight once into the order in which it is multiplied;
- fuse additions into the products before them, and GELU with its gate;
- compute the text's keys and values once per prompt;
- replace upsampling and its convolution by four small convolutions of the small feature map.

Products are oneDNN's (`onednn`), or our own if the CPU has AMX and the kernels were built (`tiles`,
and `split` for float32). Attention, norms and gates (`vectors`) and Winograd's 3×3 convolutions
(`winograd`) are our own: in bfloat16 with AVX512-BF16, in float32 with AVX2. Where oneDNN does not
multiply bfloat16, weights are kept in bfloat16 and multiplied in float32. docs/decisions/0100 says
what each of these gains.

Weights in few bits (`quantised`) are packed like others, or stay as codes to save memory.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from safelight.fast import kernels, memory, onednn, winograd
from safelight.fast.store import Shelf
from safelight.fast.swap import keep_codes, leave_mapped, runs_once, swap, takes_codes

__all__ = [
    "accelerate",
    "helps",
    "keep_codes",
    "missing_kernels",
    "native_bfloat16",
    "remark",
    "runs_once",
    "takes_codes",
    "variant",
]


def helps(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `accelerate` makes a network faster on this device in this precision."""
    return device.type == "cpu" and dtype != torch.float16 and onednn.available()


def accelerate(net: nn.Module, dtype: torch.dtype, low_memory: bool = False) -> None:
    """Make `net`, on the CPU, compute faster and in `dtype`, whatever precision it was loaded in.

    In place. It can then no longer be trained, and its state dict loses the weights that the first
    call packs. A network whose class sets `runs_once` is not packed: its weights stay in their
    file. low_memory: large weights are kept in a file between their uses; results are the same to
    the byte.
    """
    memory.keep_freed()
    if runs_once(net):
        leave_mapped(net, dtype)
    else:
        swap(net, dtype, Shelf() if low_memory else None)


def variant(device: torch.device) -> str:
    """Return the names of the libraries that compute products on this device, joined by "+".

    A picture's last bits depend on them: "onednn", and of ours "amx", "avx512", "portable" and
    "winograd"; or "torch" alone.
    """
    if device.type != "cpu" or not onednn.available():
        return "torch"
    names = [library.variant for library in (kernels.vectors(),) if library is not None]
    if winograd.ready():
        names.append("portable winograd" if kernels.setting() == "portable" else "winograd")
    return "+".join(["onednn", *names])


def native_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32.

    It does with AMX, with AMD's AVX512-BF16, and with ARM's bf16 outside Apple. Intel's
    AVX512-BF16 without AMX has no higher rate than its float32.
    """
    return not bfloat16_doubt()


def bfloat16_doubt() -> str:
    """Return why bfloat16 is not faster than float32 here; "" if it is."""
    if not (onednn.available() and onednn.takes(torch.bfloat16)):
        return "no instructions for bfloat16 that oneDNN uses"
    below = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in below:
        return "ONEDNN_MAX_CPU_ISA forbids instructions for bfloat16"
    has = torch.cpu.get_capabilities()
    if not kernels.lacks("amx") or (has.get("avx512_bf16") and "AMD" in str(has.get("cpu_name"))):
        return ""
    if has.get("bf16") and not torch.backends.mps.is_built():  # an ARM processor, not Apple's
        return ""
    return "bfloat16 has no higher rate than float32 on this processor"


def remark(device: torch.device, dtype: torch.dtype) -> str:
    """Return a sentence about a precision that saves no time on this device, else ""."""
    if device.type != "cpu" or dtype == torch.float32:
        return ""
    if dtype == torch.float16:
        return "float16 is slow on a CPU: --dtype float32 draws the same picture sooner"
    if helps(device, dtype) and not onednn.takes(dtype):
        return (
            "this processor has no instructions for bfloat16: weights are kept in it, which saves "
            "memory, and multiplied in float32"
        )
    return ""


def missing_kernels(device: torch.device) -> str:
    """Return a sentence about kernels that this device could use but that are missing, else ""."""
    if device.type != "cpu" or not onednn.available() or not (names := kernels.missing()):
        return ""
    return (
        f"no compiled kernels ({', '.join(names)}), so pictures take longer: "
        "`safelight doctor` says why"
    )
