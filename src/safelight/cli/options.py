"""The options that several commands take, and the request that they make."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

if TYPE_CHECKING:
    from safelight.request import Request

Model = Annotated[
    str | None,
    Option(
        help="A model's name, a diffusers folder, a .safetensors file or a hub id "
        "[embedded; with --unconditional embedded-unconditional].",
        show_default=False,
    ),
]
Device = Annotated[str, Option(help="Where to compute: auto, cpu, mps or cuda.")]
Dtype = Annotated[str, Option(help="Precision: auto, float32, bfloat16 or float16.")]
Prompt = Annotated[
    str | None, Argument(help='What to draw, as in "a red apple".', show_default=False)
]
NegativePrompt = Annotated[
    str | None, Option(help="What to keep out of the picture.", show_default=False)
]
Width = Annotated[
    int | None,
    Option(
        help="64 to 2048 pixels, a multiple of 8 [the model's; with --image its own].",
        show_default=False,
    ),
]
Height = Annotated[int | None, Option(help="As --width.", show_default=False)]
Steps = Annotated[
    int | None, Option(help="1 to 1000 [as many as the sampler needs].", show_default=False)
]
GuidanceScale = Annotated[
    float | None,
    Option(help="How closely to follow the words, 0 to 100 [7.5].", show_default=False),
]
Seed = Annotated[
    int | None,
    Option(help="The same seed gives the same picture [drawn at random].", show_default=False),
]
Sampler = Annotated[
    str | None, Option(help="One of `safelight samplers` [pndm].", show_default=False)
]
Schedule = Annotated[
    str | None,
    Option(help="karras, exponential or beta [the model's own].", show_default=False),
]
Spacing = Annotated[
    str | None,
    Option(help="leading, linspace or trailing [the model's own].", show_default=False),
]
Picture = Annotated[str | None, Option(help="A picture to start from.", show_default=False)]
Mask = Annotated[
    str | None,
    Option(help="With --image: white where to repaint, black to keep.", show_default=False),
]
Strength = Annotated[
    float | None,
    Option(
        help="With --image: how much to change, above 0 up to 1 [0.8; 1 with --mask].",
        show_default=False,
    ),
]
Eta = Annotated[float | None, Option(help="Fresh noise in ddim, 0 to 1 [0].", show_default=False)]
Unconditional = Annotated[
    bool, Option("--unconditional", help="Draw from noise alone, without words.")
]
LowMemory = Annotated[
    bool, Option("--low-memory", help="On the CPU: large weights in a file, not in memory.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace files that exist.")]


def request(*, image: str | None, mask: str | None, **settings: Any) -> "Request":
    """The request of the options that were given; image and mask are the names of files."""
    from safelight.picture import open_mask, open_picture
    from safelight.request import Request

    given = {name: value for name, value in settings.items() if value is not None}
    if image is not None:
        given["image"] = open_picture(image, "image")
    if mask is not None:
        given["mask"] = open_mask(mask)
    return Request(**given)


def model_for(request: "Request", name: str | None) -> str:
    """The model that was named, or the one that ships for such a request."""
    if name is not None:
        return name
    return "embedded-unconditional" if request.unconditional else "embedded"
