"""Devices, precision and first weights for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn

from safelight.engine.capacity import out_of_memory
from safelight.errors import SafelightError
from safelight.machine import has_bfloat16


@cache
def accelerator() -> Any:
    """Return accelerate's Accelerator, which knows the devices and the other processes."""
    if any(find_spec(name) is None for name in ("accelerate", "tensorboard")):
        raise SafelightError("training needs more: pip install 'safelight[train]'")
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The other processes wait while the first one encodes pictures and draws sheets.
    waits = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(kwargs_handlers=[waits])


@contextmanager
def memory_told() -> Iterator[None]:
    """Turn an error of too little memory into a SafelightError of one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise SafelightError(
            f"{accelerator().device} has too little memory for this training: a smaller --batch "
            "takes less, and so does a smaller --size, which only distil lacks"
        ) from None


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """Return a context: products are bfloat16 if the device has it natively, else float32."""
    device = torch.device(device)
    kind = device.type
    # An older GPU takes bfloat16, too, and emulates it slowly.
    fast = (kind == "cuda" and has_bfloat16(device)) or (
        kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast)


Net = TypeVar("Net", bound=nn.Module)


def initialise(net: Net) -> Net:
    """Zero the last layer of every residual branch and of the net.

    Each block then begins as the identity, and the net predicts zero: training starts smoothly
    (arXiv:2105.05233, appendix).
    """
    for name, parameter in net.named_parameters():
        module = name.rsplit(".", 1)[0]
        if module == "conv_out" or module.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(parameter)
    return net


def compiled(net: nn.Module, wanted: bool) -> Any:
    """Return the net as torch.compile makes it, if wanted, else the net itself.

    Compiling takes minutes. Training is then a third faster on two quiet cores, and no faster on
    one. On a CPU it needs a C++ compiler on the machine, so it is done only if asked for. Raises
    SafelightError if there is no compiler.
    """
    if not wanted:
        return net
    check_compiler()
    return torch.compile(net, dynamic=False)


def check_compiler() -> None:
    """Raise SafelightError if torch.compile lacks the C++ compiler that it needs on a CPU."""
    if accelerator().device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError:
            raise SafelightError(
                "--native needs a C++ compiler: install one (apt-get install g++), or leave it out"
            ) from None
