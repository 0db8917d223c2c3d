"""Settings of several pictures that guide: in texts, grids, rows and recipes."""

import re
from pathlib import Path

import pytest
from PIL import Image

from safelight.batch.check import Rules
from safelight.batch.rows import Columns
from safelight.compare import Axis, Grid, requests
from safelight.controls import blank, matched
from safelight.errors import SafelightError
from safelight.region import drawn_part
from safelight.request import Request
from safelight.result import Result
from safelight.settings import settings_of

RED = Image.new("RGB", (64, 96), "red")
SCALE = settings_of(Request)["control_scale"]


def test_one_value_of_a_text_is_itself() -> None:
    assert [SCALE.parse(text) for text in ("0.5", "0.5,", "0.5, 0.8", "")] == [
        *(0.5, 0.5),
        (0.5, 0.8),
        "",
    ]
    assert settings_of(Request)["loras"].parse("ink") == ("ink",)
    assert settings_of(Request)["reference_images"].parse("a.png") == ("a.png",)
    array = {"minItems": 1, "maxItems": 4}.items()
    assert array <= SCALE.schema()["anyOf"][1].items()


def test_which_controlnet_a_name_means() -> None:
    """Whole names come before those without folders, and each is taken once."""
    assert matched(["b/Depth", "depth", "", "pose"], ["a/depth", "b/depth", "c"]) == (
        {0: 1, 1: 0},
        [2],
    )


def test_a_sheet_of_scales() -> None:
    axis = Axis.parse("control_scale=0.2,0.9")
    assert axis.labels == ["0.2", "0.9"]
    made = Result([RED], [1], Request(control_scale=[0.5, 0.8]).to_dict(), "m", "0", "cpu", "b")
    assert Grid(Axis("steps", (1,)), None, [[made]]).sheet()


def test_a_grid_of_scales_turns_no_network_on() -> None:
    axis = Axis("control_scale", (0.3, 0.6))
    for base, found in (
        ((0.5, 0), [(0.3, 0), (0.6, 0)]),
        ((0.5, 0.8), [0.3, 0.6]),
        (0, [0.3, 0.6]),
    ):
        (row,) = requests(Request(control_image=[RED, RED], control_scale=base), axis)
        assert [one.control_scale for one in row] == found


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"control_scale": [0.5, 11]}, ", not 11"),
        ({"control_scale": [0.5, "x"]}, ", not 'x'"),
        ({"control_scale": [0.5] * 5}, ", not 5 values"),
        ({"control_scale": 11}, ", not 11"),
        ({"loras": ["ink", 3]}, ", not 3"),
    ],
)
def test_an_error_names_the_value_that_is_wrong(given: dict[str, object], told: str) -> None:
    with pytest.raises(SafelightError, match=f"{re.escape(told)}$"):
        Request(**given)  # type: ignore[arg-type]


def test_a_row_has_numbers_for_its_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        RED.save(tmp_path / name)
    values = {"prompt": "a cat", "control_image": "a.png,b.png", "control_scale": "1,1,1"}
    rules = Rules(folder=tmp_path)
    with pytest.raises(SafelightError, match=r"control_scale has 3 values, and .* 2 pictures"):
        rules.row(1, Columns(1, values, typed=False))
    assert rules.row(1, Columns(1, values | {"control_scale": "1,0.5"}, typed=False))


def test_the_picture_of_a_network_that_is_off_stays_small() -> None:
    """It has no say in the size, and a recipe does not ask for it again."""
    asked = Request(control_image=[blank(), RED], control_scale=[0, 1])
    assert asked.sized_by is asked.pictures["control_image_2"]
    made = asked.replace(width=128, height=192).fitted()
    assert [one.size for one in made.pictures.values()] == [(8, 8), (128, 192)]
    recipe = made.to_dict()
    again = Request.from_dict(recipe, control_image=RED)
    assert again.to_dict() == recipe
    with pytest.raises(SafelightError, match="control_image_2 is needed again"):
        Request.from_dict(Request(control_image=[RED, RED]).to_dict(), control_image=RED)
    photo, mask = Image.new("RGB", (600, 600)), Image.new("L", (600, 600))
    mask.paste(255, (300, 300, 310, 310))
    part, _ = drawn_part(asked.replace(image=photo, mask=mask, mask_padding=0, width=64, height=64))
    assert {one.size for one in part.pictures.values()} == {(64, 64)}


def test_pictures_that_are_set_later_have_bounds_too() -> None:
    large = Image.new("L", (7000, 7000))
    with pytest.raises(SafelightError, match="control_image may have 64 million pixels together"):
        Request().with_pictures(control_image=(large, large))
