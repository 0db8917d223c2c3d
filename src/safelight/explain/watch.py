"""Draw one picture and record its steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image, ImageChops
from torch import Tensor

from safelight.engine import Engine, Job, Step
from safelight.engine.denoiser import clip_or_threshold, estimate
from safelight.engine.job import cut, decode, final_latents
from safelight.engine.requests import with_drawn
from safelight.errors import SafelightError
from safelight.explain.attention import (
    recorded,
    recorded_jointly,
    telling_layers,
    word_maps,
)
from safelight.explain.forward import Noised, forward
from safelight.families.conditioning import Conditioning
from safelight.families.flow import FlowFamily
from safelight.families.flow_texts import texts_of
from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel
from safelight.picture import from_tensor, to_tensor
from safelight.prompt.chunks import chunks_of
from safelight.prompt.dialects import read
from safelight.prompt.places import words_of_chunks
from safelight.prompt.reading import Word
from safelight.request import Request
from safelight.result import Result
from safelight.sampling import Level, Row

MAX_MOMENTS = 50
"""The most steps that are recorded. If there are more, this many are recorded, evenly spaced, with
the first and the last."""


@dataclass(frozen=True)
class Moment:
    """One step.

    step: from 1 to steps, those of both passes if there are two. sigma, timestep: noise level of
    the state, and the time given to the network. noisy: the state as the network sees it, decoded.
    latents: the same as one pixel for each latent, coloured by `Story.colours`; None for a model of
    pixels. clean: the clean estimate. unguided: the clean estimate with the prompt alone; in a step
    without guidance it is `clean`, and in a picture without guidance None.
    attention: float32 [words, h, w], see `explain.attention.word_maps`; None without words. shown:
    the shares of the latents' width and height that the picture has, 1 unless they reach beyond it.
    """

    step: int
    steps: int
    sigma: float
    timestep: float
    noisy: Image.Image
    latents: Image.Image | None
    clean: Image.Image
    unguided: Image.Image | None
    attention: Tensor | None
    shown: tuple[float, float]

    @property
    def guidance(self) -> Image.Image | None:
        """The change by guidance: half the difference to the unguided estimate, on middle gray."""
        if self.unguided is None:
            return None
        return ImageChops.subtract(self.clean, self.unguided, scale=2, offset=128)


@dataclass(frozen=True)
class Story:
    """The steps of one picture.

    network: the name of the part that denoises. result: the picture, as `Model.generate` returns
    it. levels: the noise level before each step and after the last. shape: of the finished
    picture's latents, channels, height, width. words: of the prompt, if attention to them is
    recorded. colours: float32 [channels + 1, 3], see `fit_colours`; None without autoencoder.
    forward: the picture at growing noise levels.
    """

    network: str
    result: Result
    levels: list[Level]
    shape: tuple[int, int, int]
    words: list[Word]
    moments: list[Moment]
    colours: Tensor | None
    forward: list[Noised]

    @property
    def sigmas(self) -> list[float]:
        """The sigmas of the levels."""
        return [level.sigma for level in self.levels]

    @property
    def picture(self) -> Image.Image:
        return self.result.images[0]

    @property
    def shown(self) -> tuple[float, float]:
        """The shares of the latents' width and height that the finished picture has."""
        return self.moments[-1].shown


@dataclass(frozen=True)
class _Seen:
    """A step as tensors: the state as the network sees it, and the clean estimates.

    size: width and height of the picture; None: all that the latents cover.
    """

    step: int
    row: Row
    noisy: Tensor
    clean: Tensor
    unguided: Tensor | None
    attention: Tensor | None
    size: tuple[int, int] | None


def watch(model: Model, request: Request, on_step: Callable[[Step], object] | None = None) -> Story:
    """Draw the picture of a request, and return the story of its steps.

    The picture is that of `model.generate(request)`, to the byte. After each step the network is
    called once more, with the prompt alone, while its attention is recorded. on_step is called as
    in `Model.generate`. Raises SafelightError for settings that the model cannot draw with, and
    for a count other than 1.
    """
    if request.count != 1:
        raise SafelightError(f"count must be 1, not {request.count}: one picture is watched")
    engine = Engine(model)
    result = engine.add(request)
    [ticket] = engine.tickets
    with engine.model.lock:
        job, model = ticket.job, ticket.model
        words = _words(model, request, result)
    rows = [*job.table.rows, *(ticket.later.table.rows if ticket.later is not None else ())]
    wanted = _evenly(len(rows))
    seen: list[_Seen] = []
    while engine.busy:
        if ticket.prepared:  # between two passes it is not
            job = ticket.job
        taken, cursor, state = ticket.taken, job.cursor, job.state
        stepped, _ = engine.step()
        if ticket.error is not None:
            raise ticket.error
        if not stepped:
            continue
        assert job.clean is not None
        if taken in wanted:
            with engine.model.lock, torch.inference_mode():
                who = job.model_at(cursor, model)
                seen.append(_look(who, job, taken, cursor, state, job.clean, words))
        if on_step is not None:
            on_step(Step(0, taken + 1, len(rows), job.clean, model, job.size))
    assert ticket.image is not None
    result.images.append(ticket.image)
    with engine.model.lock, torch.inference_mode():
        latents = final_latents(job)
        moments, colours = _pictures(model, seen, len(rows))
        channels, height, width = latents.shape[1:]
        return Story(
            network=model.family.network,
            result=result,
            levels=[*(row.level for row in rows), rows[-1].lands],
            shape=(channels, height, width),
            words=words,
            moments=moments,
            colours=colours,
            forward=forward(model, latents, ticket.seed, job.size),
        )


def _words(model: Model, request: Request, result: Result) -> list[Word]:
    """Return the words of the prompt; if it has parts or stages, the last part's first stage.

    They are empty if the network's attention to words is not recorded.
    """
    [seed] = result.seeds
    one, steps = with_drawn(request, result, seed), result.settings["steps"]
    if isinstance(model.family, FlowFamily):
        whole = one.model_copy(update={"steps": steps, "guidance_scale": 1.0})
        return model.family.words(model, texts_of(model, whole)["prompt"])
    if model.tokenizer is None or not isinstance(model.unet, UNet2DConditionModel):
        return []
    tokenizer = model.embeddings.model(model.embeddings.choose(one)).tokenizer
    reading = read(one.prompt, one.prompt_syntax, steps=steps, emphasis=one.emphasis)
    text = reading.parts[-1].stages[0].blends[0].texts[0]
    return words_of_chunks(tokenizer, chunks_of(tokenizer, text, one.prompt_syntax))


def _recorded(
    model: Model, state: Tensor, asked: Conditioning
) -> AbstractContextManager[list[Tensor]] | None:
    """Return what records the network's attention to the text, None if that is not known."""
    if isinstance(model.family, FlowFamily):
        family = model.family
        picture, *others = (
            one.shape[-2] * one.shape[-1] // family.patch**2 for one in (state, *asked.references)
        )
        places = partial(family.places, beside=sum(others))
        return recorded_jointly(family.products(model), picture, places)
    if isinstance(model.unet, UNet2DConditionModel):
        return recorded(telling_layers(model.unet))
    return None


def _evenly(count: int) -> set[int]:
    most = min(count, MAX_MOMENTS)
    return {round(i * (count - 1) / max(most - 1, 1)) for i in range(most)}


def _look(
    model: Model, job: Job, taken: int, cursor: int, state: Tensor, clean: Tensor, words: list[Word]
) -> _Seen:
    """Call the network again on the state before the step, with the prompt alone.

    taken: the steps before it, those of an earlier pass included.
    """
    row, asked = job.table.rows[cursor], job.asked_at(cursor)
    noisy = row.level.view(state)
    guided, recording = asked.evaluations > 1, _recorded(model, state, asked)
    if asked.tokens is None or not (guided or recording):
        return _Seen(taken + 1, row, noisy, clean, None, None, job.size)
    with recording or nullcontext([]) as weights:
        [unclipped] = estimate(model, [state], [row], [asked.positive()])
    unguided = clip_or_threshold(unclipped, job.table.clip, job.table.threshold)
    height, width = state.shape[-2:]
    return _Seen(
        step=taken + 1,
        row=row,
        noisy=noisy,
        clean=clean,
        unguided=unguided if guided else None,
        attention=word_maps(weights, words, (height, width)) if weights else None,
        size=job.size,
    )


def _pictures(model: Model, seen: list[_Seen], steps: int) -> tuple[list[Moment], Tensor | None]:
    """Return the moments, and the colours of their latents."""
    noisy = [decode(model, one.noisy) for one in seen]
    clean = [decode(model, one.clean) for one in seen]
    colours = None
    if model.vae is not None:
        latents = [tensor for one in seen for tensor in (one.noisy, one.clean)]
        shown = [picture for both in zip(noisy, clean, strict=True) for picture in both]
        colours = fit_colours(latents, shown)
    noisy = [cut(model, noisy[i], one.noisy, one.size) for i, one in enumerate(seen)]
    clean = [cut(model, clean[i], one.clean, one.size) for i, one in enumerate(seen)]
    guided, reach = any(one.unguided is not None for one in seen), model.family.factor(model)
    unguided = [
        (clean[i] if guided else None)
        if one.unguided is None
        else cut(model, decode(model, one.unguided), one.unguided, one.size)
        for i, one in enumerate(seen)
    ]
    moments = [
        Moment(
            step=one.step,
            steps=steps,
            sigma=one.row.level.sigma,
            timestep=one.row.timestep,
            noisy=noisy[i],
            latents=None if colours is None else in_colours(one.noisy, colours),
            clean=clean[i],
            unguided=unguided[i],
            attention=one.attention,
            shown=(
                clean[i].width / (one.clean.shape[3] * reach),
                clean[i].height / (one.clean.shape[2] * reach),
            ),
        )
        for i, one in enumerate(seen)
    ]
    return moments, colours


def fit_colours(latents: list[Tensor], pictures: list[Image.Image]) -> Tensor:
    """Return the linear map from a latent's channels to a colour, float32 [channels + 1, 3].

    It is a least-squares fit of latents ([1, channels, h, w] each) to their decoded pictures at
    the latents' size; the last row is the constant. Unlike the axes of a PCA it gives the picture's
    colours. The fit takes noisy and clean latents, because in a plain picture some directions
    never occur.
    """
    inputs, targets = [], []
    for latent, picture in zip(latents, pictures, strict=True):
        flat = latent[0].flatten(1).T.float().cpu()
        small = picture.convert("RGB").resize(
            (latent.shape[-1], latent.shape[-2]), Image.Resampling.BOX
        )
        inputs.append(torch.cat([flat, torch.ones(len(flat), 1)], dim=1))
        targets.append(to_tensor(small)[0].flatten(1).T)
    return torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution


def in_colours(latents: Tensor, colours: Tensor) -> Image.Image:
    """Return latents [1, channels, h, w] as a picture, one pixel for each."""
    channels = latents.shape[1]
    weight, bias = colours[:channels].T, colours[channels]
    flat = weight @ latents[0].flatten(1).float().cpu() + bias[:, None]
    return from_tensor(flat.unflatten(1, latents.shape[-2:]))
