"""What is what, in plain words: for the page of `safelight explain` and for the studio."""

from __future__ import annotations

from typing import NamedTuple


class Text(NamedTuple):
    title: str
    body: str


PARTS: dict[str, Text] = {
    "diffusion": Text(
        "What a diffusion model is",
        "Take a picture and add noise, a little at a time, until nothing else is left. That way is "
        "easy, and it is all that such a model was ever taught with: it was shown noisy pictures "
        "and learned to tell what is noise in them. To make a new picture the way is walked "
        "backwards. It begins with noise alone, the network says what it takes to be under it, a "
        "little of the noise is taken away, and it is asked again.",
    ),
    "autoencoder": Text(
        "The autoencoder",
        "Pictures have many more pixels than there is to say about them. The autoencoder turns a "
        "picture into a much smaller grid of numbers, the latents, and latents back into a "
        "picture. All the steps work on latents; only the last ones are decoded to be seen.",
    ),
    "unet": Text(
        "The UNet",
        "The network that does the work. It is given noisy latents, how noisy they are, and the "
        "words, and answers with what is noise in them; take that away, and its idea of the "
        "finished picture is left. At first this is the mean of all pictures that could be meant, "
        "and so it is blurred. It looks at the whole in coarse maps and at details in fine ones.",
    ),
    "text_encoder": Text(
        "The text encoder",
        "The prompt is cut into tokens, which are words or pieces of words, and the text encoder "
        "turns each into a list of numbers that also depends on the words before it. At every step "
        "each place of the picture asks which of them to listen to. That is cross-attention, and "
        "where a word is listened to is mostly where its thing is drawn.",
    ),
    "sampler": Text(
        "The sampler",
        "The network only gives its opinion; the sampler decides what to do with it. From the "
        "noisy state and the latest opinions it works out the state at the next, lower level of "
        "noise. It is arithmetic alone, has learned nothing, and can be swapped freely.",
    ),
}
"""The parts of a model, and the idea."""

SETTINGS: dict[str, Text] = {
    "sampler": Text(
        "Sampler",
        "How the noise is taken away. Some remember earlier opinions and get by with fewer steps; "
        "those that end in _a or have sde in their names add fresh noise on the way, and never "
        "settle on one picture however many steps they take.",
    ),
    "schedule": Text(
        "Schedule",
        "Which noise levels the steps stop at, from the first to the last. Karras and exponential "
        "spend more of the steps where little noise is left, which is where details are made.",
    ),
    "steps": Text(
        "Steps",
        "How often the network is asked. Few steps are quick and coarse; from some number on, more "
        "change nothing that can be seen. Time grows with each one.",
    ),
    "guidance_scale": Text(
        "Guidance",
        "How strongly to follow the words. The network is asked twice, with your prompt and with "
        "the negative one, and the difference is exaggerated by this number. 1 turns it off and "
        "halves the work; too much burns the colours.",
    ),
    "seed": Text(
        "Seed",
        "The number that the noise at the start is made from. The same seed with the same settings "
        "gives the same picture; another seed gives another picture of the same.",
    ),
    "strength": Text(
        "Strength",
        "When you start from a picture: how much of the way it is turned to noise before the steps "
        "bring it back. Near 0 it stays as it was, at 1 nothing is kept.",
    ),
    "size": Text(
        "Size",
        "Width and height in pixels. Work grows with the area, and faster. Models are best at the "
        "size they were trained on: larger they repeat themselves, smaller they crop.",
    ),
    "negative_prompt": Text(
        "Negative prompt",
        "What to keep away from. Guidance moves from the picture that these words describe towards "
        "the one that yours do. Left empty, it moves away from what no words at all would give. "
        "Without guidance it does nothing.",
    ),
}
"""What each setting changes. Keys are those of Request; size is width and height."""

VIEWS: dict[str, Text] = {
    "noisy": Text("The noisy state", "What the network is given at this step, decoded to be seen."),
    "latents": Text(
        "Its latents", "The same as the numbers it really is: each place as the colour it means."
    ),
    "clean": Text("The clean estimate", "What the network takes to be under the noise."),
    "guidance": Text(
        "What guidance added",
        "Gray is no change; a colour is the push towards it, at half strength.",
    ),
}
"""What is shown of each step."""

ATTENTION = (
    "Light is where a word was listened to most, each word by its own measure, over the clean "
    "estimate of the step: the mean of all heads of the layer whose maps show best where things "
    "are."
)
