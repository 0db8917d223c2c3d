"""How models of flow matching read prompts: as whole texts.

Weights, schedules, BREAK and AND of the prompt syntaxes have no effect on them, and a warning says
so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.prompt.dialects import read

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.prompt.reading import Emphasis, Piece, Reading, Stage, Syntax
    from safelight.request import Request

MARKED = (
    "weights, parts or changes, which {} does not read: only its words count, those of the first "
    "step and before AND"
)
"""What a warning says about a prompt that `is_marked`."""


def texts_of(model: Model, request: Request) -> dict[str, str]:
    """Return the texts to encode; the negative prompt, if it is evaluated, is the first."""
    return {name: text for name, (text, _) in readings_of(model, request).items()}


def read_whole(
    text: str, syntax: Syntax, emphasis: Emphasis, *, steps: int, negative: bool
) -> tuple[str, Reading]:
    """Return the words that are read of a prompt, and its reading; see `dialects.read`.

    Raises SafelightError for a prompt that cannot be read.
    """
    reading = read(text, syntax, steps=steps, emphasis=emphasis, negative=negative)
    if len(reading.parts) == 1 and reading.parts[0].weight != 1:
        # AND alone has use for a weight of the whole: "a clock at 7:30" means the time.
        reading = read(text, syntax, steps=steps, emphasis=emphasis, negative=True)
    return _words(reading, " " if syntax == "compel" else ""), reading


def is_marked(reading: Reading) -> bool:
    """Return whether a prompt has more than one text, weights, or changes from step to step."""
    stages = [stage for part in reading.parts for stage in part.stages]
    blends = stages[0].blends
    several = max(len(stages), len(blends), *(len(one) for one in _texts(stages[0])))
    several = max(several, *(len(blend.texts) for blend in blends))
    weights = {piece.weight for piece in stages[0].pieces} | {blend.weight for blend in blends}
    return several > 1 or weights != {1}


def readings_of(model: Model, request: Request) -> dict[str, tuple[str, Reading]]:
    """Return the words and the reading of each text to encode, in the order of `texts_of`."""
    names = ["prompt"]
    if request.guidance_scale > 1 and not model.family.takes_guidance(model):
        names.insert(0, "negative_prompt")
    steps = model.family.steps_taken(request)
    return {
        name: read_whole(
            getattr(request, name),
            request.prompt_syntax,
            request.emphasis,
            steps=steps,
            negative=name == "negative_prompt",
        )
        for name in names
    }


def _words(reading: Reading, between: str) -> str:
    """Return the words of a prompt at its first step, without weights.

    between: stands between the pieces. compel's have no blanks at their ends, others keep theirs.
    """
    texts = _texts(reading.parts[0].stages[0])
    return " ".join(
        between.join(piece.text for piece in section) for sections in texts for section in sections
    )


def _texts(stage: Stage) -> list[tuple[tuple[Piece, ...], ...]]:
    return [text for blend in stage.blends for text in blend.texts]
