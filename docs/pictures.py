"""Draw the pictures of the README and the docs with the bundled models, in a minute of one core.

    python docs/pictures.py [--model DIR] [--unconditional DIR] [--digits DIR] [--taught DIR]
                            [--out docs/pictures]

--digits takes a model of `safelight train unconditional digits`, and --taught one that was
fine-tuned on the pictures of docs/lighthouses.py. Both draw pictures of docs/train-your-own.md.

The pictures of docs/tasks.md are those of its commands: change prompt, sampler or seed in both.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import safelight

GAP, WHITE, BLACK = 6, (255, 255, 255), (0, 0, 0)
FRAME = (208, 208, 208)

HERO = (
    "a red apple",
    "a cat",
    "a rocket on a blue background",
    "a 3d render of a penguin",
    "a flat icon of a car",
    "a lion on a green background",
    "a blue cat",
    "three strawberries on a yellow background",
    "a hamburger",
    "a dog to the left of a pizza",
    "a butterfly on a light blue background",
    "a 3d render of a teddy bear",
)
HERO_SEED = 5
SAMPLERS = ("euler", "euler_a", "heun", "dpmpp_2m", "unipc", "lms", "pndm", "ddim")
STEPS = (5, 10, 20)
NOISE_AT = (0, 100, 200, 350, 500, 700, 999)  # timesteps
TAKEN_AT = (1, 10, 20, 30, 40, 45, 50)  # steps of fifty
TAUGHT = (
    "a lighthouse",
    "a blue lighthouse on a yellow background",
    "a purple lighthouse",
    "a lighthouse in the snow",
    "a lighthouse at night under the stars",
    "a cat",
)
BORDER = 6 / 64  # share of the cat's picture that the mask keeps on each side


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Draw the pictures of the docs.")
    parser.add_argument("--model", default="embedded", help="the text-to-image model")
    parser.add_argument("--unconditional", default="embedded-unconditional")
    parser.add_argument("--out", type=Path, default=here / "pictures")
    parser.add_argument("--digits", type=Path, help="a model of the digits")
    parser.add_argument("--taught", type=Path, help="a model that was taught lighthouses")
    given = parser.parse_args()

    model = safelight.load(given.model, device="cpu")
    pixels = safelight.load(given.unconditional, device="cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, picture in {
        "hero": hero(model),
        "text-to-image": text_to_image(model),
        "image-to-image": image_to_image(model),
        "inpainting": inpainting(model),
        "unconditional": unconditional(pixels),
        "samplers": samplers(model),
        "first-prompts": first_prompts(model),
    }.items():
        picture.save(given.out / f"{name}.png", optimize=True)
    if given.digits is not None:
        numbers = safelight.load(str(given.digits), device="cpu")
        noise_added(numbers).save(given.out / "noise-added.png", optimize=True)
        noise_taken(numbers).save(given.out / "noise-taken.png", optimize=True)
    if given.taught is not None:
        taught = safelight.load(str(given.taught), device="cpu")
        fine_tune(model, taught).save(given.out / "fine-tune.png", optimize=True)


def fine_tune(before: safelight.Model, after: safelight.Model) -> Image.Image:
    """Return six prompts drawn by two models, one row each."""
    pictures = [draw(model, prompt, seed=1) for model in (before, after) for prompt in TAUGHT]
    return sheet(pictures, columns=len(TAUGHT), side=128)


def noise_added(model: safelight.Model) -> Image.Image:
    """Return two digits with more and more noise: one row for each digit, one column a timestep."""
    import torch

    from safelight.picture import from_tensor, to_tensor
    from safelight.sampling.levels import alphas_cumprod
    from safelight.train.folder import digits

    bars = alphas_cumprod(model.scheduler)
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for squares in digits(model.native_size[0])[:2]:
        clean = to_tensor(Image.fromarray(squares))
        noise = torch.randn(clean.shape, generator=generator)
        for t in NOISE_AT:
            bar = float(bars[t])
            pictures.append(from_tensor(bar**0.5 * clean + (1 - bar) ** 0.5 * noise))
    return sheet(pictures, columns=len(NOISE_AT), side=64)


def noise_taken(model: safelight.Model) -> Image.Image:
    """Return the clean estimates of one picture in each row, one column for each step."""
    pictures = []
    for seed in (1, 2):
        run = model.stream(unconditional=True, sampler="ddim", steps=50, seed=seed)
        seen = {step.step: step.preview() for step in run}
        pictures += [seen[step] for step in TAKEN_AT]
    return sheet(pictures, columns=len(TAKEN_AT), side=64)


def hero(model: safelight.Model) -> Image.Image:
    pictures = [draw(model, prompt, seed=HERO_SEED) for prompt in HERO]
    return sheet(pictures, columns=6, side=128)


def first_prompts(model: safelight.Model) -> Image.Image:
    """Return what newcomers may type, each prompt drawn with two seeds and written below."""
    prompts = (Path(__file__).parents[1] / "tests" / "first-prompts.txt").read_text().splitlines()
    side, below, columns = 128, 24, 5
    font = ImageFont.load_default(13)
    width, height = 2 * side + 3 * GAP, side + below
    page = Image.new("RGB", (columns * width, -(-len(prompts) // columns) * height), WHITE)
    pen = ImageDraw.Draw(page)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * width, i // columns * height
        pair = sheet([draw(model, prompt, seed=seed) for seed in (1, 2)], columns=2, side=side)
        page.paste(pair, (x, y))
        pen.text((x + pair.width / 2, y + side + below / 2 - 3), prompt, BLACK, font, anchor="mm")
    return page


def text_to_image(model: safelight.Model) -> Image.Image:
    prompt = "a rocket on a blue background"
    return sheet([draw(model, prompt, seed=seed) for seed in (1, 2, 3)])


def image_to_image(model: safelight.Model) -> Image.Image:
    apple = draw(model, "a red apple", seed=3)
    orange = draw(model, "an orange", seed=3, image=apple, strength=0.6)
    return sheet([apple, orange])


def inpainting(model: safelight.Model) -> Image.Image:
    cat = draw(model, "a cat on a light blue background", seed=2)
    width, height = cat.size
    mask = Image.new("L", cat.size)
    x, y = round(BORDER * width), round(BORDER * height)
    mask.paste(255, (x, y, width - x, height - y))
    dog = draw(model, "a dog on a light blue background", seed=2, image=cat, mask=mask)
    return sheet([cat, mask.convert("RGB"), dog])


def unconditional(model: safelight.Model) -> Image.Image:
    made = model.generate(unconditional=True, sampler="ddim", count=12, seed=1)
    return sheet(made.images, columns=6)


def samplers(model: safelight.Model) -> Image.Image:
    """Return one row for each number of steps, one column for each sampler."""
    settings = {"prompt": "a cat on a light blue background", "seed": 1}
    pictures = [
        draw(model, sampler=sampler, steps=steps, **settings)
        for steps in STEPS
        for sampler in SAMPLERS
    ]
    grid = sheet(pictures, columns=len(SAMPLERS), side=128)
    left, top = 36, 28
    page = Image.new("RGB", (left + grid.width, top + grid.height), WHITE)
    page.paste(grid, (left, top))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    across, down = (grid.width + GAP) / len(SAMPLERS), (grid.height + GAP) / len(STEPS)
    for i, sampler in enumerate(SAMPLERS):
        pen.text((left + (i + 0.5) * across, top / 2), sampler, BLACK, font, anchor="mm")
    for i, steps in enumerate(STEPS):
        pen.text((left / 2, top + (i + 0.5) * down), str(steps), BLACK, font, anchor="mm")
    return page


def draw(model: safelight.Model, prompt: str, **settings: Any) -> Image.Image:
    return model.generate(prompt, **{"sampler": "dpmpp_2m", **settings}).images[0]


def sheet(pictures: Sequence[Image.Image], *, columns: int = 3, side: int = 192) -> Image.Image:
    """Return pictures of one size in rows, framed, each resized to `side` pixels of width."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = side, round(side * pictures[0].height / pictures[0].width)
    # Whole multiples stay sharp; a larger picture is reduced smoothly.
    smaller = pictures[0].width > side
    how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    made = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), WHITE)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (width + GAP), i // columns * (height + GAP)
        made.paste(picture.resize((width, height), how), (x, y))
        # A picture on white would have no edge on a white page.
        ImageDraw.Draw(made).rectangle((x, y, x + width - 1, y + height - 1), outline=FRAME)
    return made


if __name__ == "__main__":
    main()
