"""The same networks, faster on a CPU.

`accelerate` gives the layers of a loaded network the classes of `layers`, which

- pack each weight once into the order in which it is multiplied;
- leave additions, GELU and its gate to the products that they follow;
- compute the text's keys and values once per prompt;
- make an enlargement and the convolution after it four small convolutions of the small map.

Their products are oneDNN's (`onednn`), or, where the CPU has AMX and the kernels were built, our
own (`tiles`, and `split` for float32); in float32 large convolutions are made of fewer of them
(`winograd`).
docs/performance.md tells what each of these bought.
"""

from __future__ import annotations

import torch
from torch import nn

from safelight.fast import memory, onednn
from safelight.fast.layers import leave_mapped, swap
from safelight.fast.store import Shelf

__all__ = ["accelerate", "helps", "leave_mapped", "native_bfloat16"]


def helps(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a faster way on this device in this precision."""
    return device.type == "cpu" and dtype != torch.float16 and onednn.available()


def accelerate(net: nn.Module, dtype: torch.dtype, low_memory: bool = False) -> None:
    """Make `net`, on the CPU, compute faster and in `dtype`, whatever precision it was loaded in.

    In place. It can then no longer be trained, and its state dict loses what is packed at the
    first call. low_memory: large convolutions' weights are kept in files between their uses.
    """
    memory.keep_freed()
    swap(net, dtype, Shelf() if low_memory else None)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
