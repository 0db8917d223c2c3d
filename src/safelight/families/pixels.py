"""Unconditional models of pixels: one UNet2DModel, neither text nor autoencoder (DDPM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.families.base import Conditioning, Family
from safelight.families.part import Part

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.nets.reuse import Reuse
    from safelight.request import Request
    from safelight.weights.plan import Plan


class Pixels(Family):
    """Models of diffusers' DDPMPipeline (arXiv:2006.11239)."""

    name = "pixels"
    kind = "pixels"
    title = "unconditional models"
    uses_prompt = False
    pipelines = ("DDPMPipeline", "DDIMPipeline")
    parts = {"unet": Part("safelight.nets.unet2d", "UNet2DModel", "UNet2DConfig")}  # noqa: RUF012
    flat = True
    fixed_size = True

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        unet = configs["unet"]
        if unet.in_channels != unet.out_channels or unet.in_channels not in (1, 3):
            raise SafelightError(
                f"its unet reads {unet.in_channels} channels and gives {unet.out_channels}; "
                "pictures have 3, or 1 if they are gray"
            )

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        side = configs["unet"].sample_size
        if not side:
            raise SafelightError("unet/config.json needs a sample_size")
        return side, side

    def check_request(self, model: Model | Plan, request: Request) -> None:
        for field in ("prompt", "image"):
            if getattr(request, field):
                raise SafelightError(
                    f"{model.name} draws from noise alone: ask for unconditional, without prompt "
                    "or picture",
                    field=field,
                )
        if (request.width, request.height) not in ((None, None), model.native_size):
            width, height = model.native_size
            raise SafelightError(
                f"{model.name} draws {width}x{height}: leave out width and height", field="width"
            )

    def call(
        self,
        model: Model,
        inputs: list[Tensor],
        timesteps: list[float],
        conditionings: list[Conditioning],
        reuse: Reuse | None = None,
    ) -> Tensor:
        import torch

        x = torch.cat(inputs).to(model.dtype)
        return model.network(x, torch.tensor(timesteps, device=x.device)).float()
