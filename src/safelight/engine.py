"""From a request to its pictures, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safelight.defaults import is_distilled, model_defaults
from safelight.denoiser import Condition
from safelight.errors import SafelightError
from safelight.job import Job, advance, decode, finish, prepare
from safelight.model import Model
from safelight.request import Request
from safelight.result import Result
from safelight.sampling import SAMPLERS, table
from safelight.sizes import allowed_side
from safelight.words import unknown_words

STRENGTH = 0.8
"""How much of a picture is changed if the request does not say; with a mask, all of it."""


@dataclass(frozen=True)
class Step:
    """One step of one picture, just taken.

    image_index: which picture of the request; step: 1 to steps.
    clean: the network's estimate of the clean latents, float32 [1, channels, h, w].
    """

    image_index: int
    step: int
    steps: int
    clean: Tensor
    model: Model

    def preview(self) -> Image.Image:
        """The clean estimate as a picture."""
        with torch.inference_mode():
            return decode(self.model, self.clean)


class Run:
    """The making of a request's pictures: iterate for its steps, then read `result`.

    made: what there is so far. A picture is in it when the next one takes its first step.
    """

    def __init__(self, model: Model, request: Request) -> None:
        self._model, self._request = model, request
        self._done = False
        self.made: Result | None = None

    @property
    def result(self) -> Result:
        """The pictures; the steps that nobody iterated over are taken first."""
        if not self._done:
            for _ in self:
                pass
        assert self.made is not None
        return self.made

    def __iter__(self) -> Iterator[Step]:
        model = self._model
        with torch.inference_mode():
            began = time.perf_counter()
            settled = settle(model, self._request)
            conditions, warnings = condition(model, settled)
            timings = {"text": time.perf_counter() - began, "denoise": 0.0, "decode": 0.0}
            result = begun(model, self._request, settled, warnings)
            result.timings = timings
        self.made = result
        for i, seed in enumerate(result.seeds):
            mark = time.perf_counter()
            with torch.inference_mode():
                job = admit(model, settled, conditions, seed)
            while not job.done:
                with torch.inference_mode():
                    advance(model, [job])
                assert job.clean is not None
                # The clock stops while the caller looks at the step.
                timings["denoise"] += time.perf_counter() - mark
                yield Step(i, job.cursor, len(job.table.rows), job.clean, model)
                mark = time.perf_counter()
            with torch.inference_mode():
                result.images.append(finish(model, job))
            timings["decode"] += time.perf_counter() - mark
        timings["total"] = sum(timings.values())
        self._done = True


def begun(model: Model, asked: Request, settled: Request, warnings: list[str]) -> Result:
    """The result of a request, yet without pictures; warnings: those of its words."""
    return Result(
        images=[],
        seeds=[settled.seed + i for i in range(settled.count)],
        settings=_recorded(asked, settled),
        model=model.name,
        sha256=model.sha256,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        warnings=model.warnings
        + asked.with_defaults(model_defaults(model.notes)).unused_settings()
        + warnings,
    )


def _recorded(asked: Request, settled: Request) -> dict[str, Any]:
    """The settings for the recipe. Pictures are named as they were given, before any resizing."""
    given = {name: v for name, v in asked.to_dict().items() if name.endswith("_sha256")}
    return settled.to_dict() | given


def settle(model: Model, request: Request) -> Request:
    """The request with the model's and the sampler's defaults filled in.

    Raises SafelightError when model and request do not fit.
    """
    if request.unconditional and model.kind == "text":
        raise SafelightError(
            f"{model.name} draws from words: leave out unconditional, or load "
            "embedded-unconditional"
        )
    if model.kind == "pixels" and (request.prompt or request.image is not None):
        raise SafelightError(
            f"{model.name} draws from noise alone: ask for unconditional, without prompt or picture"
        )
    request = request.with_defaults(model_defaults(model.notes))
    filled: dict[str, Any] = {}
    if request.steps is None:
        filled["steps"] = SAMPLERS[request.sampler].steps
    if model.kind == "pixels":
        if (request.width, request.height) not in ((None, None), model.native_size):
            width, height = model.native_size
            raise SafelightError(f"{model.name} draws {width}x{height}: leave out width and height")
    else:
        filled["width"], filled["height"] = _size(model, request)
    if request.image is not None:
        if request.strength is None:
            filled["strength"] = STRENGTH if request.mask is None else 1.0
        filled |= _fitted(request, (filled["width"], filled["height"]))
    elif request.strength is not None:
        filled["strength"] = None
    return request.replace(**filled)


def _size(model: Model, request: Request) -> tuple[int, int]:
    """Of a picture to start from, one side that is asked for decides the other: no stretching."""
    width, height = model.native_size if request.image is None else request.image.size
    if request.image is not None and (request.width is None) != (request.height is None):
        scale = request.width / width if request.width else (request.height or height) / height
        width, height = (allowed_side(n * scale) for n in (width, height))
    return request.width or width, request.height or height


def _fitted(request: Request, size: tuple[int, int]) -> dict[str, Image.Image]:
    """Picture and mask at the asked size."""
    assert request.image is not None
    width, height = size
    if request.image.size == (width, height):
        if width % 8 or height % 8 or not (64 <= min(width, height) <= max(width, height) <= 2048):
            near = [allowed_side(side) for side in (width, height)]
            raise SafelightError(
                f"image is {width}x{height}; sides must be multiples of 8 from 64 to 2048: "
                f"ask for width {near[0]} and height {near[1]} to have it resized"
            )
        return {}
    fitted = {"image": request.image.resize((width, height), Image.Resampling.LANCZOS)}
    if request.mask is not None:
        fitted["mask"] = request.mask.resize((width, height), Image.Resampling.NEAREST)
    return fitted


def condition(model: Model, request: Request) -> tuple[Condition, list[str]]:
    """What the pictures are drawn to, and what the person should know about it."""
    warnings: list[str] = []
    if model.tokenizer is None or model.text_encoder is None:
        return Condition(None), warnings
    size = (request.width, request.height)
    if size != model.native_size:
        width, height = model.native_size
        warnings.append(
            f"{model.name} was trained on {width}x{height}; "
            f"at {size[0]}x{size[1]} it may repeat itself or fall apart"
        )
    warnings += _unsuited(model, request)
    distilled = getattr(model.unet.config, "time_cond_proj_dim", None) is not None
    guided = request.guidance_scale > 1 and not distilled
    ids = []
    for name in ("negative_prompt", "prompt") if guided else ("prompt",):
        text = getattr(request, name)
        encoded = model.tokenizer.encode(text)
        ids.append(encoded.ids)
        if encoded.cut is not None:
            warnings.append(
                f"{name} was cut at {model.tokenizer.max_length} tokens; "
                f"left out: {_beginning(encoded.cut)}"
            )
        if model.words is not None and (new := unknown_words(text, model.words)):
            warnings.append(f"{model.name} was never taught: {', '.join(new)}")
    context = model.text_encoder(torch.tensor(ids, device=model.device))
    return Condition(context, request.guidance_scale), warnings


def _unsuited(model: Model, request: Request) -> list[str]:
    """Warn of settings that a distilled model was not made for."""
    wanted = model_defaults(model.notes)
    if not is_distilled(model.notes) or all(
        getattr(request, name) == value for name, value in wanted.items()
    ):
        return []
    told = ", ".join(f"{name} {value}" for name, value in wanted.items())
    return [f"{model.name} was taught to draw with {told}; with other settings it draws worse"]


def _beginning(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}… of {len(text)} characters"


def admit(model: Model, request: Request, condition: Condition, seed: int) -> Job:
    """The job of one picture of a settled request."""
    assert request.steps is not None
    strength = 1.0 if request.strength is None else request.strength
    config = model.scheduler
    if model.kind == "text":
        # What diffusers' pipelines hold every Stable Diffusion checkpoint to, whatever its file
        # says: timesteps begin at 1, and latents have no range to be clipped to.
        config = config.override(steps_offset=1, clip_sample=False)
    rows = table(
        request.sampler,
        config,
        request.steps,
        schedule=request.schedule,
        spacing=request.spacing,
        eta=request.eta,
        strength=strength,
    )
    width, height = request.width, request.height
    size = model.native_size if width is None or height is None else (width, height)
    return prepare(
        model,
        rows,
        condition,
        seed,
        size,
        image=request.image,
        mask=request.mask,
        strength=strength,
    )
