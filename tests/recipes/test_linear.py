"""The closed-form decoder: its filters, and the network that draws the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from recipes.embedded.linear import Filters, check
from recipes.embedded.principal import Principal
from recipes.embedded.sizes import DRY, FULL
from safelight import SafelightError
from safelight.nets.vae import AutoencoderKL


def smooth(count: int, seed: int) -> torch.Tensor:
    """Halved pictures [count, 3, 48, 48], from −1 to 1: random, but smooth."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 9, 9, generator=rng) * 2 - 1
    return F.interpolate(coarse, size=(48, 48), mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def principal() -> Principal:
    pictures = (smooth(64, 0) * 127.5 + 127.5).to(torch.uint8).permute(0, 2, 3, 1)
    return Principal.of([pictures], 8)


@pytest.fixture(scope="module")
def filters(principal: Principal) -> Filters:
    return Filters.of(principal, smooth(64, 0).split(20))


def test_neighbours_tell_more_than_the_components_alone(
    principal: Principal, filters: Filters
) -> None:
    pixels = smooth(16, 1)
    latents = principal.encode(pixels)
    inside = (..., slice(8, -8), slice(8, -8))

    def error(drawn: torch.Tensor) -> float:
        return float((drawn - pixels)[inside].square().mean())

    assert error(filters.picture(latents)) < 0.7 * error(principal.picture(latents))


def test_where_the_latents_are_alike_so_are_the_pixels(filters: Filters) -> None:
    latents = torch.randn(5, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    drawn = filters.picture(latents.expand(5, 8, 6, 6))[..., 8:-8, 8:-8]
    assert float((drawn - drawn[..., :1, :1]).abs().max()) < 1e-3
    # Alike in one direction alone: so are the rows, or the columns.
    rng = torch.Generator().manual_seed(1)
    row = torch.randn(5, 8, 1, 6, generator=rng)
    drawn = filters.picture(row.expand(5, 8, 6, 6))[..., 8:-8, 8:-8]
    assert float((drawn - drawn[..., :1, :]).abs().max()) < 1e-3
    assert float((drawn - drawn[..., :, :1]).abs().max()) > 0.01


@pytest.mark.parametrize("sizes", [DRY, FULL], ids=["small", "full"])
def test_the_network_draws_the_same(filters: Filters, sizes: object) -> None:
    assert sizes in (DRY, FULL)
    torch.manual_seed(1)
    vae = AutoencoderKL((DRY if sizes is DRY else FULL).networks.vae)
    filters.into(vae)
    latents = filters.white.view(1, -1, 1, 1).repeat(2, 1, 6, 6)
    latents[..., 1:-1, 1:-1] += torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    half = filters.picture(latents)
    wanted = F.interpolate(half, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        drawn = vae.decode(latents)
    # At the rim the network has no pixels to interpolate with.
    apart = (drawn - wanted)[..., 2:-2, 2:-2].abs().max()
    assert float(apart) < 5e-3 * float(wanted.abs().max())
    with torch.no_grad():
        kept = vae.half().float().decode(latents)
    assert float((kept - wanted)[..., 2:-2, 2:-2].abs().max()) < 0.03 * float(wanted.abs().max())


def test_what_is_not_needed_can_be_learned(filters: Filters) -> None:
    """Every weight gets a gradient at the first step or at the second."""
    torch.manual_seed(1)
    vae = AutoencoderKL(FULL.networks.vae)
    filters.into(vae)
    latents = torch.randn(1, 8, 4, 4)
    parts = dict(vae.decoder.named_parameters())
    moved: set[str] = set()
    for _ in range(2):
        loss = vae.decode(latents).square().mean()
        for (name, part), slope in zip(
            parts.items(), torch.autograd.grad(loss, [*parts.values()]), strict=True
        ):
            if float(slope.abs().max()) > 0:
                moved.add(name)
            with torch.no_grad():
                part -= 0.01 * slope.sign()
    assert moved == set(parts)


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": (32, 48, 96, 128)},
        {"block_out_channels": (32, 32, 48, 32, 128)},
        {"block_out_channels": (16, 32, 48, 96, 128)},
        {"block_out_channels": (32, 32, 48, 96, 64)},
        {"use_post_quant_conv": False},
    ],
)
def test_other_autoencoders_are_refused(change: dict[str, object]) -> None:
    config = replace(FULL.networks.vae, **change)
    with pytest.raises(SafelightError, match="factor 16, with widths of at least"):
        check(config, config.latent_channels)
