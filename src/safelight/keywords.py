"""The keywords of `Model.generate` and of `Request`, for editors and type checkers."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from PIL.Image import Image

from safelight.adapters.asked import Unmatched
from safelight.prompt.reading import Emphasis, Syntax

Schedule = Literal["karras", "exponential", "beta"]
Spacing = Literal["leading", "linspace", "trailing"]
Linears = Literal["plain", "int8"]
MaskContent = Literal["original", "fill", "noise", "nothing"]
EmptyNegative = Literal["model", "zeros", "encoded"]


class Pictures(TypedDict, total=False):
    """The pictures of a request."""

    image: Image | None
    mask: Image | None
    control_image: Image | Sequence[Image] | None
    ip_adapter_image: Image | None
    reference_images: Sequence[Image] | Image | None


class GenerateSettings(TypedDict, total=False):
    """The keywords of `Model.generate`, for editors and type checkers."""

    negative_prompt: str
    prompt_syntax: Syntax
    emphasis: Emphasis
    clip_skip: int | None
    loras: Sequence[str]
    lora_unmatched: Unmatched
    embeddings: Sequence[str]
    styles: Sequence[str]
    dynamic_prompts: bool
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float
    seed: int | None
    count: int
    sampler: str
    schedule: Schedule | None
    spacing: Spacing | None
    shift: float | None
    strength: float | None
    eta: float
    image: Image | None
    mask: Image | None
    reference_images: Sequence[Image] | Image | None
    mask_padding: int | None
    mask_blur: float
    mask_content: MaskContent
    control_image: Image | Sequence[Image] | None
    control_scale: float | Sequence[float]
    control_start: float | Sequence[float]
    control_end: float | Sequence[float]
    hires_scale: float
    hires_upscaler: str
    hires_strength: float
    hires_steps: int | None
    ip_adapter_image: Image | None
    ip_adapter_scale: float
    ip_adapter_start: float
    ip_adapter_end: float
    empty_negative: EmptyNegative | None
    original_width: int | None
    original_height: int | None
    target_width: int | None
    target_height: int | None
    crop_left: int
    crop_top: int
    refiner_start: float
    aesthetic_score: float
    negative_aesthetic_score: float
    fast: int
    cache_every: int | None
    cache_branch: int | None
    guidance_start: float | None
    guidance_end: float | None
    text_end: float | None
    linears: Linears | None
    unconditional: bool


class RequestSettings(GenerateSettings, total=False):
    """The keywords of `Request`."""

    prompt: str
