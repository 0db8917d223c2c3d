"""The bodies that clients of AUTOMATIC1111's web UI send: their fields, types and defaults."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, cast

from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    model_validator,
)

from safelight.request import Request


def plain_number(value: object) -> object:
    """Return 20 for "20" and for 20.0, which some programs send; other values unchanged."""
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                value = kind(value)
                break
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[StrictInt, BeforeValidator(plain_number), Field(ge=-(2**63), le=2**64)]
Number = Annotated[StrictFloat, BeforeValidator(plain_number), Field(allow_inf_nan=False)]


class DrawBody(BaseModel):
    """The fields that both kinds of picture share, with AUTOMATIC1111's defaults.

    Fields that are not named here are echoed and change nothing.
    """

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] = []
    seed: Whole = -1
    subseed: Whole = -1
    subseed_strength: Number = 0.0
    seed_resize_from_h: Whole = -1
    seed_resize_from_w: Whole = -1
    sampler_name: str | None = None
    sampler_index: str = "Euler"
    scheduler: str | None = None
    batch_size: Annotated[Whole, Field(ge=1)] = 1
    n_iter: Annotated[Whole, Field(ge=1)] = 1
    steps: Whole = 50
    cfg_scale: Number = 7.0
    # 512 in A1111, where every model draws that size. Here the default is the model's own size, or
    # the picture's: a model of 64 pixels cannot draw 512.
    width: Whole | None = None
    height: Whole | None = None
    restore_faces: bool = False
    tiling: bool = False
    eta: Number | None = None
    s_churn: Number = 0.0
    s_noise: Number = 1.0
    s_min_uncond: Number = 0.0
    refiner_checkpoint: str | None = None
    refiner_switch_at: Number | None = None
    override_settings: dict[str, Any] = {}
    infotext: str | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] = {}
    send_images: bool = True
    # The server keeps every picture anyway.
    save_images: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        fields = cast("dict[str, Any]", sent)
        return {name: value for name, value in fields.items() if value is not None}


class TextToImage(DrawBody):
    enable_hr: bool = False
    denoising_strength: Number = 0.75
    hr_scale: Number = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: Annotated[Whole, Field(ge=0)] = 0
    hr_resize_x: Annotated[Whole, Field(ge=0)] = 0
    hr_resize_y: Annotated[Whole, Field(ge=0)] = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    hr_cfg: Number | None = None  # of the web UI's descendants


class ImageToImage(DrawBody):
    init_images: list[str] = []
    resize_mode: Annotated[Whole, Field(ge=0, le=3)] = 0
    denoising_strength: Number = 0.75
    mask: str | None = None
    mask_blur: Annotated[Whole, Field(ge=0)] = 4
    inpainting_fill: Annotated[Whole, Field(ge=0, le=3)] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Annotated[Whole, Field(ge=0)] = 0
    inpainting_mask_invert: bool = False
    initial_noise_multiplier: Number = 1.0
    include_init_images: bool = False


class PngInfo(BaseModel):
    image: str


@dataclass(frozen=True)
class Sent:
    """The decoded pictures of a body: the picture in RGB, the mask in L with values 0 and 255."""

    image: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Asked:
    """A body that was understood.

    parameters: the body as the answer repeats it, in JSON's types. size: what the pictures are
    enlarged to; None to keep them as drawn.
    """

    request: Request
    size: tuple[int, int] | None
    warnings: list[str]
    parameters: dict[str, Any]
