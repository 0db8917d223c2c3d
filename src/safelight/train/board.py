"""The curves and sheets of a training, as TensorBoard reads them."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelight.errors import SafelightError
from safelight.train.export import writing

_COUNT = count()
"""Two files of one process have different names, also within a second."""


class Board:
    """Writes a file of TensorBoard's events in a folder.

    start: the step that the run goes on from. What an earlier run wrote after it is hidden.

    PyTorch's SummaryWriter writes in a thread of its own, whose errors are tracebacks. Here each
    event is in the file once the call returns. Raises SafelightError if it cannot be written.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        proto: Any = event_pb2
        self._folder, self._event = folder, proto.Event
        name = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"events.out.tfevents.{name}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=start + 1, session_log=proto.SessionLog(status=proto.SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a point of a curve."""
        from torch.utils.tensorboard.summary import scalar

        self._write(step=step, summary=scalar(name, value))

    def add_image(self, name: str, image: Image.Image, step: int) -> None:
        """Write a picture."""
        from torch.utils.tensorboard.summary import image as summary

        self._write(step=step, summary=summary(name, np.asarray(image), dataformats="HWC"))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what could not be written was told; closing tries again
            self._file.close()

    def _write(self, **values: Any) -> None:
        event = self._event(wall_time=time.time(), **values).SerializeToString()
        try:
            with writing(self._folder):
                self._records.write(event)
                self._file.flush()
        except SafelightError:
            self.close()
            raise
