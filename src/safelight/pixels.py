"""Turn and convert decoded pictures, in strips where a whole copy would take much memory."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from PIL import Image

from safelight.bounds import MAX_PROFILE, orientation
from safelight.progress import get_on

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BETWEEN = 2**24
"""The most pixels of the picture between the two passes of a resize, if the original has fewer."""

_XMP = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")


def upright(image: Image.Image) -> Image.Image:
    """Return a decoded picture turned as its EXIF or XMP says; the same one if it need not be."""
    turn = _TURNS.get(_orientation(image.info))
    return image if turn is None else image.transpose(turn)


def _orientation(info: Mapping[Any, Any]) -> int:
    """Return the orientation, 1 to 8. Pillow's function reads all of EXIF, which may be hostile."""
    exif, hexadecimal = info.get("exif"), info.get("Raw profile type exif")
    if not exif and isinstance(hexadecimal, str) and len(hexadecimal) < 2 * MAX_PROFILE:
        with contextlib.suppress(ValueError):  # ImageMagick's: three lines, then the bytes
            exif = bytes.fromhex("".join(hexadecimal.split("\n")[3:]))
    found = orientation(exif) if isinstance(exif, bytes) else 1
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    if found == 1 and (said := _XMP.search(xmp.encode() if isinstance(xmp, str) else xmp)):
        found = int(said[1])
    return found


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB picture: transparency on white, 16 bits cut to 8, no metadata."""
    return rgb_of(image).whole()


def alpha_of(image: Image.Image) -> "Strips | None":
    """Return the alpha channel, mode L; None for a picture without transparency."""
    if not image.has_transparency_data:
        return None
    return Strips("L", image.size, lambda box: image.crop(box).convert("RGBA").getchannel("A"))


def rgb_of(image: Image.Image) -> "Strips":
    """Return a picture as RGB: transparency on white, 16 bits cut to 8."""
    if image.mode.startswith("I"):
        return Strips("RGB", image.size, lambda box: _high_byte(image.crop(box)).convert("RGB"))
    if not image.has_transparency_data:
        return Strips("RGB", image.size, lambda box: image.crop(box).convert("RGB"))

    def on_white(box: tuple[int, int, int, int]) -> Image.Image:
        part = image.crop(box).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")

    return Strips("RGB", image.size, on_white)


class Strips:
    """A picture that is converted strip by strip: a whole copy takes up to four times its memory.

    mode, size: as Pillow has them. strip: returns the part within a box.
    """

    def __init__(
        self,
        mode: str,
        size: tuple[int, int],
        strip: Callable[[tuple[int, int, int, int]], Image.Image],
    ) -> None:
        self.mode, self.size, self.strip = mode, size, strip

    def __iter__(self) -> Iterator[Image.Image]:
        """Yield the strips, from the top."""
        return (self.strip(box) for box in strips(self.size))

    def whole(self) -> Image.Image:
        """Return the whole picture."""
        return joined(self.mode, self.size, iter(self))


def joined(mode: str, size: tuple[int, int], parts: Iterable[Image.Image]) -> Image.Image:
    """Return the picture of the strips that `strips` names."""
    whole = Image.new(mode, size, None)
    for box, part in zip(strips(size), parts, strict=True):
        whole.paste(part, box)
    return whole


def resized(
    image: Image.Image, size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Return a picture at another size.

    Pillow changes the width first: a picture 8 pixels wide and three million high would take 25 GB
    on its way to a width of 2048. If the picture in between would have more pixels than the
    original and than BETWEEN, the height is changed first.
    """
    if size[0] * image.height > max(image.width * image.height, BETWEEN):
        image = image.resize((image.width, size[1]), how)
    return image.resize(size, how)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the middle of a picture. size: its width and height."""
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the boxes of strips of a picture, from the top, of about a million pixels each."""
    width, height = size
    rows = max(1, 2**20 // max(width, 1))
    for top in range(0, height, rows):
        get_on()  # a large picture may take long
        yield 0, top, width, min(top + rows, height)


def as_mask(image: Image.Image) -> Image.Image:
    """Return a new mode L picture of 0 and 255 alone: 255 where image is half white or more."""
    return mask_of(rgb_of(image)).whole()


def mask_of(picture: Strips) -> Strips:
    """Return the mask of a picture; see `as_mask`."""
    table = [0] * 128 + [255] * 128
    return Strips("L", picture.size, lambda box: picture.strip(box).convert("L").point(table))


def picture_sha256(image: Image.Image) -> str:
    """Return the SHA-256 of mode, width, height and the bytes of the pixels."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    digest = hashlib.sha256(head)
    for box in strips(image.size):
        digest.update(image.crop(box).tobytes())
    return digest.hexdigest()


def _high_byte(image: Image.Image) -> Image.Image:
    """Return the high byte of 16-bit gray, as Pillow does for 16-bit colour."""
    if image.mode == "I;16":  # little-endian; numpy is a lot to import in a decoder's process
        return Image.frombytes("L", image.size, image.tobytes()[1::2])
    import numpy as np

    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray((values >> 8).astype(np.uint8))
