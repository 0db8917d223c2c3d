"""Run Safelight's command line beside the server, for work that is no job.

The arguments contain prompts, so they go through standard input: every user of the machine can read
the arguments that a process is started with. The input stays open until the run is to be
interrupted, and closes when the server ends; Windows has no signal for that.
"""

from __future__ import annotations

import _thread
import asyncio
import json
import os
import runpy
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from safelight.request import Request
from safelight.server.settings import WorkerSettings
from safelight.settings import settings_of
from safelight.weights.find import Source


class Command:
    """One run of `safelight …`. `lines` holds its standard error so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process, self._loop = process, asyncio.get_running_loop()
        self.stopped = False
        self.lines = deque[str](maxlen=500)
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, *arguments: str) -> Command:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "safelight.studio.run"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        return cls(process)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def failed(self) -> bool:
        return bool(self._process.returncode) and not self.stopped

    @property
    def last(self) -> str:
        """The last line of its output; if it failed, the reason."""
        return self.lines[-1].removeprefix("safelight: ") if self.lines else "it was stopped"

    async def ended(self) -> bool:
        """Wait for the end and return whether it succeeded."""
        await self._process.wait()
        await self._reader
        return self._process.returncode == 0

    def stop(self) -> None:
        """Interrupt it as Ctrl-C does; a training saves its state. May be called in any thread."""
        self.stopped = True
        assert self._process.stdin is not None
        self._loop.call_soon_threadsafe(self._process.stdin.close)

    def kill(self) -> None:
        if self.running:
            self._process.kill()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            if text:
                self.lines.append(text)


def options(settings: Mapping[str, Any]) -> list[str]:
    """Return settings of a Request as options of the command line, without None and False."""
    known = settings_of(Request)
    found: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        option = known[name].option if name in known else f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        else:
            values = value if isinstance(value, list | tuple) else [value]
            found += [f"{option}={one}" for one in values]
    return found


def model_options(settings: WorkerSettings, source: Source | None = None) -> list[str]:
    """Return the options that load a model on the server's device.

    source: where it is; None for the server's own, with its other autoencoder and its refiner.
    """
    own = source is None
    return options(
        {
            "model": settings.model if own else str(source.path),
            "device": settings.device,
            "dtype": settings.dtype,
            "low_memory": settings.low_memory,
            "models_dir": settings.models_dir,
            "parts": settings.parts if own else None,
            "vae": settings.vae if own else None,
            "refiner": settings.refiner if own else None,
            "controlnet": settings.controlnet if own else None,
            "ip_adapter": settings.ip_adapter if own else None,
            "image_encoder": settings.image_encoder if own else None,
        }
    )


def _interrupt_at_the_end_of_input() -> None:
    """Interrupt this process when its input ends, so that a training saves its state."""
    sys.stdin.read()
    if os.name == "posix":
        os.kill(os.getpid(), signal.SIGINT)  # ends a wait, too
    else:  # there `os.kill` ends the process at once
        _thread.interrupt_main()


if __name__ == "__main__":
    sys.argv[1:] = json.loads(sys.stdin.readline())
    threading.Thread(target=_interrupt_at_the_end_of_input, daemon=True).start()
    runpy.run_module("safelight", run_name="__main__")
