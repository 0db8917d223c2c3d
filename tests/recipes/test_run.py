"""The whole vocabulary at 256, in small: names, scenes on a device, minutes, the folder."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import safelight
from safelight import SafelightError
from safelight.cli import app
from safelight.train import cutouts, large, loop
from safelight.train.captions import STYLES, bare
from safelight.train.drawing import Thing
from safelight.train.loop import Plan, fit
from safelight.train.recipe import MIXED, Scenes
from safelight.train.stage import Stage
from safelight.train.vocabulary import named, whole

CONCEPTS = [
    {"code": "1", "names": ["a red kite", "a kite"]},
    {"code": "2", "names": ["an orange"]},
    {"code": "3", "names": ["a blue door", "a door"], "flip": False},
]


def shape(number: int) -> np.ndarray:
    """A kite, a disc with a white right half, a door."""
    image = Image.new("RGBA", (160, 160))
    draw = ImageDraw.Draw(image)
    if number == 0:
        draw.polygon([(80, 0), (159, 60), (80, 159), (30, 60)], fill=(214, 40, 40, 255))
    elif number == 1:
        draw.ellipse((0, 0, 159, 159), fill=(247, 140, 30, 255))
        draw.pieslice((0, 0, 159, 159), -30, 30, fill=(255, 255, 255, 255))
    else:
        draw.rectangle((40, 0, 119, 159), fill=(40, 92, 212, 255))
        draw.rectangle((60, 20, 99, 60), fill=(150, 190, 240, 255))
    return cutouts.cut_out(image)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"concept": concept["names"][0], "style": style} for concept in CONCEPTS for style in STYLES
    ]
    pictures = np.stack([shape(i) for i in range(len(CONCEPTS)) for _ in STYLES])
    cutouts.save(folder, pictures, rows, CONCEPTS, packed=True)
    return folder


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("ostrich", "an ostrich"),
        ("person: red hair", "a person with red hair"),
        ("man: bald", "a bald man"),
        ("woman: beard", "a woman with a beard"),
        ("women wrestling", "women wrestling"),
        ("man lifting weights", "a man lifting weights"),
        ("bus stop", "a bus stop"),
        ("oncoming bus", "an oncoming bus"),
        ("glasses", "glasses"),
        ("glass of milk", "a glass of milk"),
        ("cooked rice", "cooked rice"),
        ("Statue of Liberty", "the statue of liberty"),
        ("woman’s hat", "a woman's hat"),
    ],
)
def test_labels_become_nouns(label: str, name: str) -> None:
    assert named(label) == name


def test_a_vocabulary_has_every_name_once() -> None:
    emoji = [
        {"hexcode": "A", "label": "apple", "group": 4, "subgroup": 42, "order": 2},
        {"hexcode": "B-FE0F", "label": "left shoe", "group": 7, "subgroup": 65, "order": 1},
        {"hexcode": "C", "label": "heavy plus", "group": 8, "subgroup": 90, "order": 0},
        {"hexcode": "D", "label": "middle finger", "group": 1, "subgroup": 18, "order": 3},
        {"hexcode": "E", "label": "sun", "group": 5, "subgroup": 59, "order": 4},
        {"hexcode": "F", "label": "kitty", "group": 3, "subgroup": 34, "order": 5},
        {"hexcode": "G", "label": "component"},
    ]
    codes = [{"A": ["pome", "fruit"], "B-FE0F": "boot", "E": "sunny", "F": ["fruit", "cats"]}]
    found = whole(emoji, codes, [{"code": "f", "names": ["a cat", "a boot"]}])
    assert found == [
        {"code": "f", "names": ["a cat", "a boot"]},
        {"code": "b", "names": ["a left shoe"], "flip": False},
        {"code": "a", "names": ["an apple", "a pome", "a fruit"]},
        {"code": "e", "names": ["a sun"]},
    ]
    said = [bare(name) for concept in found for name in concept["names"]]
    assert len(said) == len(set(said))


class TestStage:
    def test_composes_as_the_cpu_does(self, data: Path) -> None:
        """But for what pixels between pixels are: outlines differ, and nothing else."""
        scenes = Scenes(data / "cutouts.npz", 64, kinds=MIXED, steady=True)
        stage = Stage(scenes, "cpu")
        rng = np.random.default_rng(0)
        invented = [scenes.invent(rng) for _ in range(40)]
        seeds = range(len(invented))
        ours = [scenes.compose(np.random.default_rng(i), invented[i]) for i in seeds]
        arranged = [scenes.arrange(np.random.default_rng(i), invented[i]) for i in seeds]
        grounds = torch.from_numpy(np.stack([ground for ground, _ in arranged]))
        drawn = stage.draw(grounds, [things for _, things in arranged]).numpy()
        assert {scene.kind for scene in invented} == set(MIXED)
        assert (drawn[:, 0, 0] == grounds.numpy()).all()
        apart = np.abs(np.stack(ours).astype(int) - drawn).max(axis=-1)
        assert np.quantile(apart, 0.85) <= 3
        assert apart.mean(axis=(1, 2)).max() < 12

    def test_turned_mirrored_and_wholly_inside(self, data: Path) -> None:
        stage = Stage(Scenes(data / "cutouts.npz", 64, styles=["flat"]), "cpu")
        white = torch.full((1, 3), 255)

        def draw(**how: Any) -> np.ndarray:
            thing = Thing(**{"index": 4, "colour": None, "x": 0.5, "y": 0.5, "share": 0.5} | how)
            return stage.draw(white, [[thing]])[0].numpy().astype(int)

        # Of the orange, the white wedge is on the right.
        assert draw()[32, 46].min() > 240
        assert draw()[32, 18].min() < 60
        assert np.abs(draw(mirrored=True) - draw()[:, ::-1]).mean() < 2
        # Counter-clockwise: the wedge goes up.
        assert draw(angle=90.0)[18, 32].min() > 240
        assert draw(angle=90.0)[46, 32].min() < 60
        corner = draw(x=0.0, y=0.0)
        assert np.abs(corner[:32, :32] - draw()[16:48, 16:48]).mean() < 2
        assert corner[33:].min() == 255

    def test_data_that_is_packed_is_the_same(self, data: Path, tmp_path: Path) -> None:
        """What was looked at once is what is found by looking."""
        pictures, about = cutouts.load(data / "cutouts.npz")
        rows = [{name: row[name] for name in ("concept", "style")} for row in about["pictures"]]
        plain = Scenes(cutouts.save(tmp_path, pictures, rows, about["concepts"]), 64, kinds=MIXED)
        packed = Scenes(data / "cutouts.npz", 64, kinds=MIXED)
        for number in range(60):
            one, other = (
                scenes.sample(np.random.default_rng(number)) for scenes in (plain, packed)
            )
            assert one[1] == other[1]
            assert np.array_equal(one[0], other[0])


class TestMinutes:
    PLAN = Plan(steps=0, batch=1, learning_rate=1e-2, warmup=2, seconds=1.0)

    def train(self, folder: Path, plan: Plan = PLAN, stop_at: int | None = None) -> torch.Tensor:
        steps = 0

        def loss_of(run: Any, draw: Any) -> torch.Tensor:
            nonlocal steps
            if steps == stop_at:
                raise KeyboardInterrupt
            steps += 1
            time.sleep(0.005)
            return (run(torch.randn(4, 2, generator=draw.noise)) - 1).square().mean()

        torch.manual_seed(0)
        return fit(torch.nn.Linear(2, 1), loss_of, plan, folder, log=lambda _: None)["weight"]

    def test_end_in_time_and_go_on_as_begun(self, tmp_path: Path) -> None:
        whole_run = self.train(tmp_path / "a")
        steps = int((tmp_path / "a" / "steps").read_text())
        assert loop.PACE[1] < steps <= 250
        # Another run of as many steps, stopped before its pace was known and after.
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "b", stop_at=20)
        (tmp_path / "b" / "steps").write_text(str(steps))
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "b", stop_at=15)
        assert torch.equal(self.train(tmp_path / "b"), whole_run)
        assert torch.equal(self.train(tmp_path / "b", stop_at=0), whole_run)

    def test_the_rate_falls_to_nothing(self) -> None:
        plan = self.PLAN.paced(200)
        rates = [plan.rate(step) for step in range(200)]
        assert rates[1:101] == [1e-2] * 100
        assert rates[199] == pytest.approx(1e-2 / 100)


def test_dry_run_draws_what_diffusers_draws(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PACE", (2, 6))
    monkeypatch.setattr(large, "SHARES", {"autoencoder": 1, "scenes": 1, "words": 1, "denoiser": 1})
    made = large.train_large(data, tmp_path, minutes=0.02, sizes=large.DRY)
    weights = sorted(made.rglob("*.safetensors"))
    assert len(weights) == 3
    before = [hashlib.sha256(path.read_bytes()).digest() for path in weights]
    # Again: all of it is there.
    large.train_large(data, tmp_path, minutes=0.02, sizes=large.DRY)
    assert before == [hashlib.sha256(path.read_bytes()).digest() for path in weights]
    with pytest.raises(SafelightError, match="made by another plan"):
        large.train_large(data, tmp_path, minutes=0.03, sizes=large.DRY)
    assert "emojibase" in (made / "NOTICE").read_text()

    model = safelight.load(str(made), dtype="float32")
    assert model.native_size == (64, 64)
    assert model.words is not None
    assert {"kite", "orange", "background"} <= model.words
    settings: dict[str, Any] = {"steps": 6, "seed": 3, "sampler": "ddim", "guidance_scale": 3.0}
    ours = model.generate("a red kite", **settings).images[0]
    assert np.asarray(ours).std() > 1

    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(made, dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    theirs = pipe("a red kite", num_inference_steps=6, guidance_scale=3.0, generator=noise)
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs.images[0]).astype(int))
    assert apart.max() <= 1


def test_the_real_one_fits_in_what_may_ship() -> None:
    from safelight.nets.clip import CLIPTextModel
    from safelight.nets.unet import UNet2DConditionModel
    from safelight.nets.vae import AutoencoderKL

    sizes = large.WHOLE
    with torch.device("meta"):
        nets = (
            AutoencoderKL(sizes.vae),
            CLIPTextModel(sizes.text),
            UNet2DConditionModel(sizes.unet),
        )
    weights = sum(p.numel() for net in nets for p in net.parameters())
    assert 2 * weights < 31.5 * 2**20
    assert sizes.unet.sample_size == sizes.size // sizes.vae.factor
    assert sizes.vae.factor == 8
    assert sum(large.SHARES.values()) <= 0.95


def test_commands_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["embedded-256"], "build it with `safelight train data data/256 --whole`"),
        (["embedded-256", "--minutes", "0"], "--minutes 0: expected 0.05 to 1440"),
    ):
        result = CliRunner().invoke(app, ["train", *arguments])
        assert isinstance(result.exception, SafelightError)
        assert message in str(result.exception)
