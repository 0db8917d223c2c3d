"""An upscaler's file becomes a network of the library spandrel, which knows its architecture.

spandrel would open the file itself. Here the tensors come from our own checks, and spandrel gets a
table of them. It makes a network of the sizes that they show; `_Bounded` keeps that from taking
more memory than the file accounts for.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from safelight.errors import SafelightError, first_line
from safelight.upscaling.names import MAX_SCALE, MISSING, check_installed
from safelight.weights.check import Header, refusal
from safelight.weights.headers import plain_header_of
from safelight.weights.tensors import is_finite, open_tensors

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

MAX_BYTES = 2 * 2**30
"""The most bytes of an upscaler's tensors. The largest that people use have 0.2 GB."""

_ROOM = 64 * 2**20
_LONG_NUMBER = re.compile(r"\d{5}")
_WRAPPED = ("params_ema.", "params-ema.", "params.", "model_state_dict.")
_PERHAPS = ("module.", "netG.", "model.", "net.", "generator.", "g_ema.")
"""What training programs put before all names. `model.` is a part of ESRGAN's own names, too."""
_PURPOSES = {"FaceSR": "restores faces", "Inpainting": "fills in parts of pictures"}

_importing = threading.Lock()


def load_network(path: Path, name: str | None = None) -> ImageModelDescriptor[Any]:
    """Return the network of an upscaler's file, on the CPU, in float32.

    name: what to call the file in errors.

    Raises SafelightError, one line, if the file is not read (see `header_of`), if spandrel does not
    know its architecture, or if the network does not make a larger picture of one in colour.
    """
    check_installed()
    header = plain_header_of(path, "an upscaler", name)
    if sum(info.end - info.start for info in header.tensors.values()) > MAX_BYTES:
        raise refusal(header.name, f"an upscaler of more than {MAX_BYTES >> 30} GiB")
    if any(_LONG_NUMBER.search(key) for key in header.tensors):
        # Networks count their layers; an architecture is guessed by the largest number.
        raise refusal(header.name, "no upscaler: a name with a number of five digits")
    for key, info in header.tensors.items():
        if 0 in info.shape:  # sizes of networks follow from shapes, and these cost no bytes
            raise refusal(header.name, f"no upscaler: {key!r:.60} has no values")
    # The library reads a table and may add to it.
    tensors = _tensors(header)
    for table in _readings(tensors):
        found = _detected(dict(table), header.name)
        if found is not None:
            return _checked(found, header.name)
    raise refusal(header.name, "not a known upscaler: it fits none of spandrel's architectures")


def _tensors(header: Header) -> dict[str, Tensor]:
    """Return the tensors of a file, floats in float32."""
    found: dict[str, Tensor] = {}
    with open_tensors(header) as read:
        for key in header.tensors:
            tensor = read(key)
            assert isinstance(tensor, Tensor)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32, copy=True)  # not the mapped file's
                if tensor.numel() and not is_finite(tensor, torch.float32):
                    raise refusal(header.name, f"{key!r:.60} has values that are no numbers (NaN)")
            found[key] = tensor
    return found


def _readings(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Yield the tables that a file may mean: its averaged weights, and names without a prefix."""
    for prefix in _WRAPPED:
        inner = _within(tensors, prefix)
        if inner:
            tensors = inner
            break
    yield tensors
    for prefix in _PERHAPS:
        inner = _within(tensors, prefix)
        if len(inner) == len(tensors):
            yield inner


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _detected(table: dict[str, Any], name: str) -> Any:
    """Return the network of a table, None if no architecture fits."""
    spandrel = library()
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in table.values())
    try:
        # Weights are drawn at random before they are filled in: nobody's seed shall change.
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            _Bounded(2 * bytes_ + _ROOM),
        ):
            warnings.simplefilter("ignore")  # of SwinIR's constructor, about meshgrid
            return spandrel.ModelLoader().load_from_state_dict(table)
    except spandrel.UnsupportedModelError:
        return None
    except (SafelightError, MemoryError) as error:
        raise refusal(name, f"no upscaler: {first_line(error)}") from None
    except Exception as error:  # the library raises whatever a misshapen table makes it raise
        told = re.sub(r"\s+", " ", str(error)) or type(error).__name__
        raise refusal(name, f"not a known upscaler: {told}") from None


def _checked(found: Any, name: str) -> Any:
    if found.purpose in _PURPOSES:
        raise refusal(name, f"no upscaler: a network that {_PURPOSES[found.purpose]}")
    if (found.input_channels, found.output_channels) != (3, 3):
        raise refusal(
            name,
            f"reads {found.input_channels} channels and makes {found.output_channels}; "
            "an upscaler of pictures in colour is needed (3 and 3)",
        )
    if not 1 <= found.scale <= MAX_SCALE:
        raise refusal(name, f"enlarges {found.scale} times; 1 to {MAX_SCALE} are possible")
    found.eval()
    found.model.requires_grad_(False)
    return found


class _Bounded(TorchDispatchMode):
    """Refuses to have tensors of more than some bytes at once, before memory is taken.

    What is freed does not count: networks draw their first weights by way of many copies.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._bytes = most, 0
        self._living: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._check(_bytes_of(func, args, kwargs))
        made = func(*args, **kwargs)
        before = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            if storage._cdata not in before:
                self._living.append((StorageWeakRef(storage), storage.nbytes()))
                self._bytes += storage.nbytes()
        self._check(0)
        return made

    def _check(self, asked: int) -> None:
        if self._bytes + asked > self._most:  # looking at all takes time
            self._living = [one for one in self._living if not one[0].expired()]
            self._bytes = sum(bytes_ for _, bytes_ in self._living)
        if self._bytes + asked > self._most:
            raise SafelightError("its network would be far larger than its file")


def _bytes_of(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Return how many bytes an operation's new tensors take, without making them."""
    schema = func._schema
    if schema.is_mutable or any(one.alias_info is not None for one in schema.returns):
        return 0  # in place, or a view
    if any(one.name == "device" for one in schema.arguments):
        kwargs = {**kwargs, "device": "meta"}
    try:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        made = func(*args, **kwargs)
    except Exception:  # its size depends on values, or the operation itself will fail
        shapes = [one.shape for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        sides = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
        return 8 * max(map(len, shapes), default=0) * math.prod(max(*side, 1) for side in sides)
    return sum(storage.nbytes() for storage in _storages(made))


def _storages(found: Any) -> list[torch.UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(found) if isinstance(one, Tensor)]


# --- the library ---------------------------------------------------------------------------------


def library() -> Any:
    """Return spandrel, imported when it is first needed.

    Raises SafelightError, code "not_installed", if it or a library that it needs is not there.
    """
    with _importing:
        try:
            if "spandrel" not in sys.modules:
                with _without_torchvision():
                    import spandrel
            import spandrel
        except ImportError as error:
            why = f"{MISSING} ({first_line(error)})"
            raise SafelightError(why, code="not_installed") from None
        return spandrel


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let spandrel be imported without torchvision.

    Two of its 42 networks name three functions of it, LaMa's and RestoreFormer's, neither of them
    an upscaler. torchvision takes a second to import, and its build for CUDA, which PyPI has, fails
    beside PyTorch's build for CPUs.
    """
    if "torchvision" in sys.modules:
        yield
        return
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: ModuleType(name) for name in names}
    for function in ("InterpolationMode", "rotate", "normalize"):
        setattr(modules[names[2]], function, _absent)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _absent(*_: Any, **__: Any) -> Any:
    raise SafelightError("this network needs torchvision and is no upscaler")
