"""Loading a model for a command."""

import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.model import Model


def load(name: str, **how: Any) -> "Model":
    """As `safelight.load`, with a Ctrl-C that waits until PyTorch has been imported."""
    import safelight

    with ctrl_c_waits():
        importlib.import_module("torch")
    return safelight.load(name, **how)


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Within it, Ctrl-C is noted, and raised at its end.

    In the middle of PyTorch's import it can meet C++ that does not expect an exception, and aborts.
    """
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt
