"""The `safelight` command, also as `python -m safelight`."""

import os
import sys

from safelight.threads import before_torch


def main() -> None:
    """Run the command line. Ctrl-C is quiet even during its import."""
    before_torch()
    try:
        from safelight.cli import run
    except KeyboardInterrupt:
        sys.exit(130)
    leave(run(sys.argv[1:]))


def leave(code: int) -> None:
    """End the process at once: an ordinary exit spends half a second on unloading PyTorch.

    Every file is closed by now, and all output has been flushed line by line.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # the reader went away, or the stream was closed
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
