"""The pictures of a request by their settings and by the names that they are stored under."""

import pytest
from PIL import Image

from safelight.batch.check import _told
from safelight.errors import SafelightError
from safelight.picture import open_pictures
from safelight.request import Request
from safelight.request_pictures import (
    INPUTS,
    MAX_PICTURES,
    PICTURES,
    by_input,
    by_setting,
    changed,
    digest_key,
    inputs_in,
    inputs_of,
    setting_of,
)
from safelight.settings import settings_of

RED, BLUE, GRAY = (Image.new("RGB", (64, 64), name) for name in ("red", "blue", "gray"))


def test_the_table_has_all_settings_that_are_pictures() -> None:
    known = {name: one.most for name, one in settings_of(Request).items() if one.kind is None}
    assert known == dict(MAX_PICTURES)


def test_each_picture_has_a_name_of_its_own() -> None:
    assert inputs_of("image") == ("image",)
    assert inputs_of("control_image")[1:] == tuple(f"control_image_{i}" for i in (2, 3, 4))
    assert inputs_of("reference_images")[:2] == ("reference_images", "reference_images_2")
    assert len(INPUTS) == len(set(INPUTS)) == sum(MAX_PICTURES.values())
    assert {setting_of(name) for name in INPUTS} == set(PICTURES)


def test_settings_and_inputs_say_the_same() -> None:
    for settings, names in (
        ({"image": "a", "control_image": "b"}, ["image", "control_image"]),
        ({"control_image": ("a", "b")}, ["control_image", "control_image_2"]),
        ({"reference_images": ("a",)}, ["reference_images"]),
        ({"reference_images": ("a", "b")}, ["reference_images", "reference_images_2"]),
    ):
        found = by_input(settings)
        assert [*found] == names
        assert by_setting(found) == settings
        assert changed(settings, lambda setting, one: one) == settings
    assert changed({"control_image": ["a"], "prompt": "b"}, lambda *both: both) == {
        "control_image": ("control_image", "a")
    }
    assert changed({"reference_images": "a"}, lambda _, one: one) == {"reference_images": ("a",)}
    assert by_input({"image": None, "reference_images": []}) == {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"control_image": [RED] * 5}, "control_image must be 1 to 4 pictures, not 5"),
        ({"control_image": []}, "control_image must be 1 to 4 pictures, not 0"),
        ({"reference_images": [RED] * 11}, "must be a list of at most 10 pictures, not 11"),
    ],
)
def test_more_than_a_setting_may_have_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(SafelightError, match=told) as caught:
        by_input(given)
    assert caught.value.field in given


def test_reference_images_in_python() -> None:
    assert Request(prompt="a", reference_images=None).reference_images == ()
    with pytest.raises(SafelightError, match="must be a list of at most 10 pictures, not 11"):
        Request(prompt="a", reference_images=[RED] * 11)


def test_too_many_files_are_refused_before_one_is_opened() -> None:
    with pytest.raises(SafelightError, match="must be a list of at most 10 pictures, not 11"):
        open_pictures({"reference_images": ["nowhere.png"] * 11})


def test_a_stored_request_has_a_digest_for_each() -> None:
    """The first has the name that a picture alone has, so that recipes stay as they were."""
    alone = Request(prompt="a", control_image=RED, reference_images=BLUE).to_dict()
    asked = Request(prompt="a", control_image=[RED, BLUE], reference_images=[BLUE, GRAY])
    settings = asked.to_dict()
    names = ["control_image", "control_image_2", "reference_images", "reference_images_2"]
    assert inputs_in(settings) == names
    for name in names[::2]:
        assert settings[digest_key(name)] == alone[digest_key(name)]
    again = Request.from_dict(settings, control_image=[RED, BLUE], reference_images=[BLUE, GRAY])
    assert again.to_dict() == settings
    assert asked.replace(reference_images=[RED]).fitted().pictures.keys() == {*names[:3]}
    for given, told in (
        ({"control_image": RED}, "control_image_2 is needed again"),
        ({"control_image": [RED, GRAY]}, "control_image_2 must be the one of SHA-256"),
        ({"control_image": [RED, BLUE, GRAY]}, "control_image_3 was not part of this request"),
    ):
        pictures = {"control_image": [RED, BLUE], "reference_images": [BLUE, GRAY], **given}
        with pytest.raises(SafelightError, match=told) as caught:
            Request.from_dict(settings, **pictures)
        assert caught.value.field == "control_image"


def test_several_pictures_have_bounds_together() -> None:
    large = Image.new("L", (6000, 6000))
    for name in ("control_image", "reference_images"):
        with pytest.raises(SafelightError, match=f"{name} may have 64 million pixels together"):
            Request(prompt="a", **{name: [large, large]})  # type: ignore[arg-type]


def test_a_list_of_one_number_is_the_number_to_a_batch() -> None:
    """An option of the command line is a list, and a batch goes on that began without lists."""
    assert _told({"control_scale": [0.5], "steps": 4}) == {"control_scale": 0.5, "steps": 4}
    assert _told({"control_scale": ["1", 2]}) == {"control_scale": [1.0, 2.0]}
