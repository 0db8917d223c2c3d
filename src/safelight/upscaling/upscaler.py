"""Load an upscaler by name, and enlarge pictures with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.engine.capacity import free_memory, out_of_memory
from safelight.errors import SafelightError, first_line
from safelight.machine import pick_device
from safelight.picture import from_tensor, open_picture
from safelight.pixels import resized
from safelight.progress import get_on
from safelight.upscaling.names import TILE, check_size, passes, scaled
from safelight.upscaling.network import load_network
from safelight.upscaling.tiles import MIN_TILE, Tiled, spans
from safelight.weights.check import refusal
from safelight.weights.digest import digest_file
from safelight.weights.find import find_upscaler

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor


STRIP = 2**20
"""The most pixels that are converted at a time."""


class Upscaler:
    """A network that enlarges pictures.

    name, sha256: of its file. scale: how many times it enlarges. architecture: spandrel's name of
    it. device: where it computes, in float32.
    """

    def __init__(
        self, name: str, sha256: str, network: ImageModelDescriptor[Any], device: torch.device
    ) -> None:
        self.name, self.sha256, self.device = name, sha256, device
        self.scale: int = network.scale
        self.architecture: str = network.architecture.name
        self.parameters = sum(tensor.numel() for tensor in network.model.parameters())
        self._network = network.to(device)
        for block in network.model.modules():  # a watchdog sees that it does not hang
            block.register_forward_pre_hook(_get_on)
        self._whole = network.tiling.name == "INTERNAL"

    @property
    def used(self) -> dict[str, str]:
        """Name and SHA-256, as a recipe has them."""
        return {"name": self.name, "sha256": self.sha256}

    def upscale(
        self,
        picture: Image.Image | str | Path | bytes,
        scale: float | None = None,
        *,
        size: tuple[int, int] | None = None,
        tile: int = TILE,
        on_tile: Callable[[int, int], object] | None = None,
    ) -> Image.Image:
        """Return a picture enlarged, in RGB.

        picture: an image, a file, or a file's bytes. scale: how many times; None: as the network
        does. size: width and height in place of scale. What the network makes is resized to them
        by Lanczos. tile: the most pixels of a tile's side, at least 128; a smaller one takes less
        memory. on_tile: called after each tile with the number of those that are made, and of all.

        Raises SafelightError for a picture that cannot be read, a scale or tile out of bounds, a
        result that would be too large, and if the memory does not suffice.
        """
        if not isinstance(picture, Image.Image):
            picture = open_picture(picture)
        work = self.begin(picture, scale, size=size, tile=tile)
        for made in work:
            if on_tile is not None:
                on_tile(made, work.tiles)
        return work.picture

    def begin(
        self,
        picture: Image.Image,
        scale: float | None = None,
        *,
        size: tuple[int, int] | None = None,
        tile: int = TILE,
    ) -> Enlargement:
        """Return the work of `upscale`, which makes a tile at each step. Raises as it does."""
        if size is None:
            size = scaled(picture.size, self.scale if scale is None else scale)
        if tile < MIN_TILE:
            raise SafelightError(f"tile must be at least {MIN_TILE}, not {tile}")
        return Enlargement(self, picture, size, None if self._whole else tile)

    def call(self, picture: Tensor) -> Tensor:
        """Return a picture of float32 [1, 3, h, w] in 0…1, `scale` times as large.

        Raises SafelightError if the memory does not suffice.
        """
        with self.enough_memory():
            try:
                # Some architectures keep constants of their own; a mode that is left gives
                # normal tensors.
                with torch.inference_mode():
                    return self._network(picture.to(self.device)).float()
            except Exception as error:  # a network may not take a size
                if out_of_memory(error):
                    raise
                size = "x".join(map(str, picture.shape[:1:-1]))
                why = f"cannot enlarge a picture of {size}: {first_line(error)}"
                raise refusal(self.name, why) from None

    @contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Raise SafelightError, code "out_of_memory", if the memory does not suffice inside."""
        try:
            yield
        except Exception as error:
            if isinstance(error, SafelightError) or not out_of_memory(error):
                raise
            free_memory(self.device)
            raise SafelightError(
                f"{self.name} needs more memory than is free: give a smaller tile, or picture",
                code="out_of_memory",
            ) from None


class Enlargement:
    """A picture that is being enlarged, a tile at each iteration, which yields how many are made.

    picture: the result, after the last one. tiles: of all passes of the network.
    """

    def __init__(
        self, upscaler: Upscaler, picture: Image.Image, size: tuple[int, int], tile: int | None
    ) -> None:
        check_size(size)
        self._upscaler, self._size, self._tile = upscaler, size, tile
        self._passes = passes(picture.size, upscaler.scale, size)
        self.picture = picture.convert("RGB")
        self.tiles = sum(
            len(spans(before[0], tile or before[0])) * len(spans(before[1], tile or before[1]))
            for before, _ in self._passes
        )
        self._steps = self._made()

    def __iter__(self) -> Iterator[int]:
        return self._steps

    def _made(self) -> Iterator[int]:
        done, upscaler = 0, self._upscaler
        for _, size in self._passes:
            with upscaler.enough_memory():
                made = _Rows(size)
                pixels = _tensor(self.picture)
            # Bytes become floats tile by tile: a whole picture of floats takes much memory.
            tiled = Tiled(_of_bytes(upscaler.call), pixels, upscaler.scale, made.take, self._tile)
            while tiled.left:
                with upscaler.enough_memory():
                    tiled.step()
                    done += 1
                    if not tiled.left:
                        self.picture = made.picture
                        if done == self.tiles and self.picture.size != self._size:
                            self.picture = resized(self.picture, self._size)
                yield done


class _Rows:
    """A picture that comes as rows of tensors, from the top."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.picture, self._top = Image.new("RGB", size, None), 0

    def take(self, rows: Tensor) -> None:
        """Take the next rows, float32 [1, 3, h, w] in 0…1."""
        for strip in rows.split(max(1, STRIP // rows.shape[-1]), -2):  # conversion makes copies
            self.picture.paste(from_tensor(strip * 2 - 1), (0, self._top))
            self._top += strip.shape[-2]


def load_upscaler(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    models_dir: str | Path | None = None,
    title: str | None = None,
) -> Upscaler:
    """Load an upscaler: Real-ESRGAN, ESRGAN, SwinIR, HAT, DAT, SPAN and others that spandrel knows.

    name: a file (.pth, .safetensors), or a name in the models folder. device: "auto" (CUDA, else
    MPS, else the CPU) or the name of one. models_dir: the models folder, in place of that of
    SAFELIGHT_MODELS. title: what it is called, in place of the file's name.

    Raises SafelightError, one line, if it is not found or not usable, and with the code
    "not_installed" if spandrel is not there.
    """
    where = pick_device(device)
    source = find_upscaler(name, models_dir=models_dir)
    digest = digest_file(source.path)
    network = load_network(source.path, source.path.name)
    if digest_file(source.path).stamp != digest.stamp:
        raise refusal(source.path.name, "it changed while it was read; load it again")
    return Upscaler(title or source.name, digest.sha256, network, where)


def upscaled(
    picture: Image.Image,
    upscaler: Upscaler | None,
    size: tuple[int, int],
    *,
    tile: int = TILE,
    on_tile: Callable[[int, int], object] | None = None,
) -> Image.Image:
    """Return a picture at another size: by an upscaler, or by Lanczos if it is None."""
    if upscaler is None:
        check_size(size)
        return resized(picture, size)
    return upscaler.upscale(picture, size=size, tile=tile, on_tile=on_tile)


def repeated(
    picture: Image.Image,
    done: Sequence[Mapping[str, Any]],
    files: Mapping[str, Path],
    first: Sequence[int] | None,
    device: str,
) -> Image.Image:
    """Return a drawn picture enlarged as its recipe notes.

    done: see `record.checked`. files: of the upscalers, by name. first: the size that a server
    enlarged it to before, if it did.
    """
    if first is not None and list(picture.size) != list(first):
        picture = upscaled(picture, None, (int(first[0]), int(first[1])))
    for one in done:
        size = one["size"][0], one["size"][1]
        path = files.get(one["name"]) if "sha256" in one else None
        upscaler = None if path is None else load_upscaler(path, device=device)
        picture = upscaled(picture, upscaler, size, tile=one.get("tile", TILE))
    return picture


def _get_on(*_: object) -> None:
    get_on()


def _tensor(picture: Image.Image) -> Tensor:
    """Return a picture as uint8 [1, 3, H, W]."""
    return torch.from_numpy(np.array(picture))[None].permute(0, 3, 1, 2)


def _of_bytes(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that takes a picture as uint8. call: takes it as floats in 0…1."""
    return lambda picture: call(picture.contiguous().float() / 255)
