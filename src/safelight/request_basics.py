"""The first fields of a Request: words, size, seed, and how the noise is removed."""

import secrets
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from safelight.adapters.asked import Unmatched
from safelight.keywords import Schedule, Spacing
from safelight.prompt.reading import Emphasis, Syntax
from safelight.request_ranges import (
    ClipSkip,
    Count,
    Guidance,
    Seed,
    Share,
    Shift,
    Side,
    Steps,
    Strength,
)
from safelight.settings import About, Texts


def draw_seed() -> int:
    """Return a random seed of 32 bits: few enough digits to read out to someone."""
    return secrets.randbelow(2**32)


def _samplers() -> tuple[str, ...]:
    from safelight.sampling import SAMPLERS

    return tuple(SAMPLERS)


_OWN, _OWN_SIZE = "the model's own", "the model's own, or the picture's"


class BasicFields(BaseModel):
    """The fields that hardly any model does without; `RequestFields` has the others."""

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
    shift: Annotated[Shift | None, About(default=_OWN, some_models=True)] = Field(
        None, description="how far flow models' times are moved towards noise; 1 leaves them even"
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
