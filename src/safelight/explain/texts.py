"""Short texts that explain the parts of a model and the settings, for `safelight explain`."""

from __future__ import annotations

from typing import NamedTuple


class Text(NamedTuple):
    title: str
    body: str


PARTS: dict[str, Text] = {
    "diffusion": Text(
        "What a diffusion model is",
        "Add noise to a picture, a little at a time, until only noise is left. A diffusion model "
        "is trained on such noisy pictures: it learns to separate the noise from the picture. To "
        "draw a new picture, the process runs backwards. It starts from pure noise. The network "
        "estimates the picture under the noise, a little of the noise is removed, and the network "
        "estimates again.",
    ),
    "autoencoder": Text(
        "The autoencoder",
        "The autoencoder compresses a picture into a much smaller grid of numbers, the latents, "
        "and turns latents back into a picture. All steps work on latents. Only the latents of the "
        "last step are decoded into the finished picture.",
    ),
    "unet": Text(
        "The UNet",
        "The UNet is the network that does the work. Its input is the noisy latents, their noise "
        "level and the encoded prompt. Its output says what the noise in the latents is. Without "
        "that noise, an estimate of the finished picture is left. Early estimates are averages of "
        "many possible pictures, so they are blurred.",
    ),
    "transformer": Text(
        "The transformer",
        "The transformer is the network that does the work. The latents are cut into small "
        "squares, and each is a token like those of the prompt. In each layer all tokens look at "
        "each other, so words and places meet everywhere in the network. It was trained by flow "
        "matching: its output is the direction from the picture to the noise, and a step follows "
        "it a little back. Early estimates are averages of many possible pictures, so they are "
        "blurred.",
    ),
    "sampler": Text(
        "The sampler",
        "The network only estimates; the sampler computes the next state. From the noisy state "
        "and the latest estimates it computes the state at the next, lower noise level. A sampler "
        "is pure arithmetic without training, so the same sampler works with many models.",
    ),
}
"""The idea of diffusion, and the parts of a model."""

SETTINGS: dict[str, Text] = {
    "sampler": Text(
        "Sampler",
        "How the noise is removed. Some samplers use earlier estimates and need fewer steps. "
        "Those whose names end in _a or contain sde add fresh noise at each step; their pictures "
        "keep changing with the number of steps.",
    ),
    "schedule": Text(
        "Schedule",
        "The noise levels of the steps, from the first to the last. Karras and exponential use "
        "more steps at low noise, where details are drawn.",
    ),
    "steps": Text(
        "Steps",
        "How often the sampler asks the network. Few steps are quick and coarse. Beyond some "
        "number, more steps change nothing visible. The time grows with each step.",
    ),
    "guidance_scale": Text(
        "Guidance",
        "How strongly the picture follows the prompt. The network runs twice, with your prompt "
        "and with the negative prompt, and the difference is multiplied by this number. 1 turns "
        "guidance off and halves the work. High values make the colours too strong.",
    ),
    "seed": Text(
        "Seed",
        "The number that generates the noise at the start. The same seed with the same settings "
        "gives the same picture. Another seed gives another picture for the same prompt.",
    ),
    "strength": Text(
        "Strength",
        "With a picture to start from: how much noise is added to it before the steps begin. Near "
        "0 the picture stays the same; at 1 nothing of it is kept.",
    ),
    "size": Text(
        "Size",
        "Width and height in pixels. The work grows faster than the area. A model draws best at "
        "the size that it was trained on. Larger pictures repeat things, smaller ones cut them "
        "off.",
    ),
    "negative_prompt": Text(
        "Negative prompt",
        "What to keep out of the picture. Guidance moves away from this prompt and towards yours. "
        "If it is empty, guidance moves away from a picture without a prompt. Without guidance it "
        "has no effect.",
    ),
}
"""What each setting changes. Keys are those of Request; size is width and height."""

VIEWS: dict[str, Text] = {
    "noisy": Text("The noisy state", "The input of the network at this step, decoded."),
    "latents": Text(
        "Its latents", "The same state as numbers, each place in the colour that they stand for."
    ),
    "clean": Text("The clean estimate", "The network's guess of the picture under the noise."),
    "guidance": Text(
        "The effect of guidance",
        "Gray means no change: some models draw their first steps without guidance. A colour "
        "shows the direction of the change, at half strength.",
    ),
}
"""The pictures of each step."""

_NOISED = (
    "The finished picture with more and more noise: the network's input at these levels. σ is the "
    "strength of the noise; the picture has strength "
)
FORWARD = {"unet": f"{_NOISED}1.", "transformer": f"{_NOISED}1 − σ."}
"""What the pictures of the forward process show, by the name of the network."""

TEXT_ENCODER = {
    "unet": Text(
        "The text encoder",
        "The prompt is split into tokens, which are words or pieces of words. The text encoder "
        "turns each token into a list of numbers that also depends on the tokens before it. At "
        "every step, each place of the picture computes how much to use each token. This is "
        "cross-attention. A word is mostly used where its thing is drawn.",
    ),
    "transformer": Text(
        "The text encoder",
        "The prompt is split into tokens, which are words or pieces of words. The text encoder "
        "turns each token into a list of numbers that also depends on the other tokens. At every "
        "step, each place of the picture computes how much to use each token, and each other "
        "place. A word is mostly used where its thing is drawn.",
    ),
}
"""What reads the prompt, by the name of the network that uses it."""

_MAPS = (
    "The maps lie over the clean estimate of the step. A place is light where the network used the "
    "word most. Each map has its own scale. The percentage is the word's share of all attention. "
)
ATTENTION = {
    "unet": _MAPS
    + "Small shares are normal, and a word such as “a” may have a larger share than a noun, "
    "because most attention goes to the marks at the start and the end of the prompt:",
    "transformer": _MAPS
    + "Small shares are normal, because places of the picture attend mostly to each other. The map "
    "is the mean over all layers. Attention to other places and to the marks around the prompt is",
}
"""How to read the maps of attention, by the network. The share of the rest follows."""
