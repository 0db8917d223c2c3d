"""The box around a mask, and what is laid back into it, against diffusers."""

import random

import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageChops, ImageDraw

from safelight.region import Canvas, drawn_mask, drawn_part, filled, fitting, region_of
from safelight.request import Request

SIZES = [(64, 64), (512, 512), (768, 512), (512, 768), (1024, 64)]


def mask_with(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [0, 5, 32, 900])
def test_the_box_is_that_of_diffusers(size: tuple[int, int], padding: int) -> None:
    rng = random.Random(f"{size} {padding}")
    for _ in range(100):
        width, height = rng.randint(1, 300), rng.randint(1, 300)
        left, top = rng.randrange(width), rng.randrange(height)
        box = left, top, rng.randrange(left, width), rng.randrange(top, height)
        mask = mask_with((width, height), box)
        expected = VaeImageProcessor.get_crop_region(mask, *size, pad=padding)
        assert region_of(mask, size, padding) == expected
        found = region_of(mask, size, padding)
        assert 0 <= found[0] < found[2] <= width
        assert 0 <= found[1] < found[3] <= height


def test_a_mask_without_white_is_the_whole_picture() -> None:
    assert region_of(Image.new("L", (30, 20)), (64, 64), 4) == (0, 0, 30, 20)


def test_what_was_painted_is_laid_back_as_by_diffusers() -> None:
    original = Image.effect_noise((120, 90), 80).convert("RGB")
    painted = Image.effect_noise((64, 64), 200).convert("RGB")
    mask = mask_with((120, 90), (40, 30, 59, 49))
    region = region_of(mask, (64, 64), 6)
    expected = VaeImageProcessor(resample="lanczos").apply_overlay(mask, original, painted, region)
    found = Canvas(original, mask, region).with_painted(painted)
    assert ImageChops.difference(found, expected).getextrema() == ((0, 0),) * 3


def test_a_blurred_edge_changes_nothing_beyond_its_reach() -> None:
    original, painted = Image.new("RGB", (120, 90), "white"), Image.new("RGB", (120, 90))
    mask = mask_with((120, 90), (40, 30, 79, 59))
    hard, soft = (Canvas(original, mask, blur=n).with_painted(painted) for n in (0, 4))
    assert hard.getpixel((40, 45)) == (0, 0, 0)
    assert hard.getpixel((39, 45)) == (255, 255, 255)
    assert 0 < soft.getpixel((40, 45))[0] < soft.getpixel((39, 45))[0] < 255  # type: ignore[index]
    assert soft.getpixel((60, 45)) == (0, 0, 0)
    assert soft.crop((0, 0, 24, 90)).getextrema() == ((255, 255),) * 3


def test_a_part_keeps_its_proportions_where_it_cannot_be_widened() -> None:
    """A mask across a wide picture: its part is drawn in the middle, and put back from there."""
    original = Image.effect_noise((200, 60), 80).convert("RGB")
    mask = mask_with((200, 60), (0, 20, 199, 39))
    region = region_of(mask, (64, 64), 0)
    assert region == (0, 0, 200, 60)
    part = fitting(original.crop(region), (64, 64))
    assert part.crop((0, 22, 64, 41)).tobytes() == original.resize((64, 19), 1).tobytes()
    shape = fitting(mask.crop(region), (64, 64))
    assert shape.getbbox() == (0, 28, 64, 35)
    painted = Image.new("RGB", (64, 64), "black")
    painted.paste("red", (0, 22, 64, 41))
    back = Canvas(original, mask, region).with_painted(painted)
    assert back.crop((0, 20, 200, 40)).getcolors() == [(4000, (255, 0, 0))]
    assert back.crop((0, 0, 200, 20)).tobytes() == original.crop((0, 0, 200, 20)).tobytes()


def test_a_filled_mask_has_the_colours_around_it() -> None:
    picture = Image.new("RGB", (200, 100), (255, 0, 0))
    picture.paste((0, 0, 255), (100, 0, 200, 100))
    mask = mask_with((200, 100), (40, 30, 159, 69))
    found = filled(picture, mask)
    assert found.crop((0, 0, 40, 100)).tobytes() == picture.crop((0, 0, 40, 100)).tobytes()
    left, right = found.getpixel((45, 50)), found.getpixel((154, 50))
    assert left[0] > 200 > 60 > left[2]  # type: ignore[index]
    assert right[2] > 200 > 60 > right[0]  # type: ignore[index]
    assert found.getpixel((100, 50))[1] < 20  # type: ignore[index]
    whole = filled(picture, Image.new("L", picture.size, 255))
    assert whole.getcolors() == [(20000, (128, 128, 128))]


def test_a_guide_lies_over_the_picture_and_is_not_enlarged_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be smaller than the picture, of other proportions, and the part at its edge."""
    picture = Image.new("RGB", (900, 600))
    rng = random.Random(3)
    pixels = bytes(rng.randrange(256) for _ in range(60 * 60 * 3))
    guide = Image.frombytes("RGB", (60, 60), pixels).resize((120, 120), Image.Resampling.BICUBIC)
    asked = Request(prompt="a", mask_padding=8, width=96, height=64)
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *how: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *how)  # type: ignore[arg-type]

    for box in ((0, 200, 899, 259), (10, 20, 40, 50), (860, 560, 899, 599)):
        asked = asked.with_pictures(picture, mask_with((900, 600), box), control_image=guide)
        whole = guide.resize(picture.size, Image.Resampling.LANCZOS)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", noted)
            part, region = drawn_part(asked)
        assert region is not None
        assert part.control_image is not None
        expected = fitting(whole.crop(region), (96, 64))
        difference = ImageChops.difference(part.control_image, expected).getextrema()
        assert max(most for _, most in difference) <= 16  # type: ignore[misc]
        assert drawn_mask(asked)[1] == region
        assert drawn_mask(asked)[0].tobytes() == part.mask.tobytes()  # type: ignore[union-attr]
    assert max(width * height for width, height in sizes) <= 96 * 64


def test_a_high_guide_takes_little_memory_on_its_way() -> None:
    picture, mask = Image.new("RGB", (64, 64)), mask_with((64, 64), (0, 0, 63, 63))
    asked = Request(prompt="a", mask_padding=0, width=512, height=512)
    guide = Image.new("RGB", (8, 200_000), "red")
    asked = asked.with_pictures(picture, mask, control_image=guide)
    part = drawn_part(asked)[0].control_image
    assert part is not None
    assert part.getcolors() == [(512 * 512, (255, 0, 0))]


@pytest.mark.parametrize(
    ("side", "blur", "told"),
    [
        (40, 64, "mask_blur 64 leaves 5 % of so small a mask: give a smaller one"),
        (1, 64, "mask_blur 64 leaves 0 % of so small a mask: give a smaller one"),
        (40, 4, None),
        (2, 0, None),
    ],
)
def test_a_blur_that_washes_a_mask_away_is_told(side: int, blur: float, told: str | None) -> None:
    picture, end = Image.new("RGB", (512, 512)), 200 + side - 1
    mask = mask_with(picture.size, (200, 200, end, end))
    asked = Request(prompt="a", mask_padding=8, mask_blur=blur, width=64, height=64)
    asked = asked.with_pictures(picture, mask)
    assert asked.unused_settings() == ([told] if told else [])
    _, region = drawn_mask(asked)
    assert region is not None
    assert region[2] - region[0] < 512  # not the whole picture, as without white
    # Of the whole picture the blur counts at the size that is drawn.
    large = Request(prompt="a", mask_blur=4, width=64, height=64).with_pictures(picture, mask)
    assert len(large.unused_settings()) == 1
    full = Request(prompt="a", mask_blur=blur).with_pictures(
        picture, Image.new("L", (512, 512), 255)
    )
    assert full.unused_settings() == []
