"""Cut-outs and captioned scenes, without the network: the objects are drawn here."""

import base64
import hashlib
import io
import itertools
import json
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from safelight.errors import SafelightError
from safelight.train import cutouts
from safelight.train.captions import PLACES, RELATIONS, STYLES, split_words
from safelight.train.colours import COLOURS, backgrounds, oklab, paint, srgb
from safelight.train.recipe import MIXED, Scenes, kept_back

RED, YELLOW, BLUE = (214, 40, 40), (250, 216, 50), (40, 92, 212)
CONCEPTS = [
    {"code": "1", "names": ["a red apple", "an apple"]},
    {"code": "2", "names": ["an owl"]},
    {"code": "3", "names": ["scissors", "a pair of scissors"], "flip": False},
]


def disc(colour, lopsided=False):
    """A disc that fills the square; a lopsided one has a white right half."""
    image = Image.new("RGBA", (cutouts.SIDE, cutouts.SIDE))
    draw = ImageDraw.Draw(image)
    box = (0, 0, cutouts.SIDE - 1, cutouts.SIDE - 1)
    draw.ellipse(box, fill=(*colour, 255))
    if lopsided:
        draw.pieslice(box, -90, 90, fill=(255, 255, 255, 255))
    return image


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows, pictures = [], []
    for concept, colour in zip(CONCEPTS, (RED, YELLOW, BLUE), strict=True):
        for style in STYLES:
            rows.append({"concept": concept["names"][0], "style": style})
            pictures.append(np.array(disc(colour, lopsided=concept["code"] == "3")))
    return cutouts.save(tmp_path_factory.mktemp("data"), np.stack(pictures), rows, CONCEPTS)


@pytest.fixture(scope="module")
def scenes(path):
    return Scenes(path)


@pytest.fixture(scope="module")
def mixed(path):
    return Scenes(path, kinds=MIXED)


def close(pixel, colour):
    return np.abs(pixel.astype(int) - np.array(colour)).max() <= 6


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


class TestScenes:
    def test_batch(self, scenes):
        pictures, captions = scenes.batch(8, np.random.default_rng(0))
        assert pictures.shape == (8, 64, 64, 3)
        assert pictures.dtype == np.uint8
        assert len(captions) == 8

    def test_same_seed_same_pictures(self, path):
        first, second = Scenes(path, seed=3), Scenes(path, seed=3)
        pictures, captions = first.batch(20)
        again, captions_again = second.batch(20)
        assert np.array_equal(pictures, again)
        assert captions == captions_again
        assert Scenes(path, seed=4).batch(20)[1] != captions

    def test_order_of_drawing_does_not_matter(self, path, scenes):
        # The cache of scaled cut-outs must not change what is drawn.
        scenes.batch(200, np.random.default_rng(1))
        warm = scenes.batch(20, np.random.default_rng(2))[0]
        assert np.array_equal(warm, Scenes(path).batch(20, np.random.default_rng(2))[0])

    def test_captions_tell_the_truth(self, scenes):
        rng = np.random.default_rng(5)
        colours = sorted(COLOURS, key=len, reverse=True)
        for style in STYLES:
            for _ in range(200):
                picture, scene = scenes.sample(rng, concept="apple", style=style)
                caption = scene.said
                assert caption == caption.lower()
                assert "apple" in caption
                others = [kind for name, kind in STYLES.items() if name != style]
                assert not any(kind in caption for kind in others)
                caption = caption.replace("grey", "gray")
                said = [name for name in colours if f"{name} background" in caption]
                assert close(picture[0, 0], COLOURS[said[0] if said else "white"])
                assert ("background" in caption) == bool(said)

    def test_words_cover_the_captions(self, scenes, mixed):
        captions = mixed.batch(1500, np.random.default_rng(6))[1]
        assert {word for text in captions for word in split_words(text)} <= scenes.words()
        assert {"grey", "light", "3d", "icon", "pair", "white", "the"} <= scenes.words()

    def test_articles(self, mixed):
        captions = mixed.batch(1500, np.random.default_rng(7))[1]
        for before, after in (
            p for text in captions for p in itertools.pairwise(split_words(text))
        ):
            if before in ("a", "an"):
                assert (before == "an") == (after[0] in "aeiou"), (before, after)
        assert not any("a scissors" in text for text in captions)

    def test_shares(self, scenes):
        rng = np.random.default_rng(8)
        drawn = [scenes.sample(rng, concept="an owl", style="flat") for _ in range(1500)]
        white = [close(picture[0, 0], COLOURS["white"]) for picture, _ in drawn]
        assert np.mean(white) == pytest.approx(0.55, abs=0.05)
        assert np.mean(["flat" in scene.said for _, scene in drawn]) == pytest.approx(0.5, abs=0.05)

    def test_nothing_vanishes(self, scenes):
        rng = np.random.default_rng(9)
        assert "red" not in backgrounds(np.array(disc(RED)))
        assert {"white", "blue", "black"} <= set(backgrounds(np.array(disc(RED))))
        for _ in range(300):
            picture, _ = scenes.sample(rng, concept="a red apple")
            assert not close(picture[0, 0], RED)
        assert close(scenes.sample(rng, concept="apple", background="red")[0][0, 0], RED)

    @pytest.mark.parametrize("size", [32, 64, 96])
    def test_size_of_the_object(self, scenes, size):
        for picture in scenes.plain(100, np.random.default_rng(10), size):
            rows, columns = np.nonzero((picture < 250).any(-1))
            # A lopsided disc is half as wide; its height still is the full side.
            side = max(np.ptp(rows), np.ptp(columns)) + 1
            assert 0.72 * size - 2 <= side <= 0.92 * size + 2
            assert rows.min() >= 0
            assert rows.max() < size

    def test_only_what_may_be_mirrored_is(self, scenes):
        rng = np.random.default_rng(11)
        for _ in range(50):
            picture, _ = scenes.sample(rng, concept="scissors", background="white")
            assert picture[:, :32].mean() < picture[:, 32:].mean()

    @pytest.mark.parametrize(
        "wrong", [{"concept": "x"}, {"style": "x"}, {"background": "x"}, {"kind": "x"}]
    )
    def test_unknown_words(self, scenes, wrong):
        with pytest.raises(SafelightError, match=r"no .* 'x'"):
            scenes.sample(**wrong)


def middles(picture, background):
    """The centres (x, y) of the things on a picture, as shares of its side."""
    apart = np.abs(picture.astype(int) - np.array(COLOURS[background])).max(axis=-1) > 24
    labels, count = ndimage.label(apart)
    found = ndimage.center_of_mass(apart, labels, range(1, count + 1))
    return [(x / len(picture), y / len(picture)) for y, x in found]


class TestKinds:
    def test_all_are_drawn(self, mixed):
        rng = np.random.default_rng(20)
        kinds = [mixed.invent(rng).kind for _ in range(2000)]
        for kind, share in MIXED.items():
            assert kinds.count(kind) / 2000 == pytest.approx(share / 100, abs=0.04)

    def test_several(self, mixed):
        rng = np.random.default_rng(21)
        for _ in range(60):
            picture, scene = mixed.sample(rng, kind="several", concept="an owl", background="blue")
            assert len(middles(picture, "blue")) == scene.count
            number = {2: "two", 3: "three", 4: "four"}[scene.count]
            assert f"{number} owls" in scene.said

    def test_what_has_no_article_is_not_counted(self, mixed):
        with pytest.raises(SafelightError, match="'scissors' cannot be shown as 'several'"):
            mixed.invent(np.random.default_rng(0), kind="several", concept="scissors")

    def test_placed(self, mixed):
        rng = np.random.default_rng(22)
        seen = set()
        for _ in range(80):
            picture, scene = mixed.sample(rng, kind="placed", concept="apple", background="black")
            [(x, y)] = middles(picture, "black")
            wanted = PLACES[scene.where] if scene.where else (0.5, 0.5)
            assert (x, y) == pytest.approx(wanted, abs=0.06)
            assert ("small" in scene.said) or scene.where
            seen.add(scene.where)
        assert seen == {None, *PLACES}

    def test_pairs(self, mixed):
        rng = np.random.default_rng(23)
        seen = set()
        for _ in range(80):
            picture, scene = mixed.sample(rng, kind="pair", concept="apple", background="black")
            # The apple is red, the owl yellow, the scissors blue and white.
            red = (picture[..., 0] > 150) & (picture[..., 1] < 90)
            other = (picture.max(axis=-1) > 150) & ~red
            apple, second = (np.argwhere(mask).mean(axis=0)[::-1] / 64 for mask in (red, other))
            right, down = RELATIONS[scene.where]
            apart = apple - second
            if scene.where == "next to":
                assert abs(apart[0]) > 0.3
            else:
                assert apart[0] * right + apart[1] * down > 0.3
            first = scene.said.index("apple")
            assert first < scene.said.index(f" {scene.where} ", first)
            seen.add(scene.where)
        assert seen == set(RELATIONS)

    def test_coloured(self, mixed):
        rng = np.random.default_rng(24)
        for _ in range(60):
            picture, scene = mixed.sample(rng, kind="coloured", concept="an owl")
            assert not kept_back(scene.colour, "an owl")
            assert f"{scene.colour} owl" in scene.said
            near = min(COLOURS, key=lambda name: distance(picture[32, 32], COLOURS[name]))
            assert near == scene.colour
        for _ in range(60):
            scene = mixed.invent(rng, kind="coloured", held_out=True)
            assert kept_back(scene.colour, scene.concepts[0])

    def test_a_name_that_says_a_colour_is_not_painted(self, mixed):
        rng = np.random.default_rng(25)
        said = {mixed.invent(rng, kind="coloured", concept="a red apple").said for _ in range(50)}
        assert not any("red apple" in text for text in said)


def distance(a, b):
    return np.linalg.norm(oklab(np.array(a)) - oklab(np.array(b)))


class TestPaint:
    def test_shading_and_other_colours_stay(self):
        picture = np.array(disc(RED, lopsided=True))
        picture[40:72, 20:40, :3] = (150, 20, 20)  # a shade of it
        painted = paint(picture, "blue")
        assert painted.shape == picture.shape
        assert np.array_equal(painted[..., 3], picture[..., 3])
        assert np.array_equal(painted[56, 90], picture[56, 90])  # white stays white
        plain, shade = painted[90, 40, :3], painted[56, 30, :3]
        assert distance(plain, BLUE) < 0.05
        assert oklab(shade)[0] < oklab(plain)[0] - 0.05

    def test_what_has_no_main_colour_or_has_it_already(self):
        gray = np.array(disc((128, 128, 128)))
        assert paint(gray, "red") is None
        assert paint(np.array(disc(RED)), "red") is None
        half = np.array(disc(RED))
        half[:, :70, :3] = (250, 250, 250)  # too little of it is red
        assert paint(half, "blue") is None

    def test_oklab_and_back(self):
        colours = np.random.default_rng(0).integers(0, 256, (1000, 3), dtype=np.uint8)
        assert np.abs(srgb(oklab(colours)).astype(int) - colours).max() <= 1


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
        assert not alpha[: cutouts.SIDE // 2 - 15].any()

    def test_empty_picture(self):
        with pytest.raises(SafelightError, match="transparent"):
            cutouts.cut_out(Image.new("RGBA", (9, 9)))

    def test_files_must_belong_together(self, path, tmp_path):
        with pytest.raises(SafelightError, match="build them first"):
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
        drawn = tarball(
            {
                "package/icons.json": json.dumps(icons).encode(),
                "package/chars.json": json.dumps({"2b50": "ball"}).encode(),
            }
        )
        tarballs = {
            "drawn@1.0.0": drawn,
            "shiny@2.0.0": tarball({"package/assets/2b50-fe0f.webp": webp.getvalue()}),
        }
        lock = [
            {"name": name, "version": version, "style": style, "integrity": integrity(data)}
            for (key, data), style in zip(tarballs.items(), ("flat", "3d"), strict=True)
            for name, version in [key.split("@")]
        ]

        def run(command, cwd, **_):
            (cwd / "packed.tgz").write_bytes(tarballs[command[-1]])

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(cutouts, "LOCK", tmp_path / "lock.json")
        monkeypatch.setattr(cutouts, "CONCEPTS", tmp_path / "concepts.json")
        concepts = [{"code": "2b50", "names": ["a ball"]}]
        cutouts.CONCEPTS.write_text(json.dumps(concepts))
        cutouts.LOCK.write_text(json.dumps({"packages": lock}))

        built = cutouts.build(tmp_path / "out")
        pictures, about = cutouts.load(built)
        middle = cutouts.SIDE // 2
        assert pictures[:, middle, middle].tolist() == [[255, 0, 0, 255], [*BLUE, 255]]
        assert [row["style"] for row in about["pictures"]] == ["flat", "3d"]
        assert cutouts.build(tmp_path / "again").read_bytes() == built.read_bytes()

        cutouts.CONCEPTS.write_text(json.dumps([*concepts, {"code": "1", "names": ["a bat"]}]))
        with pytest.raises(SafelightError, match="'a bat' has no picture in style 'flat'"):
            cutouts.build(tmp_path / "out")


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
                # "unicorn" starts with a consonant's sound.
                assert (first == "an") == (rest[0][0] in "aeiou" and rest[0] != "unicorn"), name

    def test_lock_and_notice(self):
        lock = json.loads(cutouts.LOCK.read_text())
        text = cutouts.notice(lock)
        assert {package["style"] for package in lock["packages"]} == set(STYLES)
        for package in lock["packages"]:
            assert len(base64.b64decode(package["integrity"].removeprefix("sha512-"))) == 64
            for key in ("name", "version", "licence", "author", "packager"):
                assert package[key] in text
