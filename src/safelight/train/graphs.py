"""Record a step of training once, as a CUDA graph, and let the GPU repeat it.

A small network's step is a thousand short kernels, and Python needs longer to start them than the
GPU to run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safelight.train.loop import Draw

FIRST = 4
"""Steps before the recording: libraries choose their kernels and the optimizer makes its state."""


class Steps:
    """Does steps of training: the first ones by Python, then from the recording.

    once: does one step without clearing the gradients, and returns its loss. All that it reads
    must stay where it is on the GPU: weights, gradients, data, the learning rate as a tensor. Its
    random numbers come from `noise`, which is seeded anew before each step, and `number` is the
    step's number.
    """

    def __init__(
        self,
        once: Callable[[Draw], Tensor],
        optimizer: torch.optim.Optimizer,
        log: Callable[[str], None],
    ) -> None:
        self._once, self._optimizer, self._log = once, optimizer, log
        self.noise = torch.Generator("cuda")
        self.number = torch.zeros((), dtype=torch.int64, device="cuda")
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None
        self._done, self._fails = 0, False

    def do(self, draw: Draw) -> Tensor:
        """Do one step; returns its loss, which the next step may overwrite."""
        if self._graph is None and self._done >= FIRST and not self._fails:
            self._record(draw)
        self._done += 1
        if self._graph is not None and self._loss is not None:
            self._graph.replay()
            return self._loss
        # On a stream of its own, or the recording would depend on the default stream.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._once(draw)
            self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, draw: Draw) -> None:
        seed = self.noise.initial_seed()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.noise)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._once(draw)
            self._graph = graph
        except RuntimeError as error:
            # Without the recording training is slower, and otherwise the same.
            self._fails = True
            self.noise = draw.noise = torch.Generator("cuda").manual_seed(seed)
            self._optimizer.zero_grad(set_to_none=True)
            self._log(f"the step is not recorded as a CUDA graph: {str(error).splitlines()[0]}")
