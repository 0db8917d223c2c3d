"""The whole recipe in small: folders that load, runs that resume, and what they begin from."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import safelight
from recipes.embedded import sharpen as sharpening
from recipes.embedded.__main__ import STAGES, app
from recipes.embedded.pool import Pool
from recipes.embedded.principal import Principal
from recipes.embedded.redraw import redraw
from recipes.embedded.sharpen import sharpen
from recipes.embedded.sizes import DRY, FULL, SHARES
from recipes.embedded.stage import Stage
from recipes.embedded.train import Recipe, _Decode
from safelight import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet import UNet2DConditionModel
from safelight.nets.vae import AutoencoderKL
from safelight.train.autoencoder import edge_error, to_pixels

ROOT = Path(__file__).parents[2]


def run(data: Path, out: Path, *stages: str, **options: Any) -> Recipe:
    recipe = Recipe(data, out, 1.0, DRY, **options)
    for stage in stages:
        recipe.prompts(8) if stage == "prompts" else getattr(recipe, stage)()
    return recipe


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all weights and notes."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.json")]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what all stages of a dry run wrote."""
    out = tmp_path_factory.mktemp("made")
    run(data, out, *STAGES)
    return out


def test_the_folder_draws_what_diffusers_draws(made: Path) -> None:
    model = safelight.load(str(made / "embedded"), dtype="float32")
    assert model.native_size == (64, 64)
    assert model.words is not None
    assert {"apple", "owl", "background", "snow"} <= model.words
    settings: dict[str, Any] = {"steps": 6, "seed": 3, "sampler": "ddim", "guidance_scale": 3.0}
    ours = model.generate("a red apple", **settings).images[0]
    assert np.asarray(ours).std() > 1

    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(made / "embedded", dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    theirs = pipe("a red apple", num_inference_steps=6, guidance_scale=3.0, generator=noise)
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs.images[0]).astype(int))
    assert apart.max() <= 1


def test_the_other_stages(made: Path) -> None:
    model = safelight.load(str(made / "embedded-unconditional"), dtype="float32")
    assert np.asarray(model.generate(steps=3, seed=1, sampler="ddim").images[0]).shape[0] == 16
    assert len((made / "prompts.txt").read_text().splitlines()) == 8
    for folder in ("embedded", "embedded-unconditional"):
        assert "emojibase" in (made / folder / "NOTICE").read_text()


def test_the_trained_decoder_is_the_one_in_the_folder(data: Path, made: Path) -> None:
    shipped = load_file(made / "embedded" / "vae" / "diffusion_pytorch_model.safetensors")
    trained = load_file(made / "decoder.safetensors")
    for name, weight in shipped.items():
        assert torch.equal(weight, trained[name].half()), name
    # The encoder stays what the components are.
    vae = AutoencoderKL(DRY.networks.vae)
    vae.load_state_dict(trained)
    Principal.load(made / "principal.safetensors").into(vae)
    assert all(torch.equal(weight, trained[name]) for name, weight in vae.state_dict().items())
    # All of it is there: nothing is trained, and the folder stays.
    before = hashes(made)
    run(data, made, "decoder", "embedded")
    assert hashes(made) == before
    with pytest.raises(SafelightError, match="made by other settings"):
        Recipe(data, made, 2.0, DRY).embedded()


@pytest.mark.parametrize("stage", ["decoder"])  # the others are test_train's
def test_kill_in_the_middle_changes_no_weight(
    data: Path, made: Path, tmp_path: Path, stage: str
) -> None:
    """SIGKILL ends the run after the stage's first checkpoint."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "decoder.safetensors").unlink()
    for folder in ("decoder", "previews"):
        shutil.rmtree(tmp_path / folder)
    code = f"""
import os, signal, sys
from pathlib import Path
from recipes.embedded.sizes import DRY
from recipes.embedded.train import Recipe
from safelight.train import loop

save = loop.save_whole
def save_and_die(path, *rest):
    save(path, *rest)
    if path.parent.name == {stage!r}:
        os.kill(os.getpid(), signal.SIGKILL)
loop.save_whole = save_and_die
recipe = Recipe(Path(sys.argv[1]), Path(sys.argv[2]), 1.0, DRY)
recipe.decoder()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(data), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    state = torch.load(tmp_path / stage / "checkpoint.pt", weights_only=True)
    assert state["step"] == DRY.every
    run(data, tmp_path, "decoder", "previews")
    assert hashes(tmp_path / "embedded") == hashes(made / "embedded")


class TestBegin:
    def test_trains_further_what_is_there(self, data: Path, made: Path, tmp_path: Path) -> None:
        run(data, tmp_path, "embedded", begin=made / "embedded")
        for stage in ("decoder", "words", "alone"):
            assert not (tmp_path / stage).exists()
        before, after = hashes(made / "embedded"), hashes(tmp_path / "embedded")
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"unet/diffusion_pytorch_model.safetensors"}
        # The loss goes on from where it was, and not from that of weights that say nothing.
        weights = [
            torch.load(folder / "scenes" / "checkpoint.pt", weights_only=True)["average"]
            for folder in (made, tmp_path)
        ]
        fresh = Recipe(data, tmp_path / "fresh", 1.0, DRY)
        assert fresh.digest != Recipe(data, tmp_path, 1.0, DRY, begin=made / "embedded").digest
        apart = [
            float((a - b).norm() / a.norm().clamp(min=1e-6)) for a, b in zip(*weights, strict=True)
        ]
        assert np.median(apart) < 0.2

    def test_the_decoder_too_by_its_own_stage(self, data: Path, made: Path, tmp_path: Path) -> None:
        run(data, tmp_path, "decoder", "embedded", begin=made / "embedded")
        before, after = hashes(made / "embedded"), hashes(tmp_path / "embedded")
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        }

    def test_stages_that_were_begun_are_gone_through_again(
        self, data: Path, made: Path, tmp_path: Path
    ) -> None:
        run(data, tmp_path, "alone", begin=made / "embedded")
        alone = hashes(tmp_path / "embedded")
        run(data, tmp_path, "embedded", begin=made / "embedded")
        assert hashes(tmp_path / "embedded") != alone
        run(data, tmp_path, "alone", begin=made / "embedded")
        assert hashes(tmp_path / "embedded") == alone

    def test_pictures_are_composed_ahead(self, data: Path, made: Path, tmp_path: Path) -> None:
        Recipe(data, tmp_path, 1.0, DRY, begin=made / "embedded").compose("embedded")
        files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*")}
        assert len(files) == 2
        run(data, tmp_path, "embedded", begin=made / "embedded")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*")} == files

    def test_refuses_what_is_no_such_folder(self, data: Path, made: Path, tmp_path: Path) -> None:
        with pytest.raises(SafelightError, match="no model"):
            Recipe(data, tmp_path, 1.0, DRY, begin=tmp_path / "nowhere")
        larger = replace(DRY, networks=FULL.networks)
        recipe = Recipe(data, tmp_path, 1.0, larger, begin=made / "embedded")
        with pytest.raises(SafelightError, match="has other sizes than the recipe's"):
            recipe.embedded()


def test_sharpen_lowers_its_loss(
    stage: Stage, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharpening, "AHEAD", 5)
    # The test measures the error, which the discriminator does not lower: give it less weight.
    monkeypatch.setattr(sharpening, "WEIGHT", 0.2)
    torch.manual_seed(0)
    vae = AutoencoderKL(replace(DRY.networks.vae, scaling_factor=1.0))
    pool = Pool(stage, path, 8, 2, kind="one", ground="white")
    pixels = to_pixels(pool.pictures)
    halves = torch.nn.functional.avg_pool2d(pixels, 2)
    principal = Principal.of([pool.pictures[:, ::2, ::2]], vae.config.latent_channels)
    latents = principal.encode(halves)
    redrawn = latents.flip(0)[:4]  # of other pictures: nobody but `redrawn` tells whose they are

    @torch.no_grad()
    def loss(latents: torch.Tensor, pixels: torch.Tensor) -> float:
        drawn = vae.decode(latents)
        return float((drawn - pixels).abs().mean() + edge_error(drawn, pixels))

    before = loss(latents, pixels), loss(redrawn, pixels[:4])
    plan = replace(DRY.decoder_plan, steps=40, batch=4, learning_rate=2e-3, ema=0.9)
    sharpen(_Decode(vae), principal, pool, plan, tmp_path / "plain", listen=10)
    assert loss(latents, pixels) < 0.8 * before[0]
    plain = loss(redrawn, pixels[:4])
    plan = replace(plan, steps=30)
    sharpen(_Decode(vae), principal, pool, plan, tmp_path / "redrawn", redrawn=redrawn, listen=10)
    assert loss(redrawn, pixels[:4]) < 0.9 * plain


def test_a_picture_drawn_again_is_still_that_picture(made: Path, stage: Stage, path: Path) -> None:
    model = safelight.load(str(made / "embedded"), dtype="float32")
    principal = Principal.load(made / "principal.safetensors")
    pool = Pool(stage, path, 8, 2)
    again = redraw(model, principal, pool, 6)
    assert again.shape == (6, 8, 4, 4)
    assert torch.equal(again, redraw(model, principal, pool, 6))
    own = principal.encode(torch.nn.functional.avg_pool2d(to_pixels(pool.pictures[:6]), 2))
    assert float((again - own).abs().mean()) > 0.05
    apart = torch.cdist(again.float().flatten(1), own.flatten(1))
    assert apart.argmin(dim=1).tolist() == list(range(6))


def test_the_real_one_fits_in_what_may_ship() -> None:
    net = FULL.networks
    with torch.device("meta"):
        nets = AutoencoderKL(net.vae), CLIPTextModel(net.text), UNet2DConditionModel(net.unet)
    weights = sum(p.numel() for net in nets for p in net.parameters())
    # 32 MiB with the vocabulary and the other files, which take 0.1.
    assert 2 * weights < 31.9 * 2**20
    assert net.unet.sample_size == FULL.size // net.vae.factor
    assert net.vae.factor == 16
    assert sum(SHARES.values()) <= 0.95


def test_fewer_scenes_are_fewer_pictures_for_the_decoder() -> None:
    half = FULL.with_scenes(FULL.scenes // 2)
    assert (2 * half.pictures, 2 * half.redrawn) == (FULL.pictures, FULL.redrawn)
    assert half.linear == FULL.linear


def test_commands(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["embedded"], "is missing: run the data stage first"),
        (["embedded", "--minutes", "0"], "--minutes 0: expected 0.05 to 100000"),
        (["embedded", "--scenes", "5"], "--scenes 5: expected 512 to 1000000"),
        (
            ["shiny"],
            "no stage 'shiny': the stages are alone, embedded, decoder, previews, unconditional",
        ),
        (["decoder", "--batch", "0"], "--batch 0: expected 1 to 8192"),
        (["decoder", "--decoder-batch", "0"], "--decoder-batch 0: expected 1 to 8192"),
        (["unconditional", "--pixels-batch", "9999"], "--pixels-batch 9999: expected 1 to 8192"),
        (["embedded", "--learning-rate", "1"], "--learning-rate 1.0: expected above 0 and below 1"),
    ):
        result = CliRunner().invoke(app, ["train", *arguments])
        assert isinstance(result.exception, SafelightError)
        assert message in str(result.exception)
    arguments = ["train", "prompts", "--dry-run", "--data", str(data), "--out", "out"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert len(Path("out/prompts.txt").read_text().splitlines()) == 64
