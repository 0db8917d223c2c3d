"""The header of a weight file, whichever format its bytes are in."""

from __future__ import annotations

from pathlib import Path

from safelight.weights.check import Header, read_header, refusal
from safelight.weights.gguf import MAGIC, read_gguf_header
from safelight.weights.old_pickles import OLD_MAGIC, read_old_header
from safelight.weights.pickles import read_pickled_header

ZIP = b"PK\x03\x04"


def header_of(path: Path, name: str | None = None) -> Header:
    """Return the checked header of a safetensors or GGUF file, or of one that torch.save wrote.

    The kind is decided by the bytes, not by the name. name: what to call the file in errors, if
    not by the last part of its path.

    Raises SafelightError, one line of at most 200 characters, if it is none, or malformed.
    """
    name = name or path.name
    try:
        if not path.is_file():
            raise refusal(name, "not a file; a .safetensors file is needed")
        with path.open("rb") as file:
            head = file.read(len(OLD_MAGIC))
        path = path.resolve()  # a link may lead elsewhere when the tensors are read
    except OSError as e:
        raise refusal(name, f"cannot be read ({e.strerror})") from None
    if head.startswith(ZIP):
        return read_pickled_header(path, name)
    if head == OLD_MAGIC:
        return read_old_header(path, name)
    return read_gguf_header(path, name) if head.startswith(MAGIC) else read_header(path, name)


def plain_header_of(path: Path, user: str, name: str | None = None) -> Header:
    """Return the header of a file whose tensors are plain numbers; see `header_of`.

    user: what they are for, in the refusal of a GGUF file: "a LoRA".
    """
    header = header_of(path, name)
    if header.format == "gguf":
        raise refusal(header.name, f"a GGUF file; {user} needs a .safetensors file")
    return header
