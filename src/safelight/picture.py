"""Read, convert and write pictures: files to PIL and back, tensors to PIL and back.

Files come from strangers. Only PNG, JPEG and WebP are opened, recognised by their bytes. The size
is checked before anything is decoded.
"""

import contextlib
import io
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import ExifTags, Image, ImageChops, PngImagePlugin

from safelight import plain_png
from safelight.bounds import check_structure
from safelight.errors import SafelightError, first_line
from safelight.paths import expanded
from safelight.pixels import as_mask, as_rgb, upright

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""The formats that pictures are written in, by the end of a file's name."""

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
MIN_SIDE = 8
MAX_SIDE = 65_535
"""The most pixels of a side, as in JPEG. Resizing a row of three million pixels takes half a second
and 150 MB for the filter's weights alone.
"""
MAX_COMMENT = 65_000
"""Bytes of text in a JPEG, which holds EXIF in one segment of 64 KiB, other tags included."""


# --- reading -------------------------------------------------------------------------------------


def open_picture(source: str | Path | bytes, what: str = "picture") -> Image.Image:
    """Return a PNG, JPEG or WebP from a file or from bytes; the first frame of an animation.

    The picture is RGB, upright as its EXIF says, transparency laid on white, 16 bits cut to 8;
    colours are taken as sRGB. Raises SafelightError for anything else, for a broken or cut-off
    file, and for a picture of more than MAX_PIXELS pixels (before it is decoded) or with a side
    under 8 or over MAX_SIDE.
    """
    name = name_of(source, what)
    with opened(source, name) as image:
        try:
            image.load()
            return as_rgb(upright(image))
        except Exception as error:  # decoders of broken files raise anything
            raise SafelightError(
                f"{name} is damaged or cut off ({reason(error)}): save or download it again"
            ) from None


def open_mask(source: str | Path | bytes, what: str = "mask") -> Image.Image:
    """Return a mask, read like `open_picture`: mode L, 255 where to repaint and 0 elsewhere."""
    return as_mask(open_picture(source, what))


def opened(source: str | Path | bytes, name: str) -> Image.Image:
    """Return the picture with its header read and its size checked, not yet decoded."""
    if not isinstance(source, bytes):
        source = _read(expanded(source), name)
    check_structure(source, name)
    try:
        with warnings.catch_warnings():
            # Our own limit is lower than the one Pillow warns at.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source), formats=FORMATS)
    except Image.DecompressionBombError:
        raise SafelightError(
            f"{name} must have at most {MAX_PIXELS // 10**6} million pixels: make it smaller"
        ) from None
    except Image.UnidentifiedImageError:
        raise SafelightError(f"{name} must be a PNG, JPEG or WebP picture; it is not") from None
    except Exception as error:  # decoders of broken files raise anything
        raise SafelightError(f"{name} has a damaged header ({reason(error)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise SafelightError(
            f"{name} must have at most {MAX_PIXELS // 10**6} million pixels, "
            f"not {image.width}x{image.height}: make it smaller"
        )
    if max(image.size) > MAX_SIDE:
        raise SafelightError(
            f"{name} must have sides of at most {MAX_SIDE} pixels, "
            f"not {image.width}x{image.height}: cut it into parts"
        )
    if min(image.size) < MIN_SIDE:
        raise SafelightError(
            f"{name} must be at least {MIN_SIDE}x{MIN_SIDE} pixels, "
            f"not {image.width}x{image.height}"
        )
    return image


def _read(path: Path, name: str) -> bytes:
    try:
        status = path.stat()  # before it is opened: opening a pipe waits for a writer
        if stat.S_ISDIR(status.st_mode):
            raise SafelightError(f"{name} is a folder: give the picture's file")
        if not stat.S_ISREG(status.st_mode):
            raise SafelightError(f"{name} must be an ordinary file")
        if status.st_size > MAX_BYTES:
            raise SafelightError(f"{name} must have at most {MAX_BYTES >> 20} MiB")
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, SafelightError):
            raise
        raise SafelightError(f"{name} cannot be read: {reason(error)}") from None


def name_of(source: str | Path | bytes, what: str) -> str:
    return f"the {what}" if isinstance(source, bytes) else f"{what} {_short(source)}"


def _short(path: str | Path) -> str:
    text = str(path)
    return repr(text if len(text) <= 100 else f"…{text[-100:]}")


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error, 80)


# --- tensors -------------------------------------------------------------------------------------


def open_pictures(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures of a request whose settings name them as files; others are left out."""
    from safelight.request_pictures import changed

    def opened_one(setting: str, file: str) -> Image.Image:
        return open_mask(file) if setting == "mask" else open_picture(file, setting)

    return changed(settings, opened_one)


def to_tensor(image: Image.Image) -> "torch.Tensor":
    """Return a picture as float32 [1, C, H, W] in -1…1; C is 3, or 1 for a gray picture."""
    import numpy as np
    import torch

    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))[None] * 2 - 1


def from_tensor(tensor: "torch.Tensor") -> Image.Image:
    """Return the picture of a tensor [1, C, H, W] or [C, H, W] in -1…1; C is 3 (RGB) or 1 (L).

    Values outside are clipped and the rest rounded half to even, as diffusers does. Raises
    SafelightError if a value is NaN or infinite: that is never shown as a black picture.
    """
    import torch

    values = tensor.detach().to("cpu", torch.float32)
    values = values[0] if values.ndim == 4 else values
    if not torch.isfinite(values).all():
        raise SafelightError(
            "the picture has values that are no numbers (NaN): try dtype float32, "
            "or a lower guidance_scale",
            code="not_finite",
        )
    pixels = ((values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Return the largest difference of any channel of any pixel, 0 to 255. Sizes must be equal."""
    if one.size != other.size:
        raise SafelightError(
            f"the pictures have different sizes: {one.width}x{one.height} "
            f"and {other.width}x{other.height}"
        )
    return max(ImageChops.difference(one.convert("RGB"), other.convert("RGB")).tobytes())


# --- writing -------------------------------------------------------------------------------------


def output_paths(out: str | Path, seeds: Sequence[int], *, overwrite: bool = False) -> list[Path]:
    """Return the paths for the pictures of these seeds.

    out: a name that ends in .png, .jpg, .jpeg or .webp, or a folder (one that exists, or a name
    without such an end), for safelight-<seed>.png. Several pictures become name-1.png,
    name-2.png…; `{seed}` in the name is replaced by each picture's seed instead. A name that
    Safelight chooses itself gets the next free number if its file exists.
    """
    path = expanded(out)
    # Path.is_dir raises for a name that is too long.
    folder = os.path.isdir(path)  # noqa: PTH112
    if path.suffix.lower() in SUFFIXES and not folder:
        if "{seed}" in path.name:
            return [path.with_name(path.name.replace("{seed}", str(seed))) for seed in seeds]
        if len(seeds) == 1:
            return [path]
        return [path.with_stem(f"{path.stem}-{i + 1}") for i in range(len(seeds))]
    if (path.suffix or path.name.lower() in SUFFIXES or "{" in path.name or str(out) == "-") and (
        not folder
    ):
        raise SafelightError(
            f"out must be a folder or a name that ends in {', '.join(SUFFIXES)}, not {_short(out)}"
        )
    paths = [path / f"safelight-{seed}.png" for seed in seeds]
    return paths if overwrite else [_free(path) for path in paths]


def _free(path: Path) -> Path:
    free, number = path, 2
    while os.path.lexists(free):
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def check_writable(path: str | Path, *, overwrite: bool = False, need: int = 2**20) -> None:
    """Raise SafelightError if a file of `need` bytes could not be written at path.

    Call it before the work that makes the file. It leaves no trace: missing folders are made by
    `save_whole` alone.
    """
    path = Path(path)
    try:
        # Unlike exists(), this raises for names that no disk takes.
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
            if path.is_dir():
                raise SafelightError(f"{_short(path)} is a folder: give the name of a file in it")
            if not overwrite:
                raise _exists(path)
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        # Only writing tells the truth on a read-only disk, with a quota and as root.
        probe = _temporary(folder / "probe")
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        if isinstance(error, SafelightError):
            raise
        raise _unwritable(path, error) from None
    if free < need:
        raise SafelightError(
            f"{_short(path)} cannot be written: its disk has {free >> 20} MiB free "
            f"and {-(-need >> 20)} are needed"
        )


def encode(
    image: Image.Image, form: str, texts: Mapping[str, str], *, quality: int | None = None
) -> bytes:
    """Return a picture as a file; the same input gives the same bytes.

    form: "PNG", "JPEG" or "WEBP". A PNG holds all texts. The others hold only the text
    `parameters`, as the EXIF comment, and leave it out if it is too long. quality: of JPEG and
    WebP, 0 to 100; None is 95 for JPEG and 90 for WebP.
    """
    buffer = io.BytesIO()
    if form == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)  # tEXt if it is Latin-1, else iTXt, which is UTF-8
        image.save(buffer, "PNG", pnginfo=chunks, compress_level=6)
        return buffer.getvalue()
    exif = Image.Exif()
    comment = b"UNICODE\0" + texts.get("parameters", "").encode("utf-16-be")
    if "parameters" in texts and len(comment) <= MAX_COMMENT:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    usual = {"JPEG": 95, "WEBP": 90}
    image.save(buffer, form, quality=usual[form] if quality is None else quality, exif=exif)
    return buffer.getvalue()


def save_picture(
    image: Image.Image, path: str | Path, texts: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write a picture and its texts in the format of the name's ending (`SUFFIXES`).

    Raises as `save_whole`.
    """
    data = encode(image, SUFFIXES[Path(path).suffix.lower()], texts)
    save_whole(path, lambda file: _write(file, data), overwrite=overwrite)


def save_png(
    image: Image.Image, path: str | Path, texts: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write a picture and its texts as a PNG. Raises as `save_whole`."""
    save_whole(path, lambda file: write_png(file, image, texts), overwrite=overwrite)


def write_png(file: BinaryIO, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write a picture and its texts as a PNG into an opened file."""
    _write(file, encode(image, "PNG", texts))


def write_plain_png(file: BinaryIO, image: Image.Image) -> None:
    """Write a picture of mode RGB or L as a PNG with little memory; the file is larger."""
    for part in plain_png.parts(image):
        _write(file, part)


def save_whole(
    path: str | Path, write: Callable[[BinaryIO], object], *, overwrite: bool = False
) -> None:
    """Write a file, whole or not at all. `write` is called with the opened file.

    The file gets its name only when all of it is on the disk. Raises SafelightError if path
    exists and overwrite is false, even if it came to exist a moment ago, or cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                temporary.replace(path)
            else:
                _place_new(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _unwritable(path, error) from None


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _place_new(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (FAT, some network drives): hold the name with an empty file first.
        path.touch(exist_ok=False)
        temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


HALF = ".safelight-*.part"
"""Files that `save_whole` had not finished when its process was killed."""


def _temporary(path: Path) -> Path:
    return path.with_name(f".safelight-{secrets.token_hex(8)}.part")


def _exists(path: Path) -> SafelightError:
    return SafelightError(
        f"{_short(path)} exists: give another name, or --overwrite (in Python overwrite=True)"
    )


def _unwritable(path: Path, error: Exception) -> SafelightError:
    return SafelightError(f"{_short(path)} cannot be written: {reason(error)}")
