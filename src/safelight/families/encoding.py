"""How the prompts of a request become a conditioning, for families with one CLIP text encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.prompt.dialects import read
from safelight.prompt.learned import MARK, unused
from safelight.prompt.networks import is_lora
from safelight.prompt.reading import Part, Reading
from safelight.words import unknown_words

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.request import Request


def check_request(model: Model, request: Request) -> None:
    """Raise SafelightError for a clip_skip that leaves no layer of the text encoder."""
    layers = model.text_encoder.config.num_hidden_layers
    if request.clip_skip is not None and request.clip_skip > layers:
        raise SafelightError(
            f"clip_skip must be at most {layers}, the layers of {model.name}'s text encoder, "
            f"not {request.clip_skip}",
            field="clip_skip",
        )


def warnings(model: Model, request: Request) -> list[str]:
    """Return what was left out of the prompts, or may not be meant as it was read."""
    found: list[str] = []
    readings = _readings(model, request)
    for name, text in _texts(model, request).items():
        if request.prompt_syntax == "plain":
            cut = model.tokenizer.encode(text).cut
            if cut is not None:
                found.append(
                    f"{name} was cut at {model.tokenizer.max_length} tokens; "
                    f"left out: {_beginning(cut)}"
                )
        else:
            reading = readings[name]
            found += [f"{name} has {said}" for said in reading.warnings]
            for network in reading.networks:
                told = f"{name}: <{':'.join(network):.60}> was left out"
                if not is_lora(network):
                    found.append(told)
                elif name == "negative_prompt":
                    found.append(f"{told}: LoRAs count in the prompt alone")
            pieces = [p for part in reading.parts for s in part.stages for p in s.pieces]
            text = " ".join(dict.fromkeys(piece.text for piece in pieces))
        if model.words is not None and (new := unknown_words(text, model.words)):
            found.append(f"{model.name} was never taught: {', '.join(new)}")
    for one in unused(model.tokenizer, readings.values(), request.prompt_syntax):
        how = f"{MARK}{one.name}" if request.prompt_syntax == "comfy" else one.name
        found.append(f"embedding {one.name} is in no prompt: write {how} where it is meant")
    return found


def encode(model: Model, request: Request) -> Conditioning:
    """Return the conditioning of a resolved request, which may change from step to step."""
    import torch

    skip = (request.clip_skip or 1) - 1
    if request.prompt_syntax == "plain":
        texts = _texts(model, request).values()
        ids = torch.tensor([model.tokenizer.encode(text).ids for text in texts])
        tokens = model.text_encoder(ids.to(model.device), skip)
        return Conditioning(tokens, guidance=request.guidance_scale)

    def text_encoder(ids: Tensor, visible: Tensor | None) -> Tensor:
        return model.text_encoder(ids.to(model.device), skip, visible)

    from safelight.prompt.states import States

    states = States(model.tokenizer, text_encoder, request.prompt_syntax, request.emphasis)
    parts = [part for r in _readings(model, request).values() for part in r.parts]
    weights = tuple(part.weight for part in parts[1:])
    return _scheduled(
        parts,
        [states.of_part(part) for part in parts],
        Conditioning(
            guidance=request.guidance_scale,
            weights=None if all(weight == 1 for weight in weights) else weights,
        ),
    )


def _scheduled(parts: list[Part], states: list[list[Tensor]], base: Conditioning) -> Conditioning:
    """Return the conditioning of parts, the negative prompt first where there is one.

    states: of each stage of each part. base: what all steps have in common.
    """
    import torch

    from safelight.prompt.states import last_repeated, same_length, spans

    made: dict[tuple[int, ...], Conditioning] = {}
    found: list[tuple[int, Conditioning]] = []
    for first, _ in spans(parts):
        now = [s[part.index_at(first)] for part, s in zip(parts, states, strict=True)]
        key = tuple(map(id, now))
        if key not in made:
            negative, positives = now[:1], last_repeated(now[1:]) if len(now) > 1 else []
            tokens = torch.cat(same_length([*negative, *positives]))
            made[key] = replace(base, tokens=tokens)
        if not found or found[-1][1] is not made[key]:
            found.append((first - 1, made[key]))
    (_, start), *later = found
    return replace(start, later=tuple(later))


def _readings(model: Model, request: Request) -> dict[str, Reading]:
    """Return how each of the texts is read, in the order of `_texts`."""
    found: dict[str, Reading] = {}
    for name in ("prompt", "negative_prompt"):
        found[name] = read(
            getattr(request, name),
            request.prompt_syntax,
            steps=request.steps_taken,
            emphasis=request.emphasis,
            negative=name == "negative_prompt",
        )
    [*parts] = found["prompt"].parts
    composed = len(parts) > 1 or parts[0].weight != 1
    if composed and _distilled(model):
        raise SafelightError(
            f"prompt cannot be composed with AND or weighted as a whole: {model.name} has no "
            "negative prompt to compose against",
            field="prompt",
        )
    names = list(_texts(model, request, composed=composed))
    return {name: found[name] for name in names}


def _texts(model: Model, request: Request, *, composed: bool = False) -> dict[str, str]:
    """Return the texts to encode, the negative prompt first where it is evaluated.

    composed: whether the prompt has parts, which are composed against the negative prompt.
    """
    texts = {"prompt": request.prompt}
    if composed or (request.guidance_scale > 1 and not _distilled(model)):
        texts = {"negative_prompt": request.negative_prompt, **texts}
    return texts


def _distilled(model: Model) -> bool:
    """Return whether the network was distilled to take the guidance scale as an input."""
    return model.network.config.time_cond_proj_dim is not None


def _beginning(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}… of {len(text)} characters"
