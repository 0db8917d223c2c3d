import io
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from safelight.errors import SafelightError
from safelight.picture import (
    check_writable,
    encode,
    from_tensor,
    largest_difference,
    open_mask,
    open_picture,
    output_paths,
    save_picture,
    save_png,
    to_tensor,
)
from safelight.pixels import as_rgb, picture_sha256, resized

LANCZOS = Image.Resampling.LANCZOS


def noise(width=16, height=8, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunks(*chunks):
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        crc = zlib.crc32(kind + data)
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc))
    return b"".join(parts)


def png_of_size(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_chunks((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))


class TestOpenPicture:
    def test_png_keeps_every_pixel(self, tmp_path):
        pixels = noise()
        path = tmp_path / "a.png"
        Image.fromarray(pixels).save(path)
        picture = open_picture(path)
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), pixels)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
    def test_other_formats(self, kind):
        picture = open_picture(encoded(Image.new("RGB", (16, 8), (200, 30, 90)), kind, quality=95))
        assert picture.size == (16, 8)
        assert np.abs(np.asarray(picture).astype(int) - (200, 30, 90)).max() <= 6

    @pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
    def test_foreign_formats_are_refused_under_any_name(self, kind, tmp_path):
        path = tmp_path / "picture.png"
        path.write_bytes(encoded(Image.new("RGB", (16, 16)), kind))
        with pytest.raises(SafelightError, match=r"must be a PNG, JPEG or WebP"):
            open_picture(path)

    @pytest.mark.parametrize("data", [b"", b"\x89PNG", b"<svg xmlns='x'/>", b"\0" * 100])
    def test_what_is_no_picture_is_refused(self, data):
        with pytest.raises(SafelightError, match=r"^the mask "):
            open_picture(data, "mask")

    @pytest.mark.parametrize(
        "size", [(65535, 65535), (8001, 8000), (20000, 20000), (10, 2**31 - 1)]
    )
    def test_bombs_are_refused_before_they_are_decoded(self, size, monkeypatch):
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        with pytest.raises(SafelightError, match="64 million pixels"):
            open_picture(png_of_size(*size))

    @pytest.mark.parametrize("size", [(8, 65_536), (65_536, 8)])
    def test_a_side_that_takes_half_a_second_to_resize_is_refused(self, size):
        with pytest.raises(SafelightError, match="sides of at most 65535 pixels"):
            open_picture(png_of_size(*size))

    @pytest.mark.parametrize("size", [(0, 16), (16, 0), (1, 1), (7, 100)])
    def test_nothing_to_see_is_refused(self, size):
        with pytest.raises(SafelightError):
            open_picture(png_of_size(*size))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_a_cut_file_is_refused_or_complete(self, kind):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(Image.fromarray(noise(24, 24)), kind, **options)
        whole = open_picture(data).tobytes()
        refused = 0
        for length in range(len(data)):
            try:
                assert open_picture(data[:length]).tobytes() == whole
            except SafelightError:
                refused += 1
        assert refused >= len(data) - 20

    @settings(max_examples=200, deadline=None)
    @given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
    def test_a_damaged_file_is_read_or_refused_in_one_line(self, at, byte):
        data = bytearray(encoded(Image.fromarray(noise(16, 16, 4))))
        data[at % len(data)] = byte
        message = ""
        try:
            open_picture(bytes(data))
        except SafelightError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1
        assert len(message) <= 200

    def test_text_bomb_is_refused(self):
        header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
        bomb = b"k\0\0" + zlib.compress(b"a" * 2**24)
        pixels = zlib.compress(b"\0" * 17 * 16)
        data = png_chunks((b"IHDR", header), (b"zTXt", bomb), (b"IDAT", pixels), (b"IEND", b""))
        with pytest.raises(SafelightError):
            open_picture(data)

    def test_exif_rotation_is_applied(self):
        upright = Image.new("RGB", (32, 16), "black")
        upright.paste("white", (0, 0, 16, 16))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        picture = open_picture(encoded(upright, "JPEG", exif=exif.tobytes(), quality=95))
        assert picture.size == (16, 32)
        assert picture.getpixel((8, 4))[0] > 240
        assert picture.getpixel((8, 28))[0] < 15

    def test_transparency_is_laid_on_white(self):
        rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        rgba.putpixel((0, 0), (255, 0, 0, 255))
        rgba.putpixel((1, 0), (0, 0, 0, 128))
        picture = open_picture(encoded(rgba))
        assert picture.getpixel((0, 0)) == (255, 0, 0)
        assert picture.getpixel((1, 0)) == (127, 127, 127)
        assert picture.getpixel((5, 5)) == (255, 255, 255)

    def test_transparent_palette(self):
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([10, 20, 30, 40, 50, 60])
        palette.putpixel((3, 3), 1)
        picture = open_picture(encoded(palette, transparency=0))
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((3, 3)) == (40, 50, 60)

    def test_transparent_colour_key(self):
        picture = open_picture(encoded(Image.new("L", (8, 8), 7), transparency=7))
        assert picture.getpixel((0, 0)) == (255, 255, 255)

    def test_cmyk(self):
        picture = open_picture(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
        red, green, blue = picture.getpixel((8, 8))
        assert red > 240
        assert max(green, blue) < 15

    def test_16_bit_gray(self):
        gray = np.full((8, 8), 0xC8FF, np.uint16)
        picture = open_picture(encoded(Image.fromarray(gray)))
        assert picture.getpixel((0, 0)) == (0xC8, 0xC8, 0xC8)

    def test_one_bit(self):
        assert open_picture(encoded(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255,) * 3

    def test_nothing_of_the_file_but_pixels_is_kept(self):
        data = encoded(Image.new("RGB", (8, 8)), icc_profile=b"x" * 200, dpi=(300, 300))
        assert open_picture(data).info == {}

    def test_missing_file(self, tmp_path):
        with pytest.raises(
            SafelightError, match=r"image '.*none\.png' cannot be read: No such file"
        ):
            open_picture(tmp_path / "none.png", "image")

    def test_folder(self, tmp_path):
        with pytest.raises(SafelightError, match="is a folder"):
            open_picture(tmp_path)

    def test_nul_in_the_name(self):
        with pytest.raises(SafelightError, match="cannot be read"):
            open_picture("a\0b.png")

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
    def test_endless_device(self):
        with pytest.raises(SafelightError, match="ordinary file"):
            open_picture("/dev/zero")


class TestMask:
    def test_half_white_is_white(self):
        row = np.array([[0, 1, 127, 128, 254, 255, 0, 0]] * 8, np.uint8)
        mask = open_mask(encoded(Image.fromarray(row)))
        assert mask.mode == "L"
        assert np.asarray(mask)[0].tolist() == [0, 0, 0, 255, 255, 255, 0, 0]

    def test_16_bit_mask(self):
        mask = open_mask(encoded(Image.fromarray(np.full((8, 8), 0x8000, np.uint16))))
        assert mask.getextrema() == (255, 255)


class TestDigest:
    def test_depends_on_pixels_and_shape_alone(self):
        picture = open_picture(encoded(Image.fromarray(noise())))
        again = open_picture(encoded(Image.fromarray(noise()), compress_level=1))
        assert picture_sha256(picture) == picture_sha256(again)
        turned = Image.frombytes("RGB", (8, 16), picture.tobytes())
        assert picture_sha256(picture) != picture_sha256(turned)


class TestTensors:
    def test_there_and_back_is_exact(self):
        every = np.arange(256, dtype=np.uint8).reshape(16, 16)
        picture = Image.fromarray(np.stack([every, every[::-1], every.T], axis=2))
        tensor = to_tensor(picture)
        assert tensor.shape == (1, 3, 16, 16)
        assert tensor.dtype == torch.float32
        assert from_tensor(tensor).tobytes() == picture.tobytes()

    def test_channels_and_axes(self):
        picture = Image.new("RGB", (3, 2), (255, 0, 0))
        picture.putpixel((2, 0), (0, 0, 255))
        tensor = to_tensor(picture)
        assert tensor.shape == (1, 3, 2, 3)
        assert tensor[0, :, 0, 0].tolist() == [1, -1, -1]
        assert tensor[0, :, 0, 2].tolist() == [-1, -1, 1]

    def test_as_diffusers_has_it(self):
        from diffusers.image_processor import VaeImageProcessor

        theirs = VaeImageProcessor()
        picture = Image.fromarray(noise(32, 24))
        assert torch.equal(to_tensor(picture), theirs.preprocess(picture))
        generator = torch.Generator().manual_seed(0)
        tensor = torch.randn((1, 3, 64, 64), generator=generator)
        expected = theirs.postprocess(tensor, output_type="pil")[0]
        assert from_tensor(tensor).tobytes() == expected.tobytes()

    def test_gray(self):
        picture = from_tensor(torch.zeros(1, 1, 4, 6))
        assert (picture.mode, picture.size) == ("L", (6, 4))
        assert from_tensor(to_tensor(picture)).tobytes() == picture.tobytes()

    def test_half_precision(self):
        assert from_tensor(torch.ones(3, 2, 2, dtype=torch.bfloat16)).getpixel((0, 0)) == (255,) * 3

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_single_nan_is_an_error(self, value):
        tensor = torch.zeros(1, 3, 8, 8)
        tensor[0, 1, 7, 7] = value
        with pytest.raises(SafelightError, match="NaN"):
            from_tensor(tensor)


def test_largest_difference():
    one = Image.new("RGB", (8, 8), (10, 20, 30))
    other = one.copy()
    assert largest_difference(one, other) == 0
    other.putpixel((7, 7), (10, 20, 47))
    assert largest_difference(one, other) == 17
    with pytest.raises(SafelightError, match="8x8 and 4x4"):
        largest_difference(one, Image.new("RGB", (4, 4)))


def test_as_rgb_leaves_the_original_alone():
    original = Image.new("RGB", (4, 4))
    original.info["a"] = "b"
    as_rgb(original).putpixel((0, 0), (1, 2, 3))
    assert original.getpixel((0, 0)) == (0, 0, 0)
    assert original.info == {"a": "b"}


class TestOutputPaths:
    def test_one_file(self, tmp_path):
        assert output_paths(tmp_path / "a.png", [7]) == [tmp_path / "a.png"]

    def test_several_files(self, tmp_path):
        paths = output_paths(tmp_path / "a.PNG", [7, 8, 9])
        assert [path.name for path in paths] == ["a-1.PNG", "a-2.PNG", "a-3.PNG"]

    def test_folder_takes_the_next_free_number(self, tmp_path):
        assert output_paths(tmp_path, [7])[0].name == "safelight-7.png"
        (tmp_path / "safelight-7.png").touch()
        (tmp_path / "safelight-7-2.png").touch()
        names = [path.name for path in output_paths(tmp_path, [7, 8])]
        assert names == ["safelight-7-3.png", "safelight-8.png"]
        assert output_paths(tmp_path, [7], overwrite=True)[0].name == "safelight-7.png"

    def test_folder_that_is_not_there_yet(self, tmp_path):
        assert output_paths(tmp_path / "new", [7]) == [tmp_path / "new" / "safelight-7.png"]

    def test_folder_with_a_suffix(self, tmp_path):
        (tmp_path / "a.png").mkdir()
        assert output_paths(tmp_path / "a.png", [7]) == [tmp_path / "a.png" / "safelight-7.png"]

    @pytest.mark.parametrize("name", ["a.gif", "a.png.txt", "a{n}", ".webp", "{seed}"])
    def test_another_format(self, tmp_path, name):
        with pytest.raises(SafelightError, match=r"must be a folder or .* in \.png, \.jpg, .*webp"):
            output_paths(tmp_path / name, [7])

    def test_standard_output(self):
        with pytest.raises(SafelightError, match=r"must be a folder or .* not '-'"):
            output_paths("-", [7])

    @pytest.mark.parametrize("end", [".jpg", ".JPEG", ".webp"])
    def test_other_formats(self, tmp_path, end):
        assert output_paths(tmp_path / f"a{end}", [7]) == [tmp_path / f"a{end}"]

    def test_the_seed_in_the_name(self, tmp_path):
        paths = output_paths(tmp_path / "cat {seed}.png", [7, 8])
        assert [path.name for path in paths] == ["cat 7.png", "cat 8.png"]


class TestSavePicture:
    @pytest.mark.parametrize(
        ("end", "form"), [(".png", "PNG"), (".JPG", "JPEG"), (".webp", "WEBP")]
    )
    def test_the_format_follows_the_name(self, tmp_path, end, form):
        path = tmp_path / f"a{end}"
        save_picture(Image.new("RGB", (16, 16), "teal"), path, {"parameters": "ä cat\nSteps: 1"})
        with Image.open(path) as image:
            assert (image.format, image.size) == (form, (16, 16))
            if form == "PNG":
                assert image.text["parameters"] == "ä cat\nSteps: 1"
            else:
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
                assert comment[8:].decode("utf-16-be") == "ä cat\nSteps: 1"

    def test_a_text_that_a_jpeg_cannot_hold_is_left_out(self):
        data = encode(Image.new("RGB", (16, 16)), "JPEG", {"parameters": "a" * 40_000})
        assert len(data) < 1000


class TestCheckWritable:
    def test_leaves_no_trace(self, tmp_path):
        check_writable(tmp_path / "deep" / "er" / "a.png")
        assert list(tmp_path.iterdir()) == []

    def test_existing_file(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_text("mine")
        with pytest.raises(SafelightError, match="exists"):
            check_writable(path)
        check_writable(path, overwrite=True)
        assert path.read_text() == "mine"

    def test_folder(self, tmp_path):
        with pytest.raises(SafelightError, match="is a folder"):
            check_writable(tmp_path, overwrite=True)

    def test_file_in_the_place_of_a_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(SafelightError, match="cannot be written"):
            check_writable(tmp_path / "file" / "a.png")

    def test_disk_that_refuses(self, tmp_path, monkeypatch):
        def refuse(self, *_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.touch", refuse)
        with pytest.raises(SafelightError, match="cannot be written: Permission denied"):
            check_writable(tmp_path / "a.png")

    def test_folder_without_permission(self):
        # Root may write anywhere: another user tries, to whom pytest's own folders are closed.
        program = (
            "import os, sys; from pathlib import Path; import safelight.picture as p\n"
            "os.geteuid() or os.setuid(65534)\n"
            "try: p.check_writable(Path(sys.argv[1]) / 'a.png')\n"
            "except p.SafelightError as error: print(error)"
        )
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o555)
            command = [sys.executable, "-c", program, folder]
            asked = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "Permission denied" in asked.stdout

    def test_full_disk(self, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 2**20))
        check_writable(tmp_path / "a.png", need=2**20)
        with pytest.raises(SafelightError, match="1 MiB free and 2 are needed"):
            check_writable(tmp_path / "a.png", need=2**20 + 1)

    @pytest.mark.parametrize("name", ["a\0.png", "a\0/b.png", "a" * 300 + ".png"])
    def test_name_that_no_disk_takes(self, tmp_path, name):
        with pytest.raises(SafelightError, match="cannot be written"):
            check_writable(tmp_path / name)


class TestSavePng:
    def test_same_input_same_bytes(self, tmp_path):
        picture = Image.fromarray(noise())
        for name in ("a.png", "b.png"):
            save_png(picture, tmp_path / name, {"parameters": "a\nSteps: 1"})
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert open_picture(tmp_path / "a.png").tobytes() == picture.tobytes()

    def test_makes_the_folders(self, tmp_path):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "new" / "er" / "a.png", {})
        assert [path.name for path in (tmp_path / "new" / "er").iterdir()] == ["a.png"]

    def test_does_not_overwrite(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_text("mine")
        with pytest.raises(SafelightError, match="exists"):
            save_png(Image.new("RGB", (8, 8)), path, {})
        assert path.read_text() == "mine"
        assert list(tmp_path.iterdir()) == [path]
        save_png(Image.new("RGB", (8, 8)), path, {}, overwrite=True)
        assert open_picture(path).size == (8, 8)
        assert list(tmp_path.iterdir()) == [path]

    def test_does_not_overwrite_where_there_are_no_hard_links(self, tmp_path, monkeypatch):
        def refuse(self, target):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
        path = tmp_path / "a.png"
        save_png(Image.new("RGB", (8, 8)), path, {})
        assert open_picture(path).size == (8, 8)
        path.write_text("mine")
        with pytest.raises(SafelightError, match="exists"):
            save_png(Image.new("RGB", (8, 8)), path, {})
        assert path.read_text() == "mine"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        ("where", "error"),
        [("os.fsync", OSError(28, "No space left on device")), ("os.fsync", KeyboardInterrupt())],
        ids=["full", "ctrl-c"],
    )
    def test_interrupted_leaves_what_was_there(
        self, tmp_path, monkeypatch, overwrite, where, error
    ):
        path = tmp_path / "a.png"
        if overwrite:
            path.write_text("mine")

        def stop(_):
            raise error

        monkeypatch.setattr(where, stop)
        expected = SafelightError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            save_png(Image.new("RGB", (8, 8)), path, {}, overwrite=overwrite)
        assert [p.read_text() for p in tmp_path.iterdir()] == (["mine"] if overwrite else [])

    def test_obeys_the_umask(self, tmp_path):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {})
        (tmp_path / "plain").touch()
        modes = {path.stat().st_mode for path in tmp_path.iterdir()}
        assert len(modes) == 1


class TestResized:
    @pytest.mark.parametrize("size", [(64, 64), (96, 16), (8, 200), (30, 20)])
    def test_as_pillow_does(self, size):
        picture = Image.fromarray(noise(20, 30))
        assert resized(picture, size).tobytes() == picture.resize(size, LANCZOS).tobytes()

    def test_a_long_and_narrow_picture_never_becomes_large(self, monkeypatch):
        most, resize = [0], Image.Image.resize

        def measured(self, size, *how):
            made = resize(self, size, *how)
            most.append(size[0] * max(size[1], self.height if size[0] != self.width else 0))
            return made

        monkeypatch.setattr("safelight.pixels.BETWEEN", 10_000)
        monkeypatch.setattr(Image.Image, "resize", measured)
        picture = Image.fromarray(noise(8, 2000))
        made = resized(picture, (100, 50))
        assert max(most) <= 16_000  # pixels of the picture itself; 200,000 are half-way in Pillow
        usual = np.asarray(resize(picture, (100, 50), LANCZOS), int)
        assert np.abs(np.asarray(made, int) - usual).max() <= 2
