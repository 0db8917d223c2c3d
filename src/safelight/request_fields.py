"""The settings of a picture, each described in one place, without PyTorch.

The command line, the three APIs, the page's form, grids, recipes and docs/settings.md are derived
from these fields (see `safelight.settings`): a new setting is one new field here, or in
`request_basics`, which has those of words, size and sampler.
"""

from typing import Annotated

from PIL.Image import Image
from pydantic import BeforeValidator, Field

from safelight.keywords import EmptyNegative, Linears, MaskContent
from safelight.request_basics import BasicFields
from safelight.request_pictures import MAX_REFERENCES, REFERENCES, by_input
from safelight.request_ranges import (
    CacheBranch,
    CacheEvery,
    ControlImage,
    ControlScale,
    ControlShare,
    HiresScale,
    IpAdapterScale,
    Level,
    MaskBlur,
    MaskPadding,
    Score,
    Share,
    Steps,
    Strength,
    ToldPlace,
    ToldSide,
    UpscalerName,
)
from safelight.settings import About
from safelight.upscaling.names import LANCZOS

_DRAWN, _LEVELS = "that of the picture", "set by fast"
_SDXL, _FAST, _CONTROL, _IP_ADAPTER = "SDXL", "Fast mode", "ControlNet", "IP-Adapter"
_PICTURE = "a PIL picture (safelight.picture.open_picture reads one from a file)"
_INPAINTING, _HIRES = "Inpainting", "Second pass"


def _as_pictures(value: object) -> object:
    """Return a list of pictures, or a picture alone, as a tuple; None as an empty one.

    Raises SafelightError for too many.
    """
    if value is None or isinstance(value, Image | list | tuple):
        return tuple(by_input({REFERENCES: value}).values())
    return value


class RequestFields(BasicFields):
    """The fields of a Request, which checks them together."""

    image: Annotated[
        Image | None,
        About(
            accepts=_PICTURE,
            aliases=("--init-image", "--init-img", "--input"),
        ),
    ] = Field(None, exclude=True, repr=False, description="picture to start from")
    mask: Annotated[
        Image | None,
        About(
            accepts="a PIL picture of the size of `image` (safelight.picture.open_mask)",
            aliases=("--mask-image",),
        ),
    ] = Field(
        None,
        exclude=True,
        repr=False,
        description="mask of `image`; white is repainted, black is kept",
    )
    reference_images: Annotated[
        tuple[Image, ...],
        BeforeValidator(_as_pictures),
        Field(max_length=MAX_REFERENCES),
        About(
            accepts=f"up to {MAX_REFERENCES} PIL pictures",
            option="--reference",
            aliases=("--reference-image", "--ref-image"),
            some_models=True,
        ),
    ] = Field(
        (),
        exclude=True,
        repr=False,
        description="pictures to edit as the prompt says, or to take things from",
    )
    mask_padding: Annotated[
        MaskPadding | None,
        About(
            default="the whole picture",
            aliases=("--padding-mask-crop",),
            a1111="inpaint_full_res_padding",
            infotext="Masked area padding",
            slider=(0, 256, 4),
            group=_INPAINTING,
        ),
    ] = Field(None, description="draw only the part around the mask, with so many pixels beside it")
    mask_blur: Annotated[
        MaskBlur,
        About(a1111="mask_blur", infotext="Mask blur", slider=(0, 64, 1), group=_INPAINTING),
    ] = Field(0.0, description="radius in pixels by which the mask's edge is softened")
    mask_content: Annotated[
        MaskContent, About(a1111="inpainting_fill", infotext="Masked content", group=_INPAINTING)
    ] = Field(
        "original",
        description="what the masked part begins with below strength 1; fill is the colours beside",
    )
    control_image: Annotated[
        ControlImage | None,
        About(accepts=_PICTURE, some_models=True, group=_CONTROL),
    ] = Field(
        None,
        exclude=True,
        repr=False,
        description="picture that guides the model's ControlNet, such as edges or depth",
    )
    control_scale: Annotated[
        ControlScale,
        About(
            aliases=("--controlnet-conditioning-scale",),
            slider=(0, 2, 0.05),
            some_models=True,
            group=_CONTROL,
        ),
    ] = Field(1.0, description="how much `control_image` guides; 0 is not at all")
    control_start: Annotated[
        ControlShare,
        About(
            aliases=("--control-guidance-start",),
            slider=(0, 1, 0.05),
            some_models=True,
            group=_CONTROL,
        ),
    ] = Field(0.0, description="share of the steps after which `control_image` begins to guide")
    control_end: Annotated[
        ControlShare,
        About(
            aliases=("--control-guidance-end",),
            slider=(0, 1, 0.05),
            some_models=True,
            group=_CONTROL,
        ),
    ] = Field(1.0, description="share of the steps after which `control_image` stops guiding")
    hires_scale: Annotated[
        HiresScale,
        About(
            aliases=("--hr-scale", "--hires-upscale"),
            a1111="hr_scale",
            slider=(1, 4, 0.05),
            group=_HIRES,
        ),
    ] = Field(
        1.0, description="enlarge the picture so many times and draw it again; 1 is no second pass"
    )
    hires_upscaler: Annotated[
        UpscalerName,
        About(accepts="Lanczos, or an upscaler's name or file", a1111="hr_upscaler", group=_HIRES),
    ] = Field(LANCZOS, description="what enlarges the picture between the passes")
    hires_strength: Annotated[
        Strength,
        About(a1111="denoising_strength", slider=(0.05, 1, 0.05), group=_HIRES),
    ] = Field(0.5, description="how much of the enlarged picture to change; 1 keeps nothing")
    hires_steps: Annotated[
        Steps | None,
        About(
            default="as steps",
            aliases=("--hr-steps",),
            a1111="hr_second_pass_steps",
            group=_HIRES,
        ),
    ] = Field(None, description="steps of the second pass, before `hires_strength` leaves some out")
    ip_adapter_image: Annotated[
        Image | None,
        About(accepts=_PICTURE, some_models=True, group=_IP_ADAPTER),
    ] = Field(
        None,
        exclude=True,
        repr=False,
        description="picture that is a prompt, read through the model's IP-Adapter",
    )
    ip_adapter_scale: Annotated[
        IpAdapterScale,
        About(slider=(0, 2, 0.05), some_models=True, group=_IP_ADAPTER),
    ] = Field(1.0, description="how much `ip_adapter_image` counts; 0 is not at all")
    ip_adapter_start: Annotated[
        Share,
        About(slider=(0, 1, 0.05), some_models=True, group=_IP_ADAPTER),
    ] = Field(0.0, description="share of the steps after which `ip_adapter_image` begins to count")
    ip_adapter_end: Annotated[
        Share,
        About(slider=(0, 1, 0.05), some_models=True, group=_IP_ADAPTER),
    ] = Field(1.0, description="share of the steps after which `ip_adapter_image` stops counting")
    empty_negative: Annotated[
        EmptyNegative | None,
        About(default="model; zeros in a1111, encoded in comfy", some_models=True, group=_SDXL),
    ] = Field(None, description="how SDXL reads an empty negative prompt")
    original_width: Annotated[
        ToldSide | None, About(default=_DRAWN, some_models=True, group=_SDXL)
    ] = Field(None, description="original width, in pixels, that SDXL is told")
    original_height: Annotated[
        ToldSide | None, About(default=_DRAWN, some_models=True, group=_SDXL)
    ] = Field(None, description="original height, in pixels, that SDXL is told")
    target_width: Annotated[
        ToldSide | None, About(default=_DRAWN, some_models=True, group=_SDXL)
    ] = Field(None, description="target width, in pixels, that SDXL is told")
    target_height: Annotated[
        ToldSide | None, About(default=_DRAWN, some_models=True, group=_SDXL)
    ] = Field(None, description="target height, in pixels, that SDXL is told")
    crop_left: Annotated[ToldPlace, About(some_models=True, group=_SDXL)] = Field(
        0, description="pixels cut off at the left, as SDXL is told"
    )
    crop_top: Annotated[ToldPlace, About(some_models=True, group=_SDXL)] = Field(
        0, description="pixels cut off at the top, as SDXL is told"
    )
    refiner_start: Annotated[
        Share,
        About(
            aliases=("--refiner-switch-at",),
            slider=(0, 1, 0.05),
            some_models=True,
            group=_SDXL,
        ),
    ] = Field(0.8, description="share of the steps after which a refiner takes over; 1 is never")
    aesthetic_score: Annotated[Score, About(slider=(0, 10, 0.5), some_models=True, group=_SDXL)] = (
        Field(6.0, description="aesthetic score that SDXL's refiner is told for the picture")
    )
    negative_aesthetic_score: Annotated[
        Score, About(slider=(0, 10, 0.5), some_models=True, group=_SDXL)
    ] = Field(2.5, description="aesthetic score for what to keep out of the picture")
    fast: Annotated[Level, About(slider=(0, 3, 1), some_models=True, group=_FAST)] = Field(
        0, description="how far the picture may change for more speed; 0 changes nothing"
    )
    cache_every: Annotated[
        CacheEvery | None,
        About(default=f"{_LEVELS}, else 1", slider=(1, 10, 1), some_models=True, group=_FAST),
    ] = Field(
        None,
        description="compute the whole network only in every N-th step; the others reuse its "
        "deep part (DeepCache)",
    )
    cache_branch: Annotated[
        CacheBranch | None,
        About(default="0", slider=(0, 11, 1), some_models=True, group=_FAST),
    ] = Field(
        None,
        description="with cache_every, how many more layers the other steps compute",
    )
    guidance_start: Annotated[
        Share | None,
        About(
            default=f"{_LEVELS}, else the model's own, else 0",
            slider=(0, 1, 0.05),
            some_models=True,
            group=_FAST,
        ),
    ] = Field(None, description="share of the steps after which guidance begins")
    guidance_end: Annotated[
        Share | None,
        About(
            default="the model's own, else 1",
            slider=(0, 1, 0.05),
            some_models=True,
            group=_FAST,
        ),
    ] = Field(None, description="share of the steps after which guidance ends")
    text_end: Annotated[
        Share | None,
        About(default="1", slider=(0, 1, 0.05), some_models=True, group=_FAST),
    ] = Field(
        None,
        description="share of the steps after which attention to the text is not computed again "
        "(T-GATE)",
    )
    linears: Annotated[
        Linears | None,
        About(default=f"{_LEVELS}, else plain", some_models=True, group=_FAST),
    ] = Field(
        None,
        description="how linear layers and 1×1 convolutions multiply: in the model's precision, or "
        "in integers of 8 bits",
    )
    unconditional: bool = Field(
        False, description="draw from noise alone, with a model that takes no prompt"
    )
