"""Scenes as pictures: grounds, things, paint, and words that change nothing."""

import json
import re

import numpy as np
import pytest
import torch
from things import HELD_OUT, SHOWN

from recipes.embedded import cutouts, grounds
from recipes.embedded.captions import SCENES, bare, corpus
from recipes.embedded.colours import COLOURS, PAINTS, Main, paint
from recipes.embedded.disturb import ADJECTIVES, OPENINGS, TAGS, VERBS, disturb
from recipes.embedded.scenes import Scene, Thing
from safelight.words import split_words

SCISSORS = 7
"""The number of their drawing in the second style."""


class TestGrounds:
    def test_are_always_the_same_and_differ(self):
        pictures = grounds.draw_all(32, 2)
        assert pictures.shape == (len(SCENES), 2, 32, 32, 3)
        assert pictures.dtype == np.uint8
        assert np.array_equal(pictures, grounds.draw_all(32, 2))
        flat = pictures.reshape(-1, pictures[0, 0].size).astype(int)
        apart = np.abs(flat[:, None] - flat[None]).mean(axis=-1)
        assert apart[~np.eye(len(flat), dtype=bool)].min() > 2

    def test_larger_ones_show_the_same(self):
        small, large = (grounds.draw("beach", size, 1) for size in (32, 64))
        halved = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - small).max() <= 1


class TestStage:
    def draw(self, stage, **how):
        thing = Thing(**{"index": SCISSORS, "colour": None, "x": 0.5, "y": 0.5, "share": 0.5} | how)
        scene = Scene("one", ("scissors",), "flat")
        drawn = stage.draw([scene], [[thing]], np.random.default_rng(0))
        return drawn[0].numpy().astype(int)

    def test_turned_mirrored_and_wholly_inside(self, stage):
        # The right half is white, on white.
        plain = self.draw(stage)
        assert plain[32, 46].min() > 240
        assert plain[32, 18].min() < 60
        assert np.abs(self.draw(stage, mirrored=True) - plain[:, ::-1]).mean() < 2
        # Counter-clockwise: what was on the right goes up.
        turned = self.draw(stage, angle=90.0)
        assert turned[18, 32].min() > 240
        assert turned[46, 32].min() < 60
        corner = self.draw(stage, x=0.0, y=0.0)
        assert np.abs(corner[:32, :32] - plain[16:48, 16:48]).mean() < 2
        assert corner[33:].min() == 255

    def test_agrees_with_what_is_asked(self, stage):
        """The background is the scene's; what is in front has the thing's colours."""
        rng = np.random.default_rng(0)
        for ground in COLOURS:
            scene = Scene("one", ("scissors",), "flat", ground)
            picture = stage.compose([scene], rng)[0].numpy().astype(int)
            apart = np.abs(picture[0, 0] - COLOURS[ground]).max()
            assert apart <= (0 if ground == "white" else 6)
        scenes = [Scene("one", ("scissors",), "flat", name) for name in SCENES]
        drawn = stage.compose(scenes, rng).numpy()
        for name, picture in zip(SCENES, drawn, strict=True):
            behind = [grounds.draw(name, 64, number) for number in range(stage.variants)]
            behind += [b[:, ::-1] for b in behind]
            # The uppermost rows have no thing.
            assert any(np.array_equal(picture[:4], b[:4]) for b in behind)

    def test_paints_as_colours_does(self, stage):
        scenes = stage.scenes
        for index in (0, 3):  # the apple and the owl
            for colour in PAINTS:
                hue, *mean = scenes.rows[index]["main"]
                wanted = paint(scenes.pictures[index], colour, Main(hue, tuple(mean)))
                if wanted is None:
                    continue
                painted = torch.from_numpy(scenes.pictures[index : index + 1]).float()
                stage._paint(painted, [Thing(index, colour, 0.5, 0.5, 0.5)])
                found = painted[0].add(0.5).to(torch.uint8).numpy().astype(int)
                # float32 beside float64, and rounding.
                assert np.abs(found - wanted)[wanted[..., 3] > 0].max() <= 1

    def test_data_that_was_looked_at_is_the_same(self, stage, path, tmp_path):
        pictures, about = cutouts.load(path)
        rows = [{name: row[name] for name in ("concept", "style")} for row in about["pictures"]]
        again = cutouts.load(cutouts.save(tmp_path, pictures, rows, about["concepts"]))[1]
        assert [row["clashes"].keys() for row in again["pictures"]] == [
            row["clashes"].keys() for row in about["pictures"]
        ]


class TestDisturb:
    CAPTIONS = (
        "a red cat", "an owl and a dog", "two cats on a red background", "cats", "an owl at night",
    )  # fmt: skip

    @pytest.mark.parametrize("caption", CAPTIONS)
    def test_keeps_every_word_in_its_order(self, caption):
        rng = np.random.default_rng(0)
        ways = set()
        for _ in range(300):
            said = disturb(rng, caption, SHOWN)
            ways.add(said)
            assert said != caption
            kept = iter(split_words(said))
            assert all(
                any(word == found or {word, found} == {"a", "an"} for found in kept)
                for word in split_words(caption)
            )
            for article, after in re.findall(r"\b(an?) (\w)", said):
                assert (article == "an") == (after in "aeiou")
            assert not set(HELD_OUT) & set(split_words(said))
        assert len(ways) > 50

    def test_what_is_added_names_nothing(self):
        """No added word is the name of a thing, a colour or a scene, or a part of such a name."""
        concepts = json.loads(cutouts.CONCEPTS.read_text())
        names = [name for concept in concepts for name in concept["names"]]
        words = {word for text in corpus(names) for word in split_words(text)}
        assert not words & set(ADJECTIVES)
        named = {tuple(split_words(bare(name))) for name in names}
        for phrase in (*VERBS, *TAGS, *OPENINGS):
            said = split_words(phrase)
            parts = {tuple(said[i:j]) for j in range(len(said) + 1) for i in range(j)}
            assert not parts & named, phrase
