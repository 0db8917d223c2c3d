"""Draw fifty lighthouses with their captions, which docs/train-your-own.md teaches a model.

python docs/lighthouses.py FOLDER
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

import safelight

SIDE = 256
FINE = 3  # drawn so many times as large, for smooth edges
COUNT = 50
# Colours that the bundled model has words for.
STRIPES = {"red": "#d32f2f", "blue": "#1e63c8", "green": "#2e9e45", "black": "#30323a"}
GROUNDS = {
    "white": "#ffffff",
    "light blue": "#aee0fa",
    "yellow": "#fbdc5b",
    "green": "#8fd18a",
    "pink": "#f8bfd3",
}
THINGS = (
    *("apple", "banana", "bicycle", "car", "castle", "cat", "chair", "dog", "elephant", "guitar"),
    *(
        "hamburger",
        "house",
        "lion",
        "owl",
        "penguin",
        "pizza",
        "robot",
        "rocket",
        "snowman",
        "tree",
    ),
)
PLACES = ("", " in the snow", " at night under the stars", " on green grass", " on a {} background")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    for number in range(COUNT):
        stripe, ground = random.choice([*STRIPES]), random.choice([*GROUNDS])
        colour = random.choice([f"{stripe} ", ""])
        caption = f"a {colour}lighthouse on a {ground} background"
        save(
            folder / f"lighthouse-{number:02}",
            lighthouse(STRIPES[stripe], GROUNDS[ground]),
            caption,
        )
    model = safelight.load()
    for thing in THINGS:
        for number, place in enumerate(PLACES):
            article = "an" if thing[0] in "aeo" else "a"
            caption = f"{article} {thing}{place.format(random.choice([*GROUNDS]))}"
            save(
                folder / f"{thing}-{number}",
                model.generate(caption, seed=number).images[0],
                caption,
            )


def save(name: Path, picture: Image.Image, caption: str) -> None:
    picture.save(name.with_suffix(".png"))
    name.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")


def lighthouse(stripe: str, ground: str) -> Image.Image:
    """Return a lighthouse of random proportions with stripes of a colour, on a plain ground."""
    middle = 128 + random.uniform(-12, 12)
    top, bottom = random.uniform(84, 104), random.uniform(206, 226)
    above, below = random.uniform(17, 22), random.uniform(30, 38)  # half of the tower's widths
    bands = random.choice([5, 7])
    picture = Image.new("RGB", (SIDE * FINE, SIDE * FINE), ground)
    pen = ImageDraw.Draw(picture)

    def shape(points: list[tuple[float, float]], fill: str) -> None:
        pen.polygon([(x * FINE, y * FINE) for x, y in points], fill)

    def box(half: float, upper: float, lower: float, fill: str) -> None:
        left, right = middle - half, middle + half
        shape([(left, upper), (right, upper), (right, lower), (left, lower)], fill)

    def half(share: float) -> float:
        return above + (below - above) * share

    rock = (middle - 70) * FINE, (bottom - 14) * FINE, (middle + 70) * FINE, (bottom + 44) * FINE
    pen.pieslice(rock, 180, 360, "#8d8f98")
    for band in range(bands):
        upper, lower = band / bands, (band + 1) / bands
        ends = [top + (bottom - top) * share for share in (upper, lower)]
        corners = [
            (middle - half(upper), ends[0]),
            (middle + half(upper), ends[0]),
            (middle + half(lower), ends[1]),
            (middle - half(lower), ends[1]),
        ]
        shape(corners, stripe if band % 2 == 0 else "#f7f7f4")
    box(8, bottom - 26, bottom, "#5b4636")  # the door
    box(above - 4, top - 30, top - 5, "#ffe36b")  # the lamp
    box(2, top - 30, top - 5, "#5d6068")
    box(above + 7, top - 6, top + 1, "#5d6068")  # the gallery
    roof = [(middle - above - 2, top - 29), (middle + above + 2, top - 29), (middle, top - 54)]
    shape(roof, stripe)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
