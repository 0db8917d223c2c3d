"""The settings of a picture, each described in one place, without PyTorch.

The command line, the three APIs, the page's form, grids, recipes and docs/settings.md are derived
from these fields (see `safelight.settings`): a new setting is one new field here.
"""

import secrets
from typing import Annotated

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from safelight.adapters.asked import Unmatched
from safelight.keywords import EmptyNegative, Linears, MaskContent, Schedule, Spacing
from safelight.prompt.reading import Emphasis, Syntax
from safelight.request_ranges import (
    CacheBranch,
    CacheEvery,
    ClipSkip,
    ControlImage,
    ControlScale,
    ControlShare,
    Count,
    Guidance,
    HiresScale,
    IpAdapterScale,
    Level,
    MaskBlur,
    MaskPadding,
    Score,
    Seed,
    Share,
    Side,
    Steps,
    Strength,
    ToldPlace,
    ToldSide,
)
from safelight.settings import About, Texts

PICTURES = ("image", "mask", "control_image", "ip_adapter_image")
"""The settings that are pictures. Recipes and databases have their digests in their place."""


def draw_seed() -> int:
    """Return a random seed of 32 bits: few enough digits to read out to someone."""
    return secrets.randbelow(2**32)


def _samplers() -> tuple[str, ...]:
    from safelight.sampling import SAMPLERS

    return tuple(SAMPLERS)


_OWN, _OWN_SIZE = "the model's own", "the model's own, or the picture's"
_DRAWN, _LEVELS = "that of the picture", "set by fast"
_SDXL, _FAST, _CONTROL, _IP_ADAPTER = "SDXL", "Fast mode", "ControlNet", "IP-Adapter"
_PICTURE = "a PIL picture (safelight.picture.open_picture reads one from a file)"
_INPAINTING, _HIRES = "Inpainting", "Second pass"


class RequestFields(BaseModel):
    """The fields of a Request, which checks them together."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )

    prompt: str = Field("", description="what to draw")
    negative_prompt: Annotated[str, About(aliases=("--negative",))] = Field(
        "", description="what to keep out of the picture"
    )
    prompt_syntax: Annotated[Syntax, About(aliases=("--syntax",), infotext="Prompt syntax")] = (
        Field("plain", description="how brackets and weights in both prompts are read")
    )
    emphasis: Emphasis = Field(
        "original", description="how a1111 weights, such as (red:1.3), are applied"
    )
    clip_skip: Annotated[
        ClipSkip | None,
        About(
            default="1, the last layer",
            infotext="Clip skip",
            slider=(1, 12, 1),
        ),
    ] = Field(None, description="layer of the text encoder that is read, 1 being the last")
    loras: Annotated[
        Texts,
        About(
            option="--lora",
            accepts="name, name:weight or name:weight:text_weight",
        ),
    ] = Field((), description="LoRAs and their kin, each with its weight, 1 if it has none")
    lora_unmatched: Unmatched = Field(
        "error", description="what becomes of a LoRA's keys that belong to nothing in the model"
    )
    embeddings: Annotated[Texts, About(option="--embedding", accepts="a name")] = Field(
        (), description="textual inversions, whose names in a prompt stand for their vectors"
    )
    styles: Annotated[Texts, About(option="--style", accepts="a name in the file of styles")] = (
        Field((), description="words that are put around both prompts, from a styles.csv")
    )
    dynamic_prompts: bool = Field(
        False, description="draw `{a|b}` and `__name__` in both prompts, with each picture's seed"
    )
    width: Annotated[Side | None, About(default=_OWN_SIZE, short="-W")] = Field(
        None, description="width in pixels"
    )
    height: Annotated[Side | None, About(default=_OWN_SIZE, short="-H")] = Field(
        None, description="height in pixels"
    )
    steps: Annotated[
        Steps | None,
        About(
            default="the model's own, else the sampler's",
            aliases=("--num-inference-steps", "--num-steps"),
            infotext="Steps",
            slider=(1, 150, 1),
        ),
    ] = Field(None, description="number of denoising steps")
    guidance_scale: Annotated[
        Guidance,
        About(
            default="the model's own, else 7.5",
            aliases=("--cfg-scale", "--cfg", "--scale", "--guidance"),
            a1111="cfg_scale",
            infotext="CFG scale",
            slider=(0, 30, 0.5),
        ),
    ] = Field(7.5, description="how closely to follow the prompt; 1 turns guidance off")
    seed: Annotated[
        Seed,
        About(
            default="random",
            accepts="a whole number from 0 to 2**63 - 1",
            short="-s",
            infotext="Seed",
        ),
    ] = Field(
        default_factory=draw_seed, description="start of the random numbers; picture i has seed + i"
    )
    count: Annotated[
        Count,
        About(
            short="-n",
            aliases=("--num-images", "--num-images-per-prompt", "--batch-size", "--n-iter"),
            a1111="batch_size times n_iter",
            slider=(1, 16, 1),
        ),
    ] = Field(1, description="number of pictures")
    sampler: Annotated[
        str,
        About(
            default="the model's own, else pndm",
            accepts="a name of `safelight samplers`, or a web UI's or diffusers' name for it",
            aliases=("--sampler-name", "--sampling-method", "--scheduler"),
            a1111="sampler_name",
            choices=_samplers,
        ),
    ] = Field("pndm", description="method that removes the noise")
    schedule: Annotated[
        Schedule | None,
        About(default=_OWN, aliases=("--schedule-type",), a1111="scheduler"),
    ] = Field(None, description="noise levels of the steps")
    spacing: Annotated[Spacing | None, About(default=_OWN, aliases=("--timestep-spacing",))] = (
        Field(None, description="distribution of the timesteps")
    )
    strength: Annotated[
        Strength | None,
        About(
            default="0.8; 1 with a mask",
            aliases=("--denoising-strength", "--denoise"),
            a1111="denoising_strength",
            infotext="Denoising strength",
            slider=(0.05, 1, 0.05),
        ),
    ] = Field(None, description="how much of `image` to change; 1 keeps nothing")
    eta: Annotated[Share, About(infotext="Eta", slider=(0, 1, 0.05))] = Field(
        0.0, description="fresh noise at each step, in ddim and tcd"
    )
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
