"""Pictures whose structure would keep a decoder busy are refused before they are decoded."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

sys.path.append(str(Path(__file__).parent / "server"))
from hostile import JPEG, NOISE, PICTURES, encoded, exif, riff, with_chunks

from safelight.bounds import orientation
from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.pixels import as_rgb, upright

MANY = 200 if "SAFELIGHT_SOAK" not in os.environ else 20_000


@pytest.mark.parametrize("name", PICTURES)
def test_refused_at_once(name: str) -> None:
    began = time.process_time()
    with pytest.raises(SafelightError) as refusal:
        open_picture(PICTURES[name])
    assert time.process_time() - began < 1
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_turned_as_pillow_turns(turn: int, kind: str) -> None:
    about = Image.Exif()
    about[0x0112] = turn
    picture = NOISE.resize((64, 96))
    data = encoded(picture, kind, exif=about)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        expected = ImageOps.exif_transpose(image).convert("RGB")
        assert upright(image).convert("RGB").tobytes() == expected.tobytes()
    assert open_picture(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("kind", "code"), [(1, "B"), (3, "H"), (4, "I"), (8, "h"), (9, "i")])
def test_an_orientation_of_another_type_is_read_as_by_pillow(
    order: str, kind: int, code: str
) -> None:
    value = struct.pack(order + code, 6).ljust(4, b"\0")
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    about = head + struct.pack(f"{order}H", 1) + entry + b"\0" * 4
    data = encoded(NOISE.resize((64, 96)), "JPEG", exif=b"Exif\0\0" + about)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert open_picture(data).tobytes() == expected.tobytes()
    assert (orientation(about) == 6) == (kind != 1)


def test_no_orientation_in_what_is_no_exif() -> None:
    for data in (b"", b"MM", b"II*\0\xff\xff\xff\xff", b"Exif\0\0", exif(3, 8)[:20]):
        assert orientation(data) == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_strips_are_the_whole_picture(mode: str) -> None:
    """Transparency is laid on white strip by strip, with the same picture as all at once."""
    picture = Image.effect_noise((1100, 2100), 90).convert("RGBA")
    picture.putalpha(Image.effect_noise(picture.size, 90))
    picture = picture.convert(mode) if mode != "P" else picture.convert("RGB").quantize(9)
    if mode == "P":
        picture.info["transparency"] = 3
    whole = Image.alpha_composite(
        Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")
    ).convert("RGB")
    assert as_rgb(picture).tobytes() == whole.tobytes()


SEEDS = [encoded(), JPEG, encoded(kind="WEBP"), encoded(kind="JPEG", progressive=True)]
SEEDS += [riff(b"EXIF", exif(3, 8)), with_chunks()]


@settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=12)), max_size=8),
    cut=st.integers(0, 400),
)
def test_mutants_are_pictures_or_refused(
    seed: bytes, edits: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(seed)
    for at, new in edits:
        at %= len(data)
        data[at : at + len(new)] = new
    began = time.process_time()
    try:
        assert open_picture(bytes(data[: len(data) - cut])).mode == "RGB"
    except SafelightError as refusal:
        told = str(refusal)
    else:
        told = ""
    assert len(told) < 300
    assert time.process_time() - began < 2
