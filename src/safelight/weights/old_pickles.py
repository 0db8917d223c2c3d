"""Read what a file of PyTorch before 1.6 holds, without running it.

It is five pickles one after the other (a magic number, a version, the numbers of the machine, the
table of tensors, the keys of the storages) and then the storages, each with its length before it.
Many upscalers are such files. Format: `_legacy_save` of torch/serialization.py.
"""

from __future__ import annotations

import io
from pathlib import Path

from safelight.weights.archive import MAX_PICKLE
from safelight.weights.check import ITEM_SIZES, Header, refusal
from safelight.weights.pickles import Storage, follow, header_of_table, refusing

OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""The first two pickles: the number 0x1950a86a20f9469cfc6c, and the version 1001."""

MAX_OLD = 2**30
"""The most bytes of such a file, which cannot be mapped and is read into memory whole."""


def read_old_header(path: Path, name: str) -> Header:
    """Return the checked header of a file that torch.save wrote before PyTorch 1.6.

    As `read_pickled_header`; the storages fill the rest of the file exactly.
    """
    try:
        size = path.stat().st_size
        if size > MAX_OLD:
            why = f"a file of PyTorch before 1.6 of {size} bytes; {MAX_OLD} are the most"
            raise refusal(name, f"{why}: convert it to safetensors")
        with path.open("rb") as file:
            head = io.BytesIO(file.read(MAX_PICKLE))
            head.seek(len(OLD_MAGIC))
            storages: dict[str, Storage] = {}
            with refusing(name):
                machine = follow(head)
                root = follow(head, storages)
                keys = follow(head)
            if not isinstance(machine, dict) or machine.get("little_endian") is not True:
                raise refusal(name, "its numbers are not in little-endian order")
            texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
            if not texts or set(storages) != set(keys):
                raise refusal(name, "its list of storages is not that of its tensors")
            records: dict[str, tuple[int, int]] = {}
            at = head.tell()
            for key in keys:
                storage = storages[key]
                file.seek(at)
                count = int.from_bytes(file.read(8), "little")
                length = count * (1 if storage.dtype is None else ITEM_SIZES[storage.dtype])
                if count != storage.count or key in records or at + 8 + length > size:
                    raise refusal(name, f"the bytes of storage {key!r:.40} are not all in the file")
                records[key] = (at + 8, length)
                at += 8 + length
    except OSError as e:
        raise refusal(name, f"cannot be read ({e.strerror})") from None
    if at != size:
        raise refusal(name, f"{size - at} bytes after the last tensor")
    return header_of_table(path, name, root, records)
