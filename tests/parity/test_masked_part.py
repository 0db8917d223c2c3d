"""Inpainting that draws the part around the mask alone: against diffusers, and by parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw

from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.explain.watch import watch
from safelight.region import filled, fitting, region_of, softened
from safelight.request import Request
from tests.parity.test_pictures import NEGATIVE, PIXELS, PROMPT, ours, theirs

SIDES = 200, 152
"""No multiples of 8 need to be drawn: only the part is."""


def photo(size: tuple[int, int] = SIDES) -> Image.Image:
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def spot(box: tuple[int, int, int, int] = (60, 50, 91, 81)) -> Image.Image:
    mask = Image.new("L", SIDES)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


ASKED: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0}


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("padding", [16, 48])
def test_as_by_diffusers(folders: dict[str, Path], strength: float, padding: int) -> None:
    """The box is 64 or 128 pixels wide, and drawn at 64 or 128: enlarged, so that no rounding of
    a resized mask decides."""
    pipe = theirs(folders["sd1"], "StableDiffusionInpaintPipeline")
    side = 128
    expected = pipe(
        **ASKED,
        image=photo(),
        mask_image=spot(),
        padding_mask_crop=padding,
        width=side,
        height=side,
        strength=strength,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    result = ours(folders["sd1"]).generate(
        **ASKED,
        image=photo(),
        mask=spot(),
        mask_padding=padding,
        width=side,
        height=side,
        strength=strength,
        steps=5,
        seed=7,
    )
    [found] = result.images
    assert found.size == SIDES
    difference = np.asarray(ImageChops.difference(found, expected))
    assert difference.max() <= PIXELS
    assert not difference[np.asarray(spot()) == 0].any()
    assert found.tobytes() != photo().tobytes()


@pytest.mark.parametrize("blur", [0, 3])
def test_it_is_inpainting_of_the_part(folders: dict[str, Path], blur: float) -> None:
    model = ours(folders["sd1"])
    asked: dict[str, Any] = {**ASKED, "width": 96, "height": 64, "steps": 3, "seed": 1}
    asked |= {"strength": 0.7, "sampler": "euler_a"}
    whole = model.generate(image=photo(), mask=spot(), mask_padding=4, mask_blur=blur, **asked)
    region = region_of(softened(spot(), blur), (96, 64), 4)
    part = model.generate(
        image=fitting(photo().crop(region), (96, 64)),
        mask=fitting(spot().crop(region), (96, 64)),
        **asked,
    )
    # Inside the part's own hard mask both are painted alike; the edge is blended.
    left, top, right, bottom = region
    small = whole.images[0].crop(region)
    assert small.size == (right - left, bottom - top)
    inside = np.asarray(spot((68, 58, 83, 73)).crop(region)) == 255
    laid = fitting(part.images[0], small.size)
    close = np.abs(np.asarray(small).astype(int) - np.asarray(laid).astype(int))[inside]
    assert close.max() <= 2


@pytest.mark.parametrize("content", ["fill", "noise", "nothing"])
def test_what_the_part_begins_with(folders: dict[str, Path], content: str) -> None:
    model = ours(folders["sd1"])
    asked: dict[str, Any] = {**ASKED, "width": 64, "height": 64, "steps": 4, "seed": 2}
    asked |= {"strength": 0.5, "sampler": "euler", "mask_padding": 16}
    own = model.generate(image=photo(), mask=spot(), **asked)
    other = model.generate(image=photo(), mask=spot(), mask_content=content, **asked)
    outside = np.asarray(spot()) == 0
    assert own.images[0].tobytes() != other.images[0].tobytes()
    assert np.array_equal(np.asarray(other.images[0])[outside], np.asarray(photo())[outside])
    if content == "fill":  # the same as a picture that is filled beforehand
        region = region_of(spot(), (64, 64), 16)
        part, mask = photo().crop(region), spot().crop(region)
        before = photo()
        before.paste(filled(part, mask), region[:2])
        again = model.generate(image=before, mask=spot(), **asked)
        box = spot().getbbox()
        assert again.images[0].crop(box).tobytes() == other.images[0].crop(box).tobytes()


def test_the_model_s_own_size_is_drawn_unless_one_is_asked_for(folders: dict[str, Path]) -> None:
    model = ours(folders["sd1"])
    large = photo((3000, 2000))
    mask = Image.new("L", large.size)
    mask.paste(255, (100, 100, 220, 200))
    result = model.generate("a cat", image=large, mask=mask, mask_padding=8, steps=2, seed=1)
    assert result.images[0].size == (3000, 2000)
    assert (result.settings["width"], result.settings["height"]) == model.native_size
    with pytest.raises(SafelightError, match="image is 3000x2000; sides must be"):
        model.generate("a cat", image=large, mask=mask, steps=2, seed=1)


def test_others_share_its_call(folders: dict[str, Path]) -> None:
    model = ours(folders["sd1"])
    engine = Engine(model, exact=False, rows=8)
    asked = Request(
        prompt="a cat", image=photo(), mask=spot(), mask_padding=4, width=64, height=64, steps=3
    )
    engine.add(asked, "part")
    engine.add(Request(prompt="a dog", width=64, height=64, steps=3), "whole")
    sizes: dict[str, tuple[int, int]] = {}
    while engine.busy:
        for ticket in engine.step()[1]:
            assert ticket.image is not None
            sizes[ticket.tag] = ticket.image.size
    assert sizes == {"part": SIDES, "whole": (64, 64)}


def test_its_story_is_told(folders: dict[str, Path]) -> None:
    asked = Request(
        prompt="a cat", image=photo(), mask=spot(), mask_padding=4, width=64, height=64, steps=2
    )
    story = watch(ours(folders["sd1"]), asked)
    assert story.picture.size == SIDES
    assert {moment.clean.size for moment in story.moments} == {(64, 64)}


def test_settings_that_do_nothing_are_named() -> None:
    told = Request(prompt="a", mask_padding=4, mask_blur=2.0, mask_content="noise")
    assert told.unused_settings() == [
        "mask_padding does nothing without mask: give one as well",
        "mask_blur does nothing without mask: give one as well",
        "mask_content does nothing without mask: give one as well",
    ]
    full = Request(prompt="a", image=photo(), mask=spot(), mask_content="noise")
    [line] = full.unused_settings()
    assert line == "mask_content does nothing at strength 1: give a lower one as well"


def test_a_mask_without_white_changes_nothing(folders: dict[str, Path]) -> None:
    model = ours(folders["sd1"])
    empty = Image.new("L", SIDES)
    result = model.generate(
        "a cat", image=photo(), mask=empty, mask_padding=4, width=64, height=64, steps=1, seed=1
    )
    assert result.images[0].tobytes() == photo().tobytes()
    assert "mask has no white: nothing of the picture is repainted" in result.warnings
