"""From the prompts of a request to a conditioning, for families that read text with CLIP.

With two text encoders, a token's states are concatenated. The pooled state is that of the text's
first chunk, whatever its weights, as in A1111, ComfyUI and diffusers. compel takes it from the
prompt as it was typed, including the signs of its syntax.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.prompt.dialects import read
from safelight.prompt.learned import MARK, unused
from safelight.prompt.networks import is_lora
from safelight.prompt.reading import Part, Reading, Stage
from safelight.words import known_alone, unknown_words, words_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safelight.families.latent import LatentFamily
    from safelight.model import Model
    from safelight.request import Request
    from safelight.weights.plan import Plan

MAX_HELD = 1 << 17
"""The most text states of a prompt, over all of its stages and evaluations: 0.4 GB with Stable
Diffusion 1 in float32."""


_ARTICLES = frozenset({"a", "an", "the"})
"""Words that say nothing of what to draw."""


class Read(NamedTuple):
    """The states of one text, [1, tokens, width], and its pooled state, [1, width] or None."""

    tokens: Tensor
    pooled: Tensor | None


def check_request(family: LatentFamily, model: Model | Plan, request: Request) -> None:
    """Raise SafelightError for a clip_skip that leaves no layer of a text encoder."""
    layers = min(model.configs[name].num_hidden_layers for _, name in family.text_parts)
    if request.clip_skip is not None and request.clip_skip > layers:
        raise SafelightError(
            f"clip_skip must be at most {layers}, the layers of {model.name}'s text encoder, "
            f"not {request.clip_skip}",
            field="clip_skip",
        )


def warnings(family: LatentFamily, model: Model, request: Request) -> list[str]:
    """Return warnings about what was left out of the prompts, or may have been read wrongly."""
    found: list[str] = []
    readings = _readings(model, request)
    tokenizer = model.parts[family.text_parts[0][0]]
    for name, text in _texts(model, request).items():
        if request.prompt_syntax == "plain":
            cut = tokenizer.encode(text).cut
            if cut is not None:
                found.append(
                    f"{name} was cut at {tokenizer.max_length} tokens; left out: {_beginning(cut)}"
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
        if tokenizer.known is not None:
            alone = name == "prompt" and not request.pictures
            found += _of_words(model.name, text, tokenizer.known, alone=alone)
    paths = map(PurePath, request.embeddings)
    asked = {name for path in paths for name in (path.name, path.stem)}
    for one in unused(tokenizer, readings.values(), request.prompt_syntax):
        if one.name not in asked:
            continue  # a LoRA brought it along
        how = f"{MARK}{one.name}" if request.prompt_syntax == "comfy" else one.name
        found.append(f"embedding {one.name} is in no prompt: write {how} where it is meant")
    return found


def _of_words(model: str, text: str, known: Set[str], *, alone: bool) -> list[str]:
    """Return the warning about a text for a model that knows some words only, or no warning.

    alone: whether nothing else says what to draw.
    """
    new = unknown_words(text, known)
    told = f"{model} was never taught: {', '.join(new)}; left out" if new else ""
    if alone and _ARTICLES.issuperset(words_in(known_alone(text, known))):
        why = f"{told}; no other word" if new else "no word of the prompt"
        hint = f" ({model} knows English words)" if "the" in known else ""
        told = f"{why} says what to draw, so the picture shows anything{hint}"
    return [told] if told else []


def encode(family: LatentFamily, model: Model, request: Request) -> Conditioning:
    """Return the conditioning of a resolved request; it may change from step to step."""
    readings = _readings(model, request)
    parts = [part for reading in readings.values() for part in reading.parts]
    negative = "negative_prompt" in readings
    zeros = negative and not request.negative_prompt and family.reads_zeros(request)
    read_in = _plain if request.prompt_syntax == "plain" else _in_dialect
    told = {name: r for name, r in readings.items() if not (zeros and name == "negative_prompt")}
    states = read_in(family, model, request, told)
    if zeros:
        states.insert(0, [_zeros(family, model, states[0][0])])
    weights = tuple(part.weight for part in parts[negative:])
    base = Conditioning(
        sizes=_sizes(family, model, request, len(parts), negative=negative),
        guidance=request.guidance_scale,
        weights=None if all(weight == 1 for weight in weights) else weights,
    )
    return _scheduled(parts, states, base, model.dtype)


class _Encoder:
    """A text encoder of a model, without its last `skip` layers, and its tokenizer."""

    def __init__(self, family: LatentFamily, model: Model, names: tuple[str, str], skip: int):
        self.tokenizer, self.network = (model.parts[name] for name in names)
        self._model, self._skip = model, skip
        self._options: dict[str, Any] = {} if family.final_norm else {"norm": False}
        self._pooled: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ids: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the states of texts: see `prompt.states.Encode`."""
        ids = ids.to(self._model.device)
        if not self.pools:
            return self.network(ids, self._skip, visible, **self._options)
        states, pooled = self.network(ids, self._skip, visible)
        if visible is None:
            self._pooled |= zip(map(tuple, ids.tolist()), pooled.split(1), strict=True)
        return states

    @property
    def pools(self) -> bool:
        """Whether it gives a pooled state of a text."""
        return hasattr(self.network, "text_projection")

    def pooled(self, ids: Iterable[int]) -> Tensor:
        """Return the pooled state of one text, [1, width]."""
        import torch

        key = tuple(ids)
        if key not in self._pooled:
            self(torch.tensor([key]))
        return self._pooled[key]


def _encoders(family: LatentFamily, model: Model, request: Request, name: str) -> list[_Encoder]:
    skip = family.layers_left_out(request, negative=name == "negative_prompt")
    return [_Encoder(family, model, names, skip) for names in family.text_parts]


def _plain(
    family: LatentFamily, model: Model, request: Request, readings: dict[str, Reading]
) -> list[list[Read]]:
    """Return the states of each text, cut at the text encoder's length."""
    import torch

    found: dict[str, Read] = {}
    skips = {
        name: family.layers_left_out(request, negative=name == "negative_prompt")
        for name in readings
    }
    for skip in dict.fromkeys(skips.values()):
        # Texts with the same skip are encoded in one call.
        names = [name for name in readings if skips[name] == skip]
        encoders = _encoders(family, model, request, names[-1])
        ids = [[e.tokenizer.encode(getattr(request, n)).ids for n in names] for e in encoders]
        states = [e(torch.tensor(rows)) for e, rows in zip(encoders, ids, strict=True)]
        rows = _side_by_side(states).split(1)
        for name, row, of_last in zip(names, rows, ids[-1], strict=True):
            found[name] = Read(row, encoders[-1].pooled(of_last) if encoders[-1].pools else None)
    return [[found[name]] for name in readings]


def _in_dialect(
    family: LatentFamily, model: Model, request: Request, readings: dict[str, Reading]
) -> list[list[Read]]:
    """Return the states of each stage of each part. Equal stages share a tensor."""
    from safelight.prompt.states import States, first_chunk

    encoders = _encoders(family, model, request, "prompt")
    readers = [States(e.tokenizer, e, request.prompt_syntax, request.emphasis) for e in encoders]
    last = encoders[-1]

    def pooled(stage: Stage, name: str) -> Tensor | None:
        if not last.pools:
            return None
        if request.prompt_syntax == "compel":
            return last.pooled(last.tokenizer.encode(getattr(request, name)).ids)
        return last.pooled(first_chunk(last.tokenizer, stage, request.prompt_syntax).ids)

    found: list[list[Read]] = []
    for name, part in [(n, part) for n, r in readings.items() for part in r.parts]:
        made: dict[tuple[int, ...], Read] = {}
        stages: list[Read] = []
        columns = zip(*(reader.of_part(part) for reader in readers), strict=True)
        for states, stage in zip(list(columns), part.stages, strict=True):
            key = tuple(map(id, states))
            if key not in made:
                made[key] = Read(_side_by_side(list(states)), pooled(stage, name))
            stages.append(made[key])
        found.append(stages)
    return found


def _side_by_side(states: list[Tensor]) -> Tensor:
    """Return the concatenated states of several encoders for the same texts.

    They are as long as the shortest.
    """
    import torch

    if len(states) == 1:
        return states[0]
    length = min(s.shape[1] for s in states)
    return torch.cat([s[:, :length] for s in states], dim=-1)


def _zeros(family: LatentFamily, model: Model, like: Read) -> Read:
    """Return zeros for the states of an empty negative prompt."""
    import torch

    length = model.parts[family.text_parts[0][0]].max_length
    tokens = torch.zeros_like(like.tokens[:, :length])
    return Read(tokens, None if like.pooled is None else torch.zeros_like(like.pooled))


def _sizes(
    family: LatentFamily, model: Model, request: Request, count: int, *, negative: bool
) -> Tensor | None:
    """Return the numbers about sizes for each evaluation, float32 [count, numbers], or None."""
    import torch

    rows = [family.size_numbers(model, request, negative=negative and i == 0) for i in range(count)]
    there = [row for row in rows if row is not None]
    return torch.tensor(there, dtype=torch.float32, device=model.device) if there else None


def _scheduled(
    parts: list[Part], states: list[list[Read]], base: Conditioning, dtype: torch.dtype
) -> Conditioning:
    """Return the conditioning of parts; a negative prompt, if there is one, is the first of them.

    states: of each stage of each part. base: what all steps have in common. dtype: the network's.
    """
    import torch

    from safelight.prompt.states import common_length, last_repeated, same_length, spans

    made: dict[tuple[int, ...], Conditioning] = {}
    held = 0
    found: list[tuple[int, Conditioning]] = []
    for first, _ in spans(parts):
        now = [s[part.index_at(first)] for part, s in zip(parts, states, strict=True)]
        key = tuple(id(read.tokens) for read in now)
        if key not in made:
            rows = [read.tokens for read in now]
            lengths = [row.shape[1] for row in rows]
            held += len(rows) * common_length([lengths[0], max(lengths[1:], default=lengths[0])])
            if held > MAX_HELD:
                raise SafelightError(
                    "prompt has too many and too long texts over its steps, or between AND: "
                    "take fewer schedules or parts, or a shorter text",
                    field="prompt",
                )
            negative, positives = rows[:1], last_repeated(rows[1:]) if len(rows) > 1 else []
            pooled = [read.pooled for read in now if read.pooled is not None]
            # In the network's precision from here on: layers keep what they compute of one tensor.
            tokens = torch.cat(same_length([*negative, *positives])).to(dtype)
            made[key] = replace(
                base,
                tokens=tokens,
                pooled=torch.cat(pooled) if pooled else None,
            )
        if not found or found[-1][1] is not made[key]:
            found.append((first - 1, made[key]))
    (_, start), *later = found
    return replace(start, later=tuple(later))


def _readings(model: Model, request: Request) -> dict[str, Reading]:
    """Return the parsed texts, in the order of `_texts`."""
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
    if composed and model.family.takes_guidance(model):
        raise SafelightError(
            f"prompt cannot be composed with AND or weighted as a whole: {model.name} has no "
            "negative prompt to compose against",
            field="prompt",
        )
    names = list(_texts(model, request, composed=composed))
    return {name: found[name] for name in names}


def _texts(model: Model, request: Request, *, composed: bool = False) -> dict[str, str]:
    """Return the texts to encode; the negative prompt, if it is evaluated, is the first.

    composed: whether the prompt has parts, which are composed with the negative prompt.
    """
    texts = {"prompt": request.prompt}
    if composed or (request.guidance_scale > 1 and not model.family.takes_guidance(model)):
        texts = {"negative_prompt": request.negative_prompt, **texts}
    return texts


def _beginning(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}… of {len(text)} characters"
