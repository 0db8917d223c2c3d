"""Captioned scenes: what is invented, where it stands, and how it is described."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from things import COLOURS as OWN
from things import HELD_OUT, SHOWN, disc

from recipes.embedded import scenes as scenes_module
from recipes.embedded.captions import EITHER_SIDE, PLACES, RELATIONS, SCENES, STYLES
from recipes.embedded.colours import COLOURS, backgrounds, oklab, paint, srgb
from recipes.embedded.encode import Encoder, encoded
from recipes.embedded.pool import Pool
from recipes.embedded.principal import NUMBERS, Principal
from recipes.embedded.scenes import FLOATING, GROUND, KINDS, Scenes, held_back
from recipes.embedded.stage import Stage
from recipes.embedded.supply import PART, parts
from safelight.errors import SafelightError
from safelight.train.tokens import train_vocabulary
from safelight.words import split_words

RED, BLUE = OWN["a red apple"], OWN["scissors"]
SIZE = 64


def drawn(stage, rng, **given):
    """A picture, uint8 [64, 64, 3], and its scene."""
    pictures, [scene] = stage.batch(1, rng, **given)
    return pictures[0].numpy(), scene


def close(pixel, colour, by=8):
    """Return whether colours are equal but for the variation of a background, and rounding."""
    return np.abs(pixel.astype(int) - np.array(colour)).max() <= by


def distance(a, b):
    return np.linalg.norm(oklab(np.array(a)) - oklab(np.array(b)))


def middles(picture, background):
    """The centres (x, y) of the things on a picture, as shares of its side."""
    apart = np.abs(picture.astype(int) - np.array(COLOURS[background])).max(axis=-1) > 24
    # Things may touch: six pixels less all around take them apart.
    apart = ndimage.binary_erosion(apart, iterations=6)
    labels, count = ndimage.label(apart)
    found = ndimage.center_of_mass(apart, labels, range(1, count + 1))
    return [(x / len(picture), y / len(picture)) for y, x in found]


class TestScenes:
    def test_batch(self, stage):
        pictures, scenes = stage.batch(8, np.random.default_rng(0))
        assert pictures.shape == (8, SIZE, SIZE, 3)
        assert pictures.dtype == torch.uint8
        assert len(scenes) == 8

    def test_same_seed_same_pictures(self, stage):
        pictures, scenes = stage.batch(20, np.random.default_rng(3))
        again, scenes_again = stage.batch(20, np.random.default_rng(3))
        assert torch.equal(pictures, again)
        assert scenes == scenes_again
        assert stage.batch(20, np.random.default_rng(4))[1] != scenes

    def test_captions_tell_the_truth(self, stage):
        rng = np.random.default_rng(5)
        colours = sorted(COLOURS, key=len, reverse=True)
        for style in STYLES:
            given = {"kind": "one", "concept": "apple", "style": style, "disturbed": False}
            pictures, scenes = stage.batch(100, rng, **given)
            for picture, scene in zip(pictures.numpy(), scenes, strict=True):
                caption = scene.said
                assert caption == caption.lower()
                assert "apple" in caption
                others = [n for name, names in STYLES.items() if name != style for n in names]
                assert not any(kind in caption for kind in others)
                if scene.ground in SCENES:
                    assert any(phrase in caption for phrase in SCENES[scene.ground])
                    continue
                caption = caption.replace("grey", "gray").replace("violet", "purple")
                at = caption.replace("red apple", "apple")
                said = [name for name in colours if name in at]
                assert scene.ground == (said[0] if said else "white")
                assert close(picture[0, 0], COLOURS[scene.ground])

    def test_words_cover_the_captions(self, scenes):
        rng = np.random.default_rng(6)
        captions = [scenes.invent(rng, disturbed=False).said for _ in range(1500)]
        assert {word for text in captions for word in split_words(text)} <= scenes.words()
        every = {"grey", "light", "3d", "icon", "pair", "white", "the", "meadow", "rainy", "owls"}
        assert every <= scenes.words()

    def test_articles(self, scenes):
        rng = np.random.default_rng(7)
        captions = [scenes.invent(rng).said for _ in range(1500)]
        for before, after in (
            p for text in captions for p in itertools.pairwise(split_words(text))
        ):
            if before in ("a", "an"):
                assert (before == "an") == (after[0] in "aeiou"), (before, after)
        assert not any("a scissors" in text for text in captions)

    def test_shares(self, scenes):
        rng = np.random.default_rng(8)
        given = {"kind": "one", "concept": "an owl", "style": "flat", "disturbed": False}
        invented = [scenes.invent(rng, **given) for _ in range(1500)]
        # Three standard deviations of a share of 1,500 are 0.039 or less.
        on_scene = np.mean([scene.ground in SCENES for scene in invented])
        assert on_scene == pytest.approx(scenes_module.ON_SCENE, abs=0.04)
        plain = [scene.ground == "white" for scene in invented if scene.ground not in SCENES]
        assert np.mean(plain) == pytest.approx(scenes_module.WHITE_SHARE, abs=0.05)
        named = np.mean(["flat" in scene.said for scene in invented])
        assert named == pytest.approx(scenes_module.STYLE_NAMED, abs=0.04)

    def test_nothing_vanishes(self, scenes):
        rng = np.random.default_rng(9)
        assert "red" not in backgrounds(np.array(disc(RED)))
        assert {"white", "blue", "black"} <= set(backgrounds(np.array(disc(RED))))
        for _ in range(300):
            assert scenes.invent(rng, kind="one", concept="a red apple").ground != "red"
        assert scenes.invent(rng, concept="apple", ground="red").ground == "red"

    def test_size_of_the_object(self, stage):
        given = {"kind": "one", "concept": "apple", "ground": "white"}
        low, high = scenes_module.LARGE_SHARE
        for picture in stage.batch(60, np.random.default_rng(10), **given)[0].numpy():
            rows, columns = np.nonzero((picture < 250).any(-1))
            for found in (rows, columns):
                assert low * SIZE - 2 <= np.ptp(found) + 1 <= high * SIZE + 2

    def test_only_what_may_be_mirrored_is(self, stage):
        given = {"kind": "one", "concept": "scissors", "ground": "white"}
        for picture in stage.batch(50, np.random.default_rng(11), **given)[0].float():
            # The blue half stays on the left.
            assert picture[:, :32].mean() < picture[:, 32:].mean()

    @pytest.mark.parametrize(
        "wrong", [{"concept": "x"}, {"style": "x"}, {"ground": "x"}, {"kind": "x"}]
    )
    def test_unknown_names(self, scenes, wrong):
        with pytest.raises(SafelightError, match=r"no .* 'x'"):
            scenes.invent(np.random.default_rng(0), **wrong)

    def test_words_without_a_meaning(self, scenes):
        rng = np.random.default_rng(12)
        said = [split_words(scenes.invent(rng).said) for _ in range(3000)]
        seen = {word for words in said for word in words}
        assert set(SHOWN) <= seen
        assert not set(HELD_OUT) & seen
        assert not set(SHOWN) & set(HELD_OUT)
        assert not set(SHOWN) & scenes.words()


class TestAlone:
    def test_one_thing_in_the_middle_in_one_size(self, path):
        scenes = Scenes(path, alone=True)
        stage = Stage(scenes, "cpu", SIZE, variants=1)
        given = {"concept": "apple", "ground": "white"}
        for picture in stage.batch(30, np.random.default_rng(30), **given)[0].numpy():
            rows, columns = np.nonzero((picture < 250).any(-1))
            assert np.ptp(columns) + 1 == pytest.approx(0.8 * SIZE, abs=2)
            for found in (rows, columns):
                assert (found.min() + found.max() + 1) / 2 == pytest.approx(SIZE / 2, abs=1)

    def test_at_any_place_and_in_any_size(self, path):
        stage = Stage(Scenes(path, alone=True, steady=False), "cpu", SIZE, variants=1)
        given = {"concept": "apple", "ground": "white", "kind": "one"}
        pictures = stage.batch(40, np.random.default_rng(30), **given)[0].numpy()
        shown = [np.nonzero((picture < 250).any(-1)) for picture in pictures]
        low, high = scenes_module.LARGE_SHARE
        widths = [(np.ptp(columns) + 1) / SIZE for _, columns in shown]
        assert low - 0.03 < min(widths) < low + 0.08
        assert high - 0.08 < max(widths) < high + 0.03
        middles = [(rows.min() + rows.max()) / 2 / SIZE for rows, _ in shown]
        assert np.ptp(middles) > scenes_module.REACH

    def test_what_is_shown_and_said(self, path):
        scenes = Scenes(path, alone=True)
        rng = np.random.default_rng(31)
        invented = [scenes.invent(rng, style="cartoon", disturbed=False) for _ in range(1500)]
        kinds = [scene.kind for scene in invented]
        assert set(kinds) == {"one", "coloured"}
        assert kinds.count("one") / 1500 == pytest.approx(0.8, abs=0.04)
        assert not any(scene.ground in SCENES for scene in invented)
        named = np.mean(["cartoon" in scene.said for scene in invented])
        assert named == pytest.approx(scenes_module.STYLE_NAMED_ALONE, abs=0.04)


class TestKinds:
    def test_all_are_drawn(self, scenes):
        rng = np.random.default_rng(20)
        kinds = [scenes.invent(rng).kind for _ in range(2000)]
        for kind, share in KINDS.items():
            # A kind that does not fit the thing is tried with another: no share changes.
            assert kinds.count(kind) / 2000 == pytest.approx(share / 100, abs=0.04)

    def test_several(self, stage, monkeypatch):
        # Turned ones are moved inwards, and may overlap a little.
        monkeypatch.setattr(scenes_module, "TURNED", 0.0)
        rng = np.random.default_rng(21)
        given = {"kind": "several", "concept": "an apple", "style": "flat", "ground": "black"}
        given["disturbed"] = False
        for _ in range(40):
            picture, scene = drawn(stage, rng, **given)
            if scene.colour is None:  # in black, or nearly, they would not be seen
                assert len(middles(picture, "black")) == scene.count
            numbers = {2: ("two", "2", "a couple of", "a pair of"), 4: ("four", "4", "a group of")}
            numbers[3] = ("three", "3", "several", "some")
            assert "apples" in scene.said
            assert any(number in scene.said for number in numbers[scene.count])

    def test_what_has_no_article_is_not_counted(self, scenes):
        with pytest.raises(SafelightError, match="'scissors' cannot be shown as 'several'"):
            scenes.invent(np.random.default_rng(0), kind="several", concept="scissors")

    def test_what_no_thing_can_be_shown_as(self, path, monkeypatch):
        scenes = Scenes(path)
        monkeypatch.setattr(scenes_module, "HELD_OUT", 10**9)
        monkeypatch.setattr(scenes_module, "TRIES", 50)
        with pytest.raises(SafelightError, match="no thing of these"):
            scenes.invent(np.random.default_rng(0), "one", held_out="style")

    def test_placed_and_sized(self, stage):
        rng = np.random.default_rng(22)
        seen = set()
        for _ in range(120):
            picture, scene = drawn(stage, rng, kind="sized", concept="apple", ground="black")
            [(x, y)] = middles(picture, "black")
            wanted = PLACES[scene.where] if scene.where else (0.5, 0.5)
            # Half a pixel of 64 each way, and what a thing has more on one side.
            near = scenes_module.REACH + 0.03
            assert (x, y) == pytest.approx(wanted, abs=near)
            assert scene.size or scene.where
            assert scene.size is None or scene.size in scene.said
            assert scene.where is None or scene.where in scene.said
            seen.add(scene.where)
        assert seen == {None, *PLACES}

    def test_pairs(self, stage):
        rng = np.random.default_rng(23)
        seen = set()
        given = {"kind": "pair", "concept": "apple", "style": "flat", "ground": "black"}
        for _ in range(100):
            picture, scene = drawn(stage, rng, disturbed=False, **given)
            seen.add(scene.where)
            first = scene.said.index("apple")
            assert first < scene.said.index(f" {scene.where} ", first)
            if scene.colour or scene.paints[1]:
                continue
            # The apple is red, the owl yellow, the scissors blue and white.
            red = (picture[..., 0] > 150) & (picture[..., 1] < 90)
            other = (picture.max(axis=-1) > 150) & ~red
            apple, second = (np.argwhere(mask).mean(axis=0)[::-1] / SIZE for mask in (red, other))
            right, down = RELATIONS[scene.where]
            apart = apple - second
            if scene.where in EITHER_SIDE - {"and"}:
                assert abs(apart[0]) > 0.3
            else:
                assert apart[0] * right + apart[1] * down > 0.3
        assert seen == set(RELATIONS)

    def test_coloured(self, stage):
        rng = np.random.default_rng(24)
        given = {"kind": "coloured", "concept": "an owl", "style": "flat", "disturbed": False}
        for _ in range(40):
            picture, scene = drawn(stage, rng, **given)
            assert not held_back(scene.colour, "an owl")
            assert f"{scene.colour} owl" in scene.said.replace("grey", "gray").replace(
                "violet", "purple"
            )
            y = 0.5 if scene.ground not in SCENES or scene.ground in FLOATING else 0.7
            seen = picture[int(y * SIZE), SIZE // 2]
            near = min(COLOURS, key=lambda name, seen=seen: distance(seen, COLOURS[name]))
            assert near == scene.colour

    def test_a_name_that_says_a_colour_is_not_painted(self, scenes):
        rng = np.random.default_rng(25)
        said = {scenes.invent(rng, kind="coloured", concept="a red apple").said for _ in range(50)}
        assert not any("red apple" in text for text in said)


class TestHeldOut:
    def test_combinations_are_never_drawn(self, scenes):
        rng = np.random.default_rng(30)
        assert held_back("cartoon", "an owl")
        assert held_back("green", "an owl")
        for _ in range(3000):
            scene = scenes.invent(rng)
            for concept, colour in zip(scene.concepts, scene.paints, strict=False):
                assert not held_back(scene.style, concept)
                assert colour is None or not held_back(colour, concept)

    def test_but_when_they_are_asked_for(self, scenes):
        rng = np.random.default_rng(31)
        for _ in range(60):
            scene = scenes.invent(rng, "one", held_out="style", disturbed=False)
            assert held_back(scene.style, scene.concepts[0])
            assert any(name in scene.said for name in STYLES[scene.style])
            scene = scenes.invent(rng, "coloured", held_out="colour")
            assert held_back(scene.colour, scene.concepts[0])
            assert not held_back(scene.style, scene.concepts[0])


class TestGround:
    def test_a_thing_stands_on_it(self, stage):
        """Its lower edge is at the ground, up to 0.05 above or below."""
        rng = np.random.default_rng(40)
        for name in SCENES:
            for concept in ("an apple", "an owl"):
                scene = stage.scenes.invent(rng, "one", concept, ground=name)
                [thing] = stage.scenes.arrange(rng, scene)
                lower = thing.y + thing.share * stage.scenes.extents[thing.index][1] / 2
                if name not in FLOATING:
                    assert abs(lower - GROUND) <= 0.05 + 1e-9
                    assert thing.angle == 0
                else:
                    assert abs(thing.y - 0.5) <= 0.05

    def test_and_is_seen_there(self, stage):
        rng = np.random.default_rng(41)
        given = {"kind": "one", "concept": "apple", "style": "flat", "ground": "snow"}
        pictures, _ = stage.batch(20, rng, **given)
        for picture in pictures.numpy().astype(int):
            red = (picture[..., 0] > 180) & (picture[..., 1] < 90)
            lower = (np.nonzero(red)[0].max() + 1) / SIZE
            assert abs(lower - GROUND) <= 0.05 + 1 / SIZE


class TestPaint:
    def test_shading_and_other_colours_stay(self):
        picture = np.array(disc(RED, lopsided=True))
        picture[80:152, 40:80, :3] = (150, 20, 20)  # a shade of it
        painted = paint(picture, "blue")
        assert painted.shape == picture.shape
        assert np.array_equal(painted[..., 3], picture[..., 3])
        assert np.array_equal(painted[120, 190], picture[120, 190])  # white stays white
        plain, shade = painted[190, 85, :3], painted[120, 60, :3]
        assert distance(plain, BLUE) < 0.05
        assert oklab(shade)[0] < oklab(plain)[0] - 0.05

    def test_what_has_no_main_colour_or_has_it_already(self):
        gray = np.array(disc((128, 128, 128)))
        assert paint(gray, "red") is None
        assert paint(np.array(disc(RED)), "red") is None
        half = np.array(disc(RED))
        half[:, :150, :3] = (250, 250, 250)  # too little of it is red
        assert paint(half, "blue") is None

    def test_oklab_and_back(self):
        colours = np.random.default_rng(0).integers(0, 256, (1000, 3), dtype=np.uint8)
        assert np.abs(srgb(oklab(colours)).astype(int) - colours).max() <= 1


class TestPool:
    def test_parts_depend_on_seed_number_and_length_alone(self, scenes, path):
        alone = list(parts(scenes, path, PART + 8, 5))
        others = list(parts(scenes, path, PART + 8, 5, workers=2))
        assert [len(one[0]) for one in alone] == [PART, 8]
        for one, other in zip(alone, others, strict=True):
            assert one[:2] == other[:2]
            assert one[2].bit_generator.state == other[2].bit_generator.state
        assert next(iter(parts(scenes, path, PART, 5)))[:2] == alone[0][:2]
        assert next(iter(parts(scenes, path, 1, 6)))[0] != alone[0][0][:1]

    def test_workers_draw_and_encode_the_same(self, scenes, path, tmp_path):
        Principal(torch.zeros(NUMBERS), torch.eye(NUMBERS)[:, :2], torch.ones(2)).save(
            tmp_path / "principal.safetensors"
        )
        tokenizer = train_vocabulary(scenes.captions_corpus(), 400, tmp_path / "tokenizer", 16)
        place = torch.device("cpu")
        encoder = Encoder(place, 64, 2, tmp_path / "principal.safetensors", tokenizer)
        made = encoded(scenes, path, 20, encoder)
        assert made["latents"].shape == (20, 2, 8, 8)
        assert made["ids"].shape == (20, 16)
        assert made["latents"].std() > 0.1
        fresh = replace(encoder)
        ((latents, ids),) = parts(scenes, path, 20, 64, workers=1, then=fresh)
        # Products of one thread may round otherwise than those of several.
        assert np.abs(latents.astype(float) - made["latents"].double().numpy()).max() < 0.01
        assert np.array_equal(ids, made["ids"].numpy())

    def test_the_same_pictures(self, stage, path):
        pool, again = (Pool(stage, path, 30, 5) for _ in range(2))
        assert len(pool) == 30
        assert pool.scenes == again.scenes
        assert torch.equal(pool.pictures, again.pictures)
