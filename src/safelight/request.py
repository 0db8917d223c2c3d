"""What a person asks for (Request) and what they get (Result).

Every setting of a picture is checked here and nowhere else, before any work starts and without
importing PyTorch. A setting that is not usable raises SafelightError with one line.
"""

import difflib
import json
import numbers
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from PIL.Image import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from safelight import __version__
from safelight.errors import SafelightError
from safelight.picture import (
    as_mask,
    as_rgb,
    check_writable,
    output_paths,
    picture_sha256,
    save_png,
)
from safelight.recipe import png_texts

LAST_SEED = 2**63 - 1
LONGEST_PROMPT = 16 * 1024


def draw_seed() -> int:
    """A seed nobody chose: 32 random bits, few enough digits to read out to someone."""
    return secrets.randbelow(2**32)


def allowed_side(pixels: float) -> int:
    """The nearest side that a picture may have."""
    return min(max(round(pixels / 8) * 8, 64), 2048)


def allowed_size(size: tuple[int, int]) -> tuple[int, int]:
    """A size itself, or in its proportions the nearest that a picture may have."""
    scale = max(min(1.0, 2048 / max(size)), 64 / min(size))
    return allowed_side(size[0] * scale), allowed_side(size[1] * scale)


def _plain_number(value: object) -> object:
    """numpy's scalars are numbers too; booleans are left for the strict check to refuse."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value


Whole = Annotated[int, BeforeValidator(_plain_number)]
Number = Annotated[float, BeforeValidator(_plain_number), Field(allow_inf_nan=False)]
Side = Annotated[Whole, Field(ge=64, le=2048, multiple_of=8)]

_TEXT = "text of at most 16 KiB without NUL characters or lone surrogates"
_SIDE = "a multiple of 8 from 64 to 2048 (left out: the model's own, or the picture's)"


class Request(BaseModel):
    """One wish, of one or more pictures. Frozen; every field is valid once it exists.

    The description of a field says what it accepts, and is the text of its error message too.
    `Request(...)` and `Request.from_dict` raise SafelightError; `model_validate` raises
    pydantic's own ValidationError, for frameworks that expect that.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )

    prompt: str = Field("", description=_TEXT)
    negative_prompt: str = Field("", description=_TEXT)
    width: Side | None = Field(None, description=_SIDE)
    height: Side | None = Field(None, description=_SIDE)
    steps: Whole | None = Field(
        None, ge=1, le=1000, description="a whole number from 1 to 1000 (left out: the sampler's)"
    )
    # Above 100 the two estimates are pulled so far apart that half precision overflows.
    guidance_scale: Number = Field(
        7.5,
        ge=0,
        le=100,
        description="a number from 0 to 100 (1 is off, 7.5 usual, above 30 colours burn out)",
    )
    seed: Whole = Field(
        default_factory=draw_seed,
        ge=0,
        le=LAST_SEED,
        description="a whole number from 0 to 2**63 - 1 (left out: drawn at random)",
    )
    count: Whole = Field(1, ge=1, le=64, description="a whole number from 1 to 64")
    sampler: str = Field("pndm", description="the name of a sampler")
    schedule: Literal["karras", "exponential", "beta"] | None = Field(
        None, description="karras, exponential or beta (left out: the model's own)"
    )
    spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        None, description="leading, linspace or trailing (left out: the model's own)"
    )
    strength: Number | None = Field(
        None, gt=0, le=1, description="a number above 0, up to 1 (1 keeps nothing of the picture)"
    )
    eta: Number = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    image: Image | None = Field(
        None,
        exclude=True,
        repr=False,
        description="a PIL picture (safelight.picture.open_picture reads one from a file)",
    )
    mask: Image | None = Field(
        None,
        exclude=True,
        repr=False,
        description="a PIL picture, white where to repaint (safelight.picture.open_mask)",
    )
    unconditional: bool = Field(False, description="true or false")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SafelightError(_explain(error)) from None

    @field_validator("seed", mode="before")
    @classmethod
    def _seed_for_none(cls, value: object) -> object:
        return draw_seed() if value is None else value

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_text(cls, value: str) -> str:
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValueError("lone surrogate") from None
        if size > LONGEST_PROMPT or "\0" in value:
            raise ValueError("too long, or a NUL")
        return value

    @field_validator("sampler")
    @classmethod
    def _check_sampler(cls, value: str) -> str:
        from safelight.sampling import find

        find(value)
        return value

    @field_validator("image", "mask")
    @classmethod
    def _own_picture(cls, value: Image | None, info: ValidationInfo) -> Image | None:
        """A converted copy: what the caller does to theirs later is theirs."""
        if value is None:
            return None
        try:
            return as_rgb(value) if info.field_name == "image" else as_mask(value)
        except (OSError, SyntaxError) as error:  # PIL decodes a file when it is first used
            raise SafelightError(f"{info.field_name} cannot be decoded: {error}") from None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.unconditional:
            for name in ("prompt", "negative_prompt", "image", "mask"):
                if getattr(self, name):
                    raise SafelightError(
                        f"{name} cannot be used with unconditional: such a model draws from "
                        f"noise alone; leave out one of the two"
                    )
        if self.mask is not None:
            if self.image is None:
                raise SafelightError("mask needs a picture to repaint: give image as well")
            if self.mask.size != self.image.size:
                raise SafelightError(
                    f"mask must have the picture's size, {_size(self.image)}, "
                    f"not {_size(self.mask)}"
                )
        if self.seed + self.count - 1 > LAST_SEED:
            raise SafelightError(
                f"seed must leave room for {self.count} pictures: "
                f"at most {LAST_SEED - self.count + 1}, not {self.seed}"
            )
        return self

    def idle(self) -> list[str]:
        """Warnings about settings that were given and can change nothing."""
        from safelight.sampling import SAMPLERS

        found: list[str] = []
        if self.negative_prompt and self.guidance_scale <= 1:
            found.append("negative_prompt does nothing at guidance_scale 1 or less: try 7.5")
        if self.strength is not None and self.image is None:
            found.append("strength does nothing without a picture: give image, or leave it out")
        if self.unconditional and self.guidance_scale not in (1, 7.5):
            found.append("guidance_scale does nothing with unconditional: leave it out")
        if self.eta and not SAMPLERS[self.sampler].eta:
            takes = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.eta)
            found.append(f"eta does nothing with {self.sampler}; it is for {takes}")
        if self.mask is not None and self.mask.getbbox() is None:
            found.append("mask has no white: nothing of the picture is repainted")
        return found

    def replace(self, **changes: Any) -> Self:
        """The same request with these settings changed, checked anew. What it was not asked for
        stays so, but for the seed.
        """
        asked = {name: getattr(self, name) for name in (*self.model_fields_set, "seed")}
        return type(self)(**{**asked, **changes})

    def where_silent(self, settings: Mapping[str, Any]) -> Self:
        """The same request with these settings, checked before, where it was asked for nothing."""
        return self.model_copy(
            update={k: v for k, v in settings.items() if k not in self.model_fields_set}
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them; a picture or mask is named by its SHA-256 alone."""
        settings = self.model_dump()
        for name, picture in (("image", self.image), ("mask", self.mask)):
            if picture is not None:
                settings[f"{name}_sha256"] = picture_sha256(picture)
        return settings

    @classmethod
    def from_dict(
        cls, settings: dict[str, Any], *, image: Image | None = None, mask: Image | None = None
    ) -> Self:
        """The request that `to_dict` wrote; needs its picture and mask again, pixel for pixel."""
        settings = {str(name): value for name, value in settings.items()}
        digests = {name: settings.pop(f"{name}_sha256", None) for name in ("image", "mask")}
        for name in digests.keys() & settings.keys():
            raise SafelightError(f"{name} stands in a request as {name}_sha256 alone, its digest")
        request = cls(**settings, image=image, mask=mask)
        for name, picture in (("image", request.image), ("mask", request.mask)):
            digest = digests[name]
            if digest is None and picture is not None:
                raise SafelightError(f"{name} was not part of this request: leave it out")
            if digest is not None and picture is None:
                raise SafelightError(f"{name} is needed again: the one of SHA-256 {digest}")
            if picture is not None and picture_sha256(picture) != digest:
                raise SafelightError(
                    f"{name} must be the one of SHA-256 {digest}, not {picture_sha256(picture)}"
                )
        return request

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_json(
        cls, text: str | bytes, *, image: Image | None = None, mask: Image | None = None
    ) -> Self:
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError):
            raise SafelightError("a request must be a JSON object; this is not JSON") from None
        if not isinstance(settings, dict):
            raise SafelightError(f"a request must be a JSON object, not {_shown(settings)}")
        return cls.from_dict(settings, image=image, mask=mask)


@dataclass
class Result:
    """The pictures of one request, and all that was done to make them.

    settings are those of `Request.to_dict` with the model's defaults filled in; seeds[i] made
    images[i]; timings are in seconds.
    """

    images: list[Image]
    seeds: list[int]
    settings: dict[str, Any]
    model: str
    sha256: str
    device: str
    dtype: str
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)

    def recipe(self, i: int = 0) -> dict[str, Any]:
        """All it takes to make picture i again, alone: what is written into its PNG."""
        return {
            "safelight": __version__,
            "model": {"name": self.model, "sha256": self.sha256},
            "device": self.device,
            "dtype": self.dtype,
            "size": list(self.images[i].size),
            "settings": {**self.settings, "seed": self.seeds[i], "count": 1},
            "warnings": self.warnings,
        }

    def save(self, out: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Writes every picture as PNG with its recipe and returns the paths, in order.

        out: `name.png` or a folder, see `safelight.picture.output_paths`. Raises SafelightError
        if a file exists or cannot be written; those before it stay written.
        """
        paths = output_paths(out, self.seeds, overwrite=overwrite)
        for path in paths:
            check_writable(path, overwrite=overwrite)
        for i, path in enumerate(paths):
            self.save_one(i, path, overwrite=overwrite)
        return paths

    def save_one(self, i: int, path: Path, *, overwrite: bool = False) -> None:
        """Writes picture i as PNG with its recipe; raises as `save` does."""
        save_png(self.images[i], path, png_texts(self.recipe(i)), overwrite=overwrite)
        self.paths.append(path)

    def to_dict(self) -> dict[str, Any]:
        return {
            "paths": [str(path) for path in self.paths],
            "seeds": self.seeds,
            "model": {"name": self.model, "sha256": self.sha256},
            "device": self.device,
            "dtype": self.dtype,
            "settings": self.settings,
            "warnings": self.warnings,
            "timings": self.timings,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


def _explain(error: ValidationError) -> str:
    """One line for the first of pydantic's findings."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name[:40], Request.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(Request.model_fields)}"
        return f"there is no setting {_shown(name)}: {hint}"
    if isinstance(own := first.get("ctx", {}).get("error"), SafelightError):
        return str(own)
    return f"{name} must be {Request.model_fields[name].description}, not {_shown(first['input'])}"


def _shown(value: object) -> str:
    """A value as an error message can show it: short, on one line, printable."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"{value[:40]!r}… of {len(value)} characters"
    if isinstance(value, float) or value is None:
        return repr(value)
    if isinstance(value, bool):
        return repr(value).lower()
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else "a number that long"
    return f"something of type {type(value).__name__}"


def _size(image: Image) -> str:
    return f"{image.width}x{image.height}"


def taught(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler, steps and guidance scale that a distilled model draws with, by the notes in its
    safelight.json; empty for any other.
    """
    said = notes.get("draw_with")
    names = ("sampler", "steps", "guidance_scale")
    if not isinstance(said, dict):
        return {}
    try:
        asked = Request(prompt="-", **{name: said[name] for name in names})
    except (KeyError, SafelightError):
        return {}  # a file of someone else's
    return {name: getattr(asked, name) for name in names}
