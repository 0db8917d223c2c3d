"""Inpainting around a mask: what of a picture is drawn, and how it is put back, without PyTorch.

A mask covers a small part of a large picture. Drawn within the whole picture, that part gets few
pixels; drawn by itself, at the size that a model draws, it gets all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from PIL import Image, ImageFilter, ImageOps

from safelight.pixels import BETWEEN, resized
from safelight.request_pictures import by_setting, setting_of
from safelight.sizes import size_of

if TYPE_CHECKING:
    from safelight.request import Request

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

INPAINTING = ("mask_padding", "mask_blur", "mask_content")
"""The settings of inpainting beside the mask."""

_RADII = (256, 64, 16, 4, 1)
"""Of the blurs that fill a mask, in pixels: far from its edge only the widest have colours."""


@dataclass(frozen=True)
class Canvas:
    """A picture that is painted in.

    picture, mask: of one size. region: the part that is drawn; None: all of it. blur: radius in
    pixels by which the mask's edge is softened, in both directions.
    """

    picture: Image.Image
    mask: Image.Image
    region: Box | None = None
    blur: float = 0

    def with_painted(self, painted: Image.Image) -> Image.Image:
        """Return the picture with what was painted where the mask is white.

        painted: of the region, at any size. Beyond the reach of `blur` the result equals the
        picture to the byte.
        """
        whole = painted
        if self.region is not None:
            left, top, right, bottom = self.region
            size, whole = (right - left, bottom - top), self.picture.copy()
            inner = painted.crop(_inner(size, painted.size))
            whole.paste(resized(inner, size), (left, top))
        return Image.composite(whole, self.picture, softened(self.mask, self.blur))


def softened(mask: Image.Image, blur: float | tuple[float, float]) -> Image.Image:
    """Return a mask with a soft edge. blur: a radius in pixels, or one for each direction."""
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def drawn_part(request: Request) -> tuple[Request, Box | None]:
    """Return what is drawn of a resolved request, and the box of its picture that this is.

    Without mask_padding, that is the request itself, and None.
    """
    image, (mask, region) = request.image, drawn_mask(request)
    if image is None or mask is None or region is None:
        return request, None
    pictures = {"image": fitting(image.crop(region), mask.size), "mask": mask}
    for name, guide in request.pictures.items():
        if setting_of(name) != "control_image":
            continue
        # It may have another size than the picture, and lies over all of it.
        left, top, right, bottom = region
        box = (
            *(left * guide.width / image.width, top * guide.height / image.height),
            *(right * guide.width / image.width, bottom * guide.height / image.height),
        )
        shape = right - left, bottom - top
        pictures[name] = _fitted(guide, box, shape, mask.size)
    return request.with_pictures(**by_setting(pictures)), region


def drawn_mask(request: Request) -> tuple[Image.Image | None, Box | None]:
    """Return the mask of what is drawn of a resolved request, and the box that `drawn_part` has."""
    image, mask = request.image, request.mask
    if not request.is_cropped or image is None or mask is None:
        return mask, None
    size = request.width or image.width, request.height or image.height
    soft = softened(mask, request.mask_blur)
    if soft.getbbox() is None:  # a wide blur leaves nothing of a small mask
        soft = mask
    region = region_of(soft, size, request.mask_padding or 0)
    return fitting(mask.crop(region), size), region


def region_of(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """Return the box around the white of a mask, in the proportions of `size`.

    mask: mode L. size: width and height at which the box is drawn. padding: pixels around the
    white. The box is widened to the proportions where the picture has room, as in diffusers'
    `get_crop_region`. For a mask without white it is the whole picture.
    """
    white = mask.getbbox()
    if white is None:
        return 0, 0, mask.width, mask.height
    left, top = max(white[0] - padding, 0), max(white[1] - padding, 0)
    right, bottom = min(white[2] + padding, mask.width), min(white[3] + padding, mask.height)
    if (right - left) * size[1] > (bottom - top) * size[0]:
        top, bottom = _widened(top, bottom, (right - left) / (size[0] / size[1]), mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * (size[0] / size[1]), mask.width)
    return left, top, right, bottom


def _widened(first: int, last: int, wanted: float, room: int) -> tuple[int, int]:
    """Return a range of `wanted` length around another, moved or cut to lie within 0..room."""
    more = int(wanted - (last - first))
    first, last = first - more // 2, last + more - more // 2
    if last > room:
        first, last = first - (last - room), room
    if first < 0:
        first, last = 0, min(last - first, room)
    return first, last


def fitting(part: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a part of a picture at a size, in its own proportions.

    Beside it, where a region could not be widened, are its stretched pixels; in a mask, black.
    """
    return _fitted(part, (0, 0, *part.size), part.size, size)


def _fitted(
    picture: Image.Image,
    box: tuple[float, float, float, float],
    shape: tuple[int, int],
    size: tuple[int, int],
) -> Image.Image:
    """Return the part of a picture in a box as `fitting` does. shape: says its proportions."""
    if picture.mode == "L":
        how, whole = Image.Resampling.NEAREST, Image.new("L", size)
    else:
        how, whole = Image.Resampling.LANCZOS, _resized(picture, size, box)
    left, top, right, bottom = _inner(shape, size)
    whole.paste(_resized(picture, (right - left, bottom - top), box, how), (left, top))
    return whole


def _resized(
    picture: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    how: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Return the part of a picture in a box at a size, in as little memory as `pixels.resized`."""
    left, top, right, bottom = box
    if size[0] * (bottom - top) > max(picture.width * picture.height, BETWEEN):
        whole = 0, top, picture.width, bottom
        picture = picture.resize((picture.width, size[1]), how, whole)
        box = left, 0, right, size[1]
    return picture.resize(size, how, box)


def _inner(part: tuple[int, int], size: tuple[int, int]) -> Box:
    """Return where in a picture of `size` a part lies in its own proportions: in the middle."""
    scale = min(size[0] / part[0], size[1] / part[1])
    width, height = (max(1, math.floor(side * scale + 0.5)) for side in part)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return an RGB picture whose masked part has the colours around it, blurred.

    A blur of the rest of the picture is laid into the mask, and on it narrower ones, which have
    colours near the edge alone. A picture that is masked everywhere becomes gray.
    """
    known = Image.composite(Image.new("RGB", picture.size), picture, mask)
    weight, found = ImageOps.invert(mask), Image.new("RGBA", picture.size, "gray")
    for radius in _RADII:
        blur = ImageFilter.GaussianBlur(radius)
        # Colours times their weight are those of a premultiplied picture.
        layer = Image.merge("RGBa", (*known.filter(blur).split(), weight.filter(blur)))
        found.alpha_composite(layer.convert("RGBA"))
    return Image.composite(found.convert("RGB"), picture, mask)


def unused_inpainting(request: Request) -> list[str]:
    """Return warnings about settings of inpainting that do nothing."""
    fields, found = type(request).model_fields, list[str]()
    given = [name for name in INPAINTING if getattr(request, name) != fields[name].default]
    if request.mask is None:
        return [f"{name} does nothing without mask: give one as well" for name in given]
    if "mask_content" in given and request.strength_taken == 1:
        found.append("mask_content does nothing at strength 1: give a lower one as well")
    left = _left_of_mask(request) if request.mask_blur else None
    if left is not None and left < 0.5:
        found.append(
            f"mask_blur {request.mask_blur:g} leaves {100 * left:.0f} % of so small a mask: "
            "give a smaller one"
        )
    return found


def _left_of_mask(request: Request) -> float | None:
    """Return the share of white that the blur leaves where it leaves most; None without white."""
    image, mask, blur = request.image, request.mask, request.mask_blur
    white = None if mask is None else mask.getbbox()
    if image is None or mask is None or white is None:
        return None
    across = down = 1.0
    if not request.is_cropped and (request.width or request.height):
        # The request is not `fitted` yet: the blur counts in pixels of the size to draw.
        width, height = size_of(image.size, request.width, request.height)
        across, down = image.width / width, image.height / height
    # Beyond four radii a blur has no effect: the rest of a large mask need not be blurred.
    reach = math.ceil(4 * blur * across), math.ceil(4 * blur * down)
    left, top, right, bottom = white
    near = (
        *(max(left - reach[0], 0), max(top - reach[1], 0)),
        *(min(right + reach[0], mask.width), min(bottom + reach[1], mask.height)),
    )
    soft = softened(mask.crop(near), (blur * across, blur * down))
    return cast("int", soft.getextrema()[1]) / 255
