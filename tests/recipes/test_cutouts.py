"""Packages, cut-outs, and the files that they become."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from things import disc

from recipes.embedded import cutouts
from recipes.embedded.captions import STYLES, corpus
from recipes.embedded.cutouts import unknown_words
from safelight.errors import SafelightError
from safelight.words import split_words

RED, BLUE = (214, 40, 40), (40, 92, 212)


def tarball(files, link=None):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        if link:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hosts"
            tar.addfile(entry)
    return out.getvalue()


def integrity(data):
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


class TestCutouts:
    def test_hidden_colours_do_not_bleed(self):
        image = np.array(disc(RED).resize((400, 400), Image.Resampling.NEAREST))
        image[image[..., 3] == 0] = (0, 255, 0, 0)
        small = cutouts.cut_out(Image.fromarray(image))
        assert small.shape == (cutouts.SIDE, cutouts.SIDE, 4)
        edge = small[(small[..., 3] > 40) & (small[..., 3] < 255)]
        assert len(edge) > 50
        # Eight-bit premultiplied colours are coarse where alpha is low; green would show as 100.
        assert edge[:, 1].max() <= RED[1] + 6

    def test_fits_the_square(self):
        wide = Image.new("RGBA", (300, 200))
        wide.paste((255, 0, 0, 255), (40, 90, 240, 140))
        alpha = cutouts.cut_out(wide)[..., 3]
        assert alpha[cutouts.SIDE // 2].min() > 230
        assert not alpha[: 3 * cutouts.SIDE // 8 - 1].any()

    def test_empty_picture(self):
        with pytest.raises(SafelightError, match="transparent"):
            cutouts.cut_out(Image.new("RGBA", (9, 9)))

    def test_files_must_belong_together(self, path, tmp_path):
        with pytest.raises(SafelightError, match="run the data stage"):
            cutouts.load(tmp_path / "cutouts.npz")
        about = json.loads(path.with_suffix(".json").read_text())
        about["pictures"][0]["concept"] = "an owl"
        (tmp_path / "cutouts.npz").write_bytes(path.read_bytes())
        (tmp_path / "cutouts.json").write_text(json.dumps(about))
        with pytest.raises(SafelightError, match="belong together"):
            cutouts.load(tmp_path / "cutouts.npz")


class TestPackages:
    def test_flipped_byte_is_refused(self):
        data = b"a tarball"
        package = {"name": "p", "version": "1.0.0", "integrity": integrity(data)}
        cutouts.verify(package, data)
        with pytest.raises(SafelightError, match="the lock file wants"):
            cutouts.verify(package, b"b" + data[1:])

    def test_members(self):
        data = tarball({"package/a": b"1", "package/b": b"2"})
        assert cutouts.members(data, ["package/b", "package/c"]) == {"package/b": b"2"}

    @pytest.mark.parametrize("name", ["../a", "/a", "package/../../a", "package\\..\\a"])
    def test_traversal_is_refused(self, name):
        with pytest.raises(SafelightError, match="unsafe path"):
            cutouts.members(tarball({name: b"1"}), ["package/a"])

    def test_links_are_refused(self):
        with pytest.raises(SafelightError, match="not a plain file"):
            cutouts.members(tarball({}, link="package/a"), ["package/a"])

    def test_npm_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SafelightError, match="npm is not installed"):
            cutouts.build(tmp_path)

    def test_npm_fails(self, tmp_path, monkeypatch):
        def run(command, **_):
            raise subprocess.CalledProcessError(1, command, stderr="one\ncode E404\n")

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(SafelightError, match="failed: code E404"):
            cutouts.build(tmp_path)

    def test_build(self, tmp_path, monkeypatch):
        pytest.importorskip("resvg_py")
        webp = io.BytesIO()
        disc(BLUE).save(webp, "WEBP", lossless=True)
        body = '<circle cx="16" cy="16" r="10" fill="#f00"/>'
        icons = {"width": 32, "height": 32, "icons": {"ball": {"body": body}}}
        emoji = [{"label": "frobnicated ball", "tags": ["wibble", "the"]}, {"label": "A snarky"}]
        tarballs = {
            "drawn@1.0.0": tarball(
                {
                    "package/icons.json": json.dumps(icons).encode(),
                    "package/chars.json": json.dumps({"2b50": "ball"}).encode(),
                }
            ),
            "shiny@2.0.0": tarball({"package/assets/2b50-fe0f.webp": webp.getvalue()}),
            "names@3.0.0": tarball({"package/en/data.json": json.dumps(emoji).encode()}),
        }
        flat, shiny, names = (
            {"name": name, "version": version, "style": style, "integrity": integrity(data)}
            for (key, data), style in zip(tarballs.items(), ("flat", "3d", "names"), strict=True)
            for name, version in [key.split("@")]
        )

        def run(command, cwd, **_):
            (cwd / "packed.tgz").write_bytes(tarballs[command[-1]])

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(cutouts, "LOCK", tmp_path / "lock.json")
        monkeypatch.setattr(cutouts, "CONCEPTS", tmp_path / "concepts.json")
        concepts = [{"code": "2b50", "names": ["a ball"]}]
        cutouts.CONCEPTS.write_text(json.dumps(concepts))
        cutouts.LOCK.write_text(json.dumps({"packages": [flat, shiny], "names": names}))

        built = cutouts.build(tmp_path / "out")
        pictures, about = cutouts.load(built)
        middle = pictures[:, cutouts.SIDE // 2, cutouts.SIDE // 2].astype(int)
        # They are kept as WebP, which loses a little.
        assert np.abs(middle - [[255, 0, 0, 255], [*BLUE, 255]]).max() <= 6
        assert [row["style"] for row in about["pictures"]] == ["flat", "3d"]
        words = json.loads((tmp_path / "out" / "words.json").read_text())
        assert sorted(words["shown"] + words["held_out"]) == ["frobnicated", "snarky", "wibble"]
        cutouts.build(tmp_path / "again")
        for name in ("cutouts.npz", "cutouts.json", "words.json"):
            again = (tmp_path / "again" / name).read_bytes()
            assert again == (tmp_path / "out" / name).read_bytes()

        cutouts.CONCEPTS.write_text(json.dumps([*concepts, {"code": "1", "names": ["a bat"]}]))
        with pytest.raises(SafelightError, match="'a bat' has no picture 1 in style 'flat'"):
            cutouts.build(tmp_path / "out")


def test_unknown_words_are_held_out_or_shown_and_mean_nothing():
    known = {"cat", "dog"}
    labels = [f"{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}xyz cat" for i in range(100)]
    emoji = json.dumps([{"label": label} for label in labels]).encode()
    found = unknown_words(tarball({"package/en/data.json": emoji}), known)
    shown, held_out = set(found["shown"]), set(found["held_out"])
    assert shown | held_out == {label.split()[0] for label in labels}
    assert not shown & held_out
    assert 10 <= len(held_out) <= 32  # one in five: 20, and three standard deviations


class TestShippedFiles:
    def test_concepts(self):
        concepts = json.loads(cutouts.CONCEPTS.read_text())
        names = [name for concept in concepts for name in concept["names"]]
        assert len(concepts) > 100
        assert len(names) == len(set(names))
        assert len({concept["code"] for concept in concepts}) == len(concepts)
        for name in names:
            first, *rest = name.split()
            if first in ("a", "an"):
                # These start with a consonant's sound.
                sound = rest[0][0] in "aeiou" and rest[0] not in ("unicorn", "ewe", "ufo")
                assert (first == "an") == sound, name

    def test_captions_cover_every_name(self):
        concepts = json.loads(cutouts.CONCEPTS.read_text())
        names = [name for concept in concepts for name in concept["names"]]
        words = {word for text in corpus(names) for word in split_words(text)}
        assert {word for name in names for word in split_words(name)} <= words

    def test_lock_and_notice(self):
        lock = json.loads(cutouts.LOCK.read_text())
        packages = [*lock["packages"], lock["names"]]
        text = cutouts.notice(packages)
        assert {package["style"] for package in lock["packages"]} == set(STYLES)
        for package in packages:
            assert len(base64.b64decode(package["integrity"].removeprefix("sha512-"))) == 64
            for key in ("name", "version", "licence", "author", "packager"):
                assert package[key] in text

    def test_shipped_models_credit_their_drawings(self):
        lock = json.loads(cutouts.LOCK.read_text())
        models = Path(__file__).parents[2] / "src" / "safelight" / "models"
        found = sorted(models.glob("*/NOTICE"))
        assert len(found) == 3
        for file in found:
            # That of pixels was trained before words of a package were in the captions.
            words = [lock["names"]] if file.parent.name != "embedded-unconditional" else []
            packages = [*lock["packages"], *words]
            assert file.read_text().strip() == cutouts.notice(packages).strip()
