"""Reads a prompt in any dialect."""

from safelight.errors import SafelightError
from safelight.prompt import a1111, comfy, compel
from safelight.prompt.networks import split_networks
from safelight.prompt.reading import Emphasis, Part, Piece, Reading, Stage, Syntax, one_part

LARGEST = 1e6
"""The largest weight. States that are multiplied by a few of these stay finite in float32."""

MAX_PARTS = 64
"""Prompts that AND composes. Each is a row of every call of the network."""

MAX_LISTED = 512
"""Texts in one of compel's lists. All of their states are in memory at once."""


def read(
    text: str,
    syntax: Syntax,
    *,
    steps: int,
    emphasis: Emphasis = "original",
    negative: bool = False,
) -> Reading:
    """Return what a prompt says in a dialect.

    steps: how many are taken; A1111's schedules are shares of them. emphasis: A1111's mode; with
    "none" brackets are text. negative: whether it is a negative prompt, which is not split at AND.

    Raises SafelightError for a weight beyond LARGEST, for a blend whose weights sum to 0, and for
    more than MAX_PARTS parts or a list of more than MAX_LISTED texts.
    """
    networks: tuple[tuple[str, ...], ...] = ()
    if syntax in ("comfy", "compel"):
        # These tools have no LoRAs in prompts, but people paste A1111's tags and mean LoRAs.
        text, networks = split_networks(text, loras_alone=True)
    if syntax == "a1111":
        reading = a1111.read(text, steps=steps, emphasis=emphasis, negative=negative)
    elif syntax == "comfy":
        sections, warnings = comfy.read(text)
        reading = Reading((one_part(steps, sections),), warnings, networks)
    elif syntax == "compel":
        blends, warnings = compel.read(text)
        reading = Reading((Part((Stage(steps, blends),)),), warnings, networks)
    else:
        reading = Reading((one_part(steps, ((Piece(text),),)),))
    _check(reading)
    return reading


def _check(reading: Reading) -> None:
    if len(reading.parts) > MAX_PARTS:
        raise SafelightError(
            f"prompt has {len(reading.parts):,} parts between AND; at most {MAX_PARTS} can be used"
        )
    for part in reading.parts:
        weights = [part.weight]
        for stage in part.stages:
            listed = sum(len(blend.texts) for blend in stage.blends)
            if listed > MAX_LISTED:
                raise SafelightError(
                    f"prompt is a list of {listed:,} texts; at most {MAX_LISTED} can be used"
                )
            weights += [piece.weight for piece in stage.pieces]
            for blend in stage.blends:
                weights += [blend.weight, *blend.weights]
                if len(blend.texts) > 1 and blend.normalize and _cancel(blend.weights):
                    raise SafelightError(
                        "prompt has a blend whose weights sum to 0, and it is divided by their sum:"
                        " change one, or add no_normalize"
                    )
        if not all(abs(weight) <= LARGEST for weight in weights):  # not so for NaN
            raise SafelightError(
                f"prompt has a weight that is not between -{LARGEST:,.0f} and {LARGEST:,.0f}: "
                "take one near 1"
            )


def _cancel(weights: tuple[float, ...]) -> bool:
    """Return whether weights sum to 0, or to so little that float32 may make it 0."""
    return abs(sum(weights)) <= 1e-6 * sum(map(abs, weights))
