"""The closed-form encoder: its components, and the network that computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recipes.embedded.principal import NUMBERS, Principal, check
from recipes.embedded.sizes import DRY, FULL
from safelight import SafelightError
from safelight.nets.vae import AutoencoderKL
from safelight.train.autoencoder import to_pixels


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Halved pictures: random, but smooth, and redder than blue."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(48, 3, 5, 5, generator=rng) * torch.tensor([255, 150, 60])[:, None, None]
    fine = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)
    return fine.to(torch.uint8).permute(0, 2, 3, 1)


def test_latents_are_what_principal_components_are(pictures: torch.Tensor) -> None:
    principal = Principal.of(pictures.split(10), 8)
    pixels = to_pixels(pictures)
    latents = principal.encode(pixels)
    assert latents.shape == (48, 8, 4, 4)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-3)
    assert float(latents.var()) == pytest.approx(1, rel=1e-2)
    rows = latents.permute(1, 0, 2, 3).flatten(1)
    together = torch.corrcoef(rows) - torch.eye(8)
    assert float(together.abs().max()) < 1e-3
    assert (rows.var(dim=1).diff() <= 1e-3).all()

    # The same as a singular value decomposition's.
    patches = F.pixel_unshuffle(pixels, 8).permute(0, 2, 3, 1).reshape(-1, NUMBERS)
    directions = torch.linalg.svd(patches - patches.mean(dim=0), full_matrices=False)[2][:8]
    assert float((directions @ principal.parts).abs().diagonal().min()) > 0.999

    # With as many components as there are numbers, nothing is lost.
    whole = Principal.of([pictures], NUMBERS)
    apart = (whole.picture(whole.encode(pixels)) - pixels).abs().max()
    assert float(apart) < 0.02
    lost = (principal.picture(latents) - pixels).square().mean()
    fewer = Principal.of([pictures], 3)
    assert lost < (fewer.picture(fewer.encode(pixels)) - pixels).square().mean()


@pytest.mark.parametrize("sizes", [DRY, FULL], ids=["small", "full"])
def test_the_network_encodes_the_same(pictures: torch.Tensor, sizes: object) -> None:
    assert sizes in (DRY, FULL)
    config = (DRY if sizes is DRY else FULL).networks.vae
    principal = Principal.of([pictures], config.latent_channels)
    torch.manual_seed(1)
    vae = AutoencoderKL(config)
    principal.into(vae)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    halves = F.avg_pool2d(pixels, 2)
    wanted = principal.encode(halves)
    for weights in (vae, vae.half().float()):
        with torch.no_grad():
            mean, deviation = weights.encode(pixels)
        assert float((mean - wanted).abs().max()) < 5e-3 * float(wanted.abs().max())
        assert float(deviation.max()) < 1e-4


def test_it_can_be_kept(pictures: torch.Tensor, tmp_path: Path) -> None:
    principal = Principal.of([pictures], 8)
    principal.save(tmp_path / "principal.safetensors")
    again = Principal.load(tmp_path / "principal.safetensors")
    for name in ("mean", "parts", "scale"):
        assert torch.equal(getattr(again, name), getattr(principal, name))


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": (32, 48, 96, 128)},
        {"block_out_channels": (32, 8, 48, 96, 128)},
        {"block_out_channels": (32, 32, 48, 128, 128)},
        {"latent_channels": 64},
        {"mid_block_add_attention": True},
        {"use_quant_conv": False},
        {"layers_per_block": 2},
    ],
)
def test_other_autoencoders_are_refused(change: dict[str, object]) -> None:
    config = replace(FULL.networks.vae, **change)
    with pytest.raises(SafelightError, match="factor 16 with one layer a block"):
        check(config, config.latent_channels)
