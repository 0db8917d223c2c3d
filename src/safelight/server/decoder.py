"""The process that reads the bytes of strangers, within limits of memory and time.

`decoding.Decoders` starts it and writes calls to its standard input; answers come on its standard
output. Both directions carry JSON and raw bytes only: a decoder that a hostile file has taken over
must not be able to make the server run anything.

A message is the length of a header (4 bytes), the header as JSON, and the bytes it lists.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, BinaryIO

SECONDS = 5
"""The most seconds of processor time for one call."""

MEMORY = 256 << 20
"""The most bytes of address space that a call may add to what the process has at its start."""

MAX_PIXELS = 25_000_000
"""The most pixels of a picture sent over HTTP: the server itself holds it once it is decoded."""

MAX_TOLD = 2 << 20
"""The most bytes of JSON in an answer."""

MAX_BYTES = 4 * MAX_PIXELS
"""The most bytes in a message: a picture and its alpha channel."""


class Sent:
    """Bytes that came with a call. The function that takes them can free them early."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data

    def take(self) -> bytes:
        """Return the bytes; works once."""
        data, self._data = self._data, None
        assert data is not None
        return data


def send(out: BinaryIO, header: dict[str, Any], blobs: Iterator[bytes] | list[bytes]) -> None:
    """Write a message. header: `sizes` has the bytes of each blob; a blob may come in pieces."""
    text = json.dumps(header).encode()
    out.write(len(text).to_bytes(4, "big") + text)
    for blob in blobs:
        out.write(blob)
    out.flush()


def receive(source: BinaryIO) -> dict[str, Any] | None:
    """Return the header of a message, whose blobs follow; None at the end of the stream."""
    length = source.read(4)
    if len(length) < 4:
        return None
    if (told := int.from_bytes(length, "big")) > 2 * MAX_TOLD:
        raise ValueError("too long a header")
    header = json.loads(source.read(told))
    if min(header["sizes"], default=0) < 0 or sum(header["sizes"]) > MAX_BYTES:
        raise ValueError("too many bytes")
    return header


def main() -> None:
    """Answer calls until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keeps what libraries print out of the answers
    from safelight import picture

    picture.MAX_PIXELS = MAX_PIXELS
    _limit_memory()
    while (header := receive(source)) is not None:
        blobs = [Sent(source.read(size)) for size in header["sizes"]]
        _limit_time()
        send(out, *_answer(header, blobs))


def _answer(header: dict[str, Any], blobs: list[Sent]) -> tuple[dict[str, Any], Iterator[bytes]]:
    """Call a function of ours; return the header and the bytes of the answer."""
    from safelight.errors import SafelightError

    try:
        module, _, name = header["function"].partition(":")
        found = getattr(import_module(module), name)(*blobs, **header["keywords"])
        parts = found if isinstance(found, tuple) else (found,)
        told = [_told(part) for part in parts]
        sizes = [entry["size"] for entry in told if "size" in entry]
        answer = {"parts": told, "sizes": sizes}
        if len(json.dumps(answer)) > MAX_TOLD:
            raise SafelightError(f"its text must have at most {MAX_TOLD >> 20} MiB")
        return answer, (piece for part in parts for piece in _bytes(part))
    except SafelightError as error:
        problem = {"message": str(error), "code": error.code, "field": error.field}
    except MemoryError:
        problem = {"message": "", "code": "memory", "field": None}
    except Exception as error:  # our own fault: name its type, quote no input
        problem = {"message": type(error).__name__, "code": "fault", "field": None}
    return {"error": problem, "sizes": []}, iter(())


def _told(part: Any) -> dict[str, Any]:
    from safelight.pixels import Strips

    if isinstance(part, bytes):
        return {"kind": "bytes", "size": len(part)}
    if isinstance(part, Strips):
        (width, height), mode = part.size, part.mode
        size = width * height * len(mode)
        return {"kind": "picture", "mode": mode, "width": width, "height": height, "size": size}
    return {"kind": "json", "value": part}


def _bytes(part: Any) -> Iterator[bytes]:
    from safelight.pixels import Strips

    if isinstance(part, bytes):
        yield part
    elif isinstance(part, Strips):
        for strip in part:
            yield strip.tobytes()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _limit_time() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
