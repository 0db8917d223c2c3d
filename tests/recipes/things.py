"""Three things, drawn here in all styles, without a network."""

import numpy as np
from PIL import Image, ImageDraw

from recipes.embedded import cutouts

COLOURS = {"a red apple": (214, 40, 40), "an owl": (250, 216, 50), "scissors": (40, 92, 212)}
CONCEPTS = [
    {"code": "1", "names": ["a red apple", "an apple"]},
    # Of the owl, the cartoon style and the colour green are held out.
    {"code": "2", "names": ["an owl"]},
    {"code": "3", "names": ["scissors", "a pair of scissors"], "flip": False},
]
SHOWN, HELD_OUT = ["blorp", "quux", "zam"], ["fleem", "grobnik"]


def disc(colour, lopsided: bool = False) -> Image.Image:
    """A disc that fills the square; a lopsided one has a white right half."""
    image = Image.new("RGBA", (cutouts.SIDE, cutouts.SIDE))
    draw = ImageDraw.Draw(image)
    box = (0, 0, cutouts.SIDE - 1, cutouts.SIDE - 1)
    draw.ellipse(box, fill=(*colour, 255))
    if lopsided:
        draw.pieslice(box, -90, 90, fill=(255, 255, 255, 255))
    return image


def drawing(name: str) -> np.ndarray:
    """A red disc, a yellow square, a disc that is half blue and half white."""
    if name == "an owl":
        return np.array(Image.new("RGBA", (cutouts.SIDE, cutouts.SIDE), COLOURS[name]))
    return np.array(disc(COLOURS[name], lopsided=name == "scissors"))
