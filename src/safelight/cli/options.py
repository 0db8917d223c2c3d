"""Options that several commands share; those of a request are derived from `Request`."""

import inspect
import re
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from safelight.cli.commands import AliasedCommand, PromptCommand
from safelight.cli.sections import LOADING, SETTINGS, SectionedCommand
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.request import Request
    from safelight.settings import Setting

Model = Annotated[
    str | None,
    Option(
        "--model",
        "-m",
        help="A model's name, a diffusers folder, a checkpoint file or a hub id "
        "[embedded; with --unconditional embedded-unconditional].",
        show_default=False,
    ),
]
Device = Annotated[
    str, Option(help="Where to compute: auto, cpu, mps or cuda.", rich_help_panel=LOADING)
]
Dtype = Annotated[
    str, Option(help="Precision: auto, float32, bfloat16 or float16.", rich_help_panel=LOADING)
]
LowMemory = Annotated[
    bool,
    Option(
        "--low-memory",
        help="On the CPU: large weights in a file, not in memory.",
        rich_help_panel=LOADING,
    ),
]
Parts = Annotated[
    list[str] | None,
    Option(
        "--parts",
        help="What gives a checkpoint file what it lacks: a model's folder or hub id, a file of "
        "text encoders or an autoencoder, a tokenizer. More than one may be given.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]


def one_or_all(given: list[str] | None) -> str | list[str] | None:
    """Return what an option that may be given several times was given: one text, or all."""
    return given[0] if given and len(given) == 1 else given or None


Vae = Annotated[
    str | None,
    Option(
        "--vae",
        help="Another autoencoder: a folder, a file, a name in the models folder or a hub id.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
Refiner = Annotated[
    str | None,
    Option(
        "--refiner",
        help="A model that takes the last steps, as SDXL's refiner does, given as --model is.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
Controlnet = Annotated[
    list[str] | None,
    Option(
        "--controlnet",
        help="A ControlNet or T2I-Adapter, through which --control-image guides the model, given "
        "as --vae is. More than one may be given, each with a --control-image, in this order.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
IpAdapter = Annotated[
    str | None,
    Option(
        "--ip-adapter",
        help="An IP-Adapter, through which --ip-adapter-image is a prompt: a file, a name in the "
        "models folder, or a file of a hub repository (org/name/folder/file).",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
ImageEncoder = Annotated[
    str | None,
    Option(
        "--image-encoder",
        help="What the IP-Adapter reads pictures with, given as --vae is; by default it is looked "
        "for beside the adapter.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
PreviewVae = Annotated[
    str | None,
    Option(
        "--preview-vae",
        help="A tiny autoencoder that previews are decoded with, given as --vae is.",
        show_default=False,
    ),
]
ModelsDir = Annotated[
    str | None,
    Option(
        "--models-dir",
        help="A folder of models, LoRAs, embeddings, text encoders, ControlNets and the like, "
        "which are found by name [SAFELIGHT_MODELS].",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
AllowModels = Annotated[
    str | None,
    Option(
        "--allow-models",
        help="The models that requests may name besides --model, with commas between them "
        "[those of the models folder and those that ship].",
        show_default=False,
    ),
]
ModelMemory = Annotated[
    str | None,
    Option(
        "--model-memory",
        help="The memory that loaded models may take together, such as 8GB "
        "[three quarters of the machine's].",
        show_default=False,
    ),
]
Wildcards = Annotated[
    str | None,
    Option(
        "--wildcards",
        help="A folder of text files: `__name__` in a prompt is a line of name.txt, drawn with the "
        "seed, and `{a|b}` is one of both.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
StylesFile = Annotated[
    str | None,
    Option(
        "--styles-file",
        help="A styles.csv, as web UIs keep it, for --style.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
DataDir = Annotated[
    Path | None, Option(help="Jobs and pictures [the user's data folder].", show_default=False)
]
Exact = Annotated[
    bool,
    Option("--exact", help="Draw each picture alone, so that a seed always gives the same bytes."),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace files that exist.")]


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def memory_size(text: str | None) -> int | None:
    """Return the bytes of --model-memory."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?b|)", text.strip().lower())
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise SafelightError(f"--model-memory {text!r:.40}: expected a size such as 8GB")
    return size


def names(text: str | None) -> tuple[str, ...] | None:
    """Return the names of --allow-models."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def register(
    app: typer.Typer, function: Callable[..., None], *, without: Collection[str] = ()
) -> None:
    """Add a command that takes the settings of a request besides its own options.

    function: called with the given settings, as a dict, and its own options by name. without:
    settings that the command does not take.
    """

    def stand_in() -> None: ...

    stand_in.__doc__ = function.__doc__

    class Command(RequestCommand):
        def build(self) -> TyperCommand:
            from safelight.request import Request

            return command_of(function, Request, without=without)

    app.command(function.__name__, cls=Command)(stand_in)


class RequestCommand(AliasedCommand, PromptCommand):
    """A command that imports `Request` only when it is run or asked for its options."""

    def build(self) -> TyperCommand:
        """Return the command with all of its options."""
        raise NotImplementedError

    @cached_property
    def _built(self) -> TyperCommand:
        return self.build()

    @property
    def params(self) -> list[Any]:
        """The options and arguments."""
        return self._built.params

    @params.setter
    def params(self, _: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass  # the stand-in has none

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, each below its heading."""
        self._built.format_options(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        return ctx.invoke(self._built.callback, **ctx.params)


def command_of(
    function: Callable[..., None], request_type: "type[Request]", *, without: Collection[str] = ()
) -> TyperCommand:
    """Return the command of a function, with an option for each setting of a Request class."""
    from safelight.settings import settings_of

    settings = {n: s for n, s in settings_of(request_type).items() if n not in without}

    def call(**given: Any) -> None:
        asked = {name: given.pop(name) for name in settings}
        # Some versions of typer give an empty list for an option that is not given.
        function({name: value for name, value in asked.items() if value not in (None, [])}, **given)

    derived = [_parameter(setting) for setting in settings.values()]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(function).parameters.values())[1:]
    ]
    parameters = sorted([*derived, *own], key=lambda p: p.name not in ("x", "prompt"))
    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = function.__doc__
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command(function.__name__, cls=SectionedCommand)(call)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def request_of(settings: dict[str, Any]) -> "Request":
    """Return the request of the given options; pictures are names of files."""
    from safelight.picture import open_pictures
    from safelight.request import Request

    given = {**settings, **open_pictures(settings)}
    if given.get("seed") == -1:  # as web UIs have it
        del given["seed"]
    return Request(**given)


def with_words(
    settings: dict[str, Any], *, styles_file: str | None, wildcards: str | None
) -> dict[str, Any]:
    """Return the settings, with wildcards replaced by drawn choices.

    Raises SafelightError for an unknown style, before a model is loaded.
    """
    from safelight.prompt.styles import apply_styles, read_styles

    if settings.get("styles") or styles_file is not None:
        styles = {} if styles_file is None else read_styles(styles_file)
        apply_styles(styles, settings.get("styles") or (), "", "")
    return settings if wildcards is None else {"dynamic_prompts": True, **settings}


def model_for(request: "Request", name: str | None) -> str:
    """Return the model that was named, or the shipped model for such a request."""
    if name is not None:
        return name
    return "embedded-unconditional" if request.unconditional else "embedded"


def check_prompt(settings: dict[str, Any], example: str) -> None:
    """Raise SafelightError if there is neither a prompt nor `unconditional`."""
    if "prompt" not in settings and not settings.get("unconditional"):
        raise SafelightError(f"PROMPT is missing: try safelight {example}", field="prompt")


def _parameter(setting: "Setting") -> inspect.Parameter:
    """Return the option of a setting; the prompt is an argument."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    if setting.name == "prompt":
        argument = Argument(help='What to draw, as in "a red apple".', show_default=False)
        return inspect.Parameter(
            "prompt", keyword, default=None, annotation=Annotated[str | None, argument]
        )
    names = (setting.option, setting.about.short) if setting.about.short else (setting.option,)
    group = setting.about.group or SETTINGS
    what = setting.description[:1].upper() + setting.description[1:]
    again = "; one for each ControlNet, if there are several" if setting.several else ""
    again = "; may be given more than once" if setting.listed else again
    if setting.kind is bool:
        option = Option(*names, help=f"{what}.", show_default=False, rich_help_panel=group)
        return inspect.Parameter(
            setting.name, keyword, default=None, annotation=Annotated[bool | None, option]
        )
    if setting.kind is None:
        said = f"{what} (a PNG, JPEG or WebP file){again}."
    else:
        left_out = f" [{setting.left_out}]" if setting.left_out not in ("empty", "none") else ""
        accepts = "" if setting.kind is str and not setting.choices else f": {setting.accepts_one}"
        said = f"{what}{accepts}{again}{left_out}."
    if setting.kind is tuple:
        each = f": {setting.about.accepts}" if setting.about.accepts else ""
        said = f"{what}{each}{again}."
    option = Option(*names, help=said, show_default=False, rich_help_panel=group)
    kind = str if setting.kind in (None, tuple) else setting.kind
    kind = list[kind] if setting.several else kind
    return inspect.Parameter(
        setting.name, keyword, default=None, annotation=Annotated[kind | None, option]
    )
