"""The log: a line of JSON for each record, and nothing in it that a client sent."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback

FIELDS = (
    *("request_id", "address", "method", "route", "status", "seconds", "job", "client"),
    "left_out",
)


class Lines(logging.Formatter):
    """Formats a log record as a line of JSON. None contains a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = without_words(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)


def without_words(error: BaseException) -> str:
    """Return where an exception and its causes were raised, and their types.

    The text of an exception may quote a prompt, as that of a KeyError or of a failed validation
    does. Only the system's messages for its own errors, and names in the code, are kept.
    """
    parts: list[str] = []
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        frames = "".join(traceback.format_tb(one.__traceback__))
        told = ""
        if isinstance(one, OSError) and one.strerror:
            told = f": {one.strerror}"
        elif isinstance(one, AttributeError | NameError | ImportError) and one.name:
            told = f": {one.name[:100]}"
        inner = [without_words(e) for e in getattr(one, "exceptions", ()) if id(e) not in seen]
        parts.append(
            "\n".join([f"{frames}{type(one).__module__}.{type(one).__name__}{told}", *inner])
        )
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\ncaused by\n".join(parts)


def log_to_stderr() -> None:
    """Write all records and exceptions to standard error, as lines of JSON."""
    from safelight.server.limits import Sparing  # imports much that a drawing process does not need

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    handler.addFilter(Sparing())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    log_all_exceptions()


def log_all_exceptions() -> None:
    """Log exceptions that nothing catches, in place of Python's own text on standard error."""

    def of_thread(given: threading.ExceptHookArgs) -> None:
        if given.exc_value is not None:
            logging.getLogger("safelight").error("a thread failed", exc_info=given.exc_value)

    def of_nobody(given: sys.UnraisableHookArgs) -> None:
        if given.exc_value is not None:
            logging.getLogger("safelight").error("an error was ignored", exc_info=given.exc_value)

    threading.excepthook, sys.unraisablehook = of_thread, of_nobody
