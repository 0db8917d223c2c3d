"""Read what a file of torch.save holds, without running it.

A pickle is a program for a stack machine, which may call any function. This module follows only the
few instructions that build tables of tensors, with tensors as descriptions. Anything else is
refused before torch.load(weights_only=True), which checks again, sees the file.
Instructions: the module `pickletools` of Python.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import SafelightError
from safelight.weights.archive import read_archive
from safelight.weights.check import (
    ITEM_SIZES,
    MAX_DIMS,
    MAX_METADATA,
    MAX_STRING,
    MAX_TENSORS,
    Header,
    TensorInfo,
    refusal,
)

MAX_STEPS = 600_000
"""Instructions of a pickle. Stable Diffusion takes 50,000."""

INERT = tuple(
    f"{package}.callbacks.model_checkpoint.ModelCheckpoint"
    for package in ("pytorch_lightning", "lightning.pytorch")
)
"""Classes whose names the trainer of Stable Diffusion 1 left in its checkpoints; see `tensors`."""

_MAX_DEPTH = 4
_STORAGES = {
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Double": "F64",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
}
_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_UNTYPED = "torch.storage.UntypedStorage"
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of a class or function; it is never imported."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """dtype: None if it is untyped, and `count` is then in bytes."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class BrokenPickleError(Exception):
    """A pickle that is no table of tensors; says why."""


def read_pickled_header(path: Path, name: str) -> Header:
    """Return the checked header of a file that torch.save wrote.

    name: what to call the file in errors. Keys of nested tables are joined by dots; if the file has
    a `state_dict`, only that is read. Short texts and numbers beside the tensors are its metadata.

    Raises SafelightError, one line of at most 200 characters, if the file is anything else, or if
    a tensor does not lie within its bytes in the file.
    """
    archive = read_archive(path, name)
    with refusing(name):
        root = follow(io.BytesIO(archive.pickle))
    return header_of_table(path, name, root, archive.records)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Refuse the file of this name for what is wrong with its pickle."""
    try:
        yield
    except BrokenPickleError as e:
        raise refusal(name, str(e)) from None
    # What pickletools and the stack raise for a broken program.
    except (ValueError, IndexError, KeyError, TypeError, UnicodeError, OverflowError) as e:
        if isinstance(e, SafelightError):
            raise
        raise refusal(name, "a broken pickle; a .safetensors file is needed") from None


def header_of_table(
    path: Path, name: str, root: Any, records: Mapping[str, tuple[int, int]]
) -> Header:
    """Return the header of what a pickle builds. records: as `Archive` has them.

    Raises as `read_pickled_header`.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    try:
        for key, value in leaves(root):
            if key in tensors or key in metadata:
                raise BrokenPickleError(f"{key!r:.60} is there twice")
            if isinstance(value, _Tensor):
                tensors[key] = _placed(value, records)
            elif isinstance(value, str | int | float) and len(str(value)) <= MAX_STRING:
                metadata[key] = str(value)
    except BrokenPickleError as e:
        raise refusal(name, str(e)) from None
    if len(metadata) > MAX_METADATA or len(tensors) > MAX_TENSORS:
        raise refusal(name, f"more than {MAX_TENSORS} tensors, or {MAX_METADATA} texts")
    if not tensors:
        raise refusal(name, "no tensors in it")
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    return Header(path, name, tensors, metadata, "torch")


def leaves(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested tables, with their keys joined by dots.

    If the table has a `state_dict`, only that is read. The keys of a list are its indices, from 0.
    Raises BrokenPickleError for anything but a table, and for tables nested without end.
    """
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        root = root["state_dict"]
    if isinstance(root, list):
        root = {str(place): one for place, one in enumerate(root)}
    if not isinstance(root, dict):
        raise BrokenPickleError("not a table of tensors")
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    taken = 0
    while waiting:
        prefix, table, depth = waiting.pop()
        for key, value in table.items():
            taken += 1
            if taken > 4 * MAX_TENSORS or len(prefix) > MAX_STRING:
                raise BrokenPickleError("tables of tables without end")
            if not isinstance(key, str) or len(key) > MAX_STRING or not _is_text(key):
                continue
            if isinstance(value, dict) and depth < _MAX_DEPTH:
                waiting.append((f"{prefix}{key}.", value, depth + 1))
            else:
                yield f"{prefix}{key}", value


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _placed(tensor: _Tensor, records: Mapping[str, tuple[int, int]]) -> TensorInfo:
    """Return where a tensor lies in the file."""
    storage, itemsize = tensor.storage, ITEM_SIZES[tensor.dtype]
    start, size = records.get(storage.key, (0, -1))
    if size != storage.count * (1 if storage.dtype is None else itemsize):
        raise BrokenPickleError(f"the bytes of storage {storage.key!r:.40} are not all in the file")
    shape, stride = tensor.shape, tensor.stride
    if len(shape) != len(stride) or len(shape) > MAX_DIMS or min((*shape, *stride, 0)) < 0:
        raise BrokenPickleError(f"a tensor of shape {shape!r:.60} and stride {stride!r:.60}")
    count = math.prod(shape)
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else -1
    # With a stride of 0 a few bytes could be read as a tensor of any size.
    if tensor.offset < 0 or (tensor.offset + max(last + 1, count)) * itemsize > size:
        raise BrokenPickleError(f"a tensor of shape {shape!r:.60} is larger than its bytes")
    at = start + tensor.offset * itemsize
    return TensorInfo(tensor.dtype, shape, at, at + count * itemsize)


# --- the stack machine ---------------------------------------------------------------------------


def follow(program: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """Return what a pickle builds, with tensors as descriptions; read up to its end alone.

    storages: given for a file of PyTorch before 1.6; what the pickle names is added by its key.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for name, argument in _instructions(program):
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            stack.append(_Global(_known(argument)))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_popped(stack, int(name[-1]))))
        elif name in ("TUPLE", "SETITEMS", "APPENDS"):
            mark = marks.pop()
            items = stack[mark:]
            del stack[mark:]
            _add(stack, name, items)
        elif name in ("SETITEM", "APPEND"):
            items = _popped(stack, 2 if name == "SETITEM" else 1)
            _add(stack, f"{name}S", items)
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()  # the versions of a network's layers
            if type(stack[-1]) is not dict or not isinstance(state, dict) or set(state) - _STATE:
                raise BrokenPickleError("an object that is no table; convert it to safetensors")
        elif name == "STOP":
            return stack.pop()
        elif argument != 2:  # PROTO's: torch.save writes no other
            raise BrokenPickleError(f"a pickle of protocol {argument}; torch.save writes 2")
    raise BrokenPickleError("a pickle without an end")


def _instructions(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the instructions of a pickle and their arguments; refuse those not followed, unread."""
    for _ in range(MAX_STEPS):
        code = file.read(1)
        if not code:
            return
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise BrokenPickleError(f"a pickle with the instruction {code!r}: no table of tensors")
        if opcode.name == "GLOBAL":
            # Two lines as they are: pickletools would read escapes, which unpicklers do not.
            yield opcode.name, b".".join(file.readline()[:-1] for _ in range(2)).decode()
        else:
            yield opcode.name, None if opcode.arg is None else opcode.arg.reader(file)
    raise BrokenPickleError(f"a pickle of more than {MAX_STEPS} instructions")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_OTHERS = (
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MARK", "GLOBAL", "BINPERSID", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "REDUCE", "BUILD"),
    *("STOP", "PROTO"),
)
_OPCODES = {
    opcode.code.encode("latin-1"): opcode
    for opcode in pickletools.opcodes
    if opcode.name in (*_CONSTANTS, *_LITERALS, *_EMPTY, *_OTHERS)
}
_STATE = {"_metadata"}
_ORDERED = "collections.OrderedDict"
_PARAMETER = "torch._utils._rebuild_parameter"
_REBUILT = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_KNOWN = {
    _ORDERED,
    _PARAMETER,
    *_REBUILT,
    _UNTYPED,
    *INERT,
    *(f"torch.{kind}Storage" for kind in _STORAGES),
    *(f"torch.{dtype}" for dtype in _DTYPES),
}


def _known(name: str) -> str:
    """Return the name of a global; refuse it unless tables of tensors use it."""
    if name not in _KNOWN:
        raise BrokenPickleError(
            f"holds code ({name:.50}), which is not run; have it converted to safetensors"
        )
    return name


def _popped(stack: list[Any], count: int) -> list[Any]:
    """Pop `count` items from the stack and return them, the lowest first."""
    items = [stack.pop() for _ in range(count)]
    return items[::-1]


def _add(stack: list[Any], name: str, items: list[Any]) -> None:
    """Put a list of items on the stack as a tuple, or into the table or list that lies there."""
    if name == "TUPLE":
        stack.append(tuple(items))
    elif name == "APPENDS" and type(stack[-1]) is list:
        stack[-1].extend(items)
    elif name == "SETITEMS" and type(stack[-1]) is dict and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (*_PLAIN, _Global)):
                raise BrokenPickleError("a table whose keys are no names")
            if key in stack[-1]:
                raise BrokenPickleError(f"{key!r:.60} is there twice")
            stack[-1][key] = value
    else:
        raise BrokenPickleError("a pickle that adds to what is no table")


def _storage(told: Any, storages: dict[str, Storage] | None) -> Storage:
    """Return the storage of a persistent id: ("storage", type, key, device, count).

    Before PyTorch 1.6 it ends with the part of another storage that it is, which is not followed.
    """
    *told, view = (*told, None) if storages is None else told
    kind, type_, key, _, count = told
    if view is not None:
        raise BrokenPickleError("a storage within another; convert it to safetensors")
    if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
        raise BrokenPickleError("a storage that torch.save does not write")
    if not isinstance(type_, _Global):
        raise BrokenPickleError("a storage of no type")
    dtype = _STORAGES.get(type_.name.removeprefix("torch.").removesuffix("Storage"))
    if dtype is None and type_.name != _UNTYPED:
        raise BrokenPickleError(f"a storage of type {type_.name:.40}")
    found = Storage(key, dtype, count)
    if storages is not None and storages.setdefault(key, found) != found:
        raise BrokenPickleError(f"storage {key!r:.40} is there in two ways")
    return found


def _called(function: Any, arguments: Any) -> Any:
    """Return what a function would return: an empty table, a tensor, or the tensor it wraps."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise BrokenPickleError("a pickle that calls what is no function")
    given: list[Any] = list(arguments)
    if function.name == _ORDERED and not given:
        return {}
    if function.name == _PARAMETER and len(given) == 3 and isinstance(given[0], _Tensor):
        return given[0]
    if function.name not in _REBUILT:
        raise BrokenPickleError(f"calls {function.name:.50}; have it converted to safetensors")
    if len(given) != (7 if function.name == _REBUILT[1] else 6) or given[5] != {}:
        raise BrokenPickleError("a tensor with more to it than numbers")
    storage, offset, shape, stride = given[:4]
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise BrokenPickleError("a tensor without a storage")
    if not all(type(n) is int for n in (*shape, *stride)):
        raise BrokenPickleError("a tensor whose shape is not of whole numbers")
    dtype = storage.dtype
    if function.name == _REBUILT[1]:
        told = given[6]
        dtype = _DTYPES.get(told.name.removeprefix("torch.")) if isinstance(told, _Global) else None
    if dtype is None:
        raise BrokenPickleError("a tensor of an unknown dtype")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(stride))
