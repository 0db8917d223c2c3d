"""A request: the settings of a picture, checked together, without PyTorch.

`safelight.request_fields` describes each setting; the rules between settings are here.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any, Self, Unpack

from PIL.Image import Image, Resampling
from pydantic import (
    BaseModel,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from safelight.adapters.asked import MAX_NAME, AskedLora
from safelight.controls import check_control, first_guide, left_small, with_blanks
from safelight.errors import SafelightError
from safelight.families.control import OF_PICTURES
from safelight.hires import check_hires, taken, unused_hires
from safelight.keywords import Pictures, RequestSettings
from safelight.pixels import picture_sha256, resized
from safelight.region import unused_inpainting
from safelight.request_basics import draw_seed
from safelight.request_fields import RequestFields
from safelight.request_pictures import (
    INPUTS,
    PICTURES,
    REFERENCES,
    by_input,
    by_setting,
    check_area,
    check_digest,
    check_there,
    copied,
    digest_key,
    each,
    setting_of,
)
from safelight.request_ranges import MAX_SEED
from safelight.settings import explained, shown
from safelight.settings_docs import document
from safelight.sizes import size_of

MAX_PROMPT = 16 * 1024
DRAWN = ("image", "mask", "control_image")
"""The pictures that are brought to the size to draw. Models read others at sizes of their own."""

STRENGTH = 0.8
"""How much of a picture is changed if the request does not say; with a mask, all of it."""


class _Listed(type(BaseModel)):
    """Lists only Safelight's own names in `dir` and `help`, without pydantic's methods."""

    def __dir__(cls) -> list[str]:
        own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "safelight"]
        names = {name for base in own for name in vars(base) if not name.startswith("_")}
        return sorted(names - {"model_post_init"})  # pydantic's, for private attributes


class Request(RequestFields, metaclass=_Listed):
    """Settings of one generation of `count` images. Frozen, and valid once it exists.

    `Request(...)` and `Request.from_dict` raise SafelightError with the setting as its `field`;
    `model_validate` raises pydantic's ValidationError.
    """

    _digests: dict[str, str] = PrivateAttr(default_factory=dict)
    """The SHA-256 of pictures as they were given, where the request has them resized."""

    def __init__(self, **settings: Unpack[RequestSettings]) -> None:
        try:
            BaseModel.__init__(self, **settings)
        except ValidationError as error:
            raise explained(type(self), error) from None

    @model_validator(mode="before")
    @classmethod
    def _resolve_sampler_name(cls, given: Any) -> Any:
        """Replace another program's name of a sampler, and the schedule that it includes."""
        if isinstance(given, dict) and isinstance(given.get("sampler"), str):
            from safelight.sampler_names import in_our_names

            return in_our_names(given)
        return given

    @field_validator("seed", mode="before")
    @classmethod
    def _draw_seed_for_none(cls, value: object) -> object:
        return draw_seed() if value is None else value

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_text(cls, value: str) -> str:
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValueError("lone surrogate") from None
        if size > MAX_PROMPT or "\0" in value:
            raise ValueError("too long, or a NUL")
        return value

    @field_validator("loras")
    @classmethod
    def _check_loras(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            AskedLora.parse(text)
        return value

    @field_validator("embeddings", "styles")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(0 < len(name) <= MAX_NAME and name.isprintable() for name in value):
            raise ValueError("a name that is empty, too long or not printable")
        return value

    @field_validator("sampler")
    @classmethod
    def _check_sampler(cls, value: str) -> str:
        from safelight.sampling import find

        try:
            find(value)
        except SafelightError as error:
            raise SafelightError(str(error), code="unknown_sampler", field="sampler") from None
        return value

    @field_validator(*PICTURES)
    @classmethod
    def _copy_pictures(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        check_area(name, each(value))
        found = tuple(copied(name, one) for one in each(value))
        return found if isinstance(value, tuple) else next(iter(found), None)

    @model_validator(mode="after")
    def _validate_together(self) -> Self:
        return self._check_together()

    def _check_together(self) -> Self:
        if self.unconditional:
            for name in ("prompt", "negative_prompt", *PICTURES):
                if getattr(self, name):
                    raise SafelightError(
                        f"{name} cannot be used with unconditional: such a model draws from "
                        f"noise alone; leave out one of the two",
                        field=name,
                    )
        if self.mask is not None:
            if self.image is None:
                raise SafelightError(
                    "mask needs a picture to repaint: give image as well", field="mask"
                )
            if self.mask.size != self.image.size:
                raise SafelightError(
                    "mask must have the picture's size, {}x{}, not {}x{}".format(
                        *self.image.size, *self.mask.size
                    ),
                    field="mask",
                )
        check_control(self)
        for what in ("guidance", "ip_adapter"):
            start, end = getattr(self, f"{what}_start"), getattr(self, f"{what}_end")
            if (start or 0) > (1 if end is None else end):
                raise SafelightError(
                    f"{what}_end must be at least {what}_start, {start}, not {end}",
                    field=f"{what}_end",
                )
        check_hires(self)
        if self.seed + self.count - 1 > MAX_SEED:
            raise SafelightError(
                f"seed must leave room for {self.count} pictures: "
                f"at most {MAX_SEED - self.count + 1}, not {self.seed}",
                field="seed",
            )
        return self

    def unused_settings(self, guidance: float = 7.5) -> list[str]:
        """Return warnings about settings that do nothing. guidance: the model's best scale."""
        from safelight.sampling import SAMPLERS

        found: list[str] = []
        if self.negative_prompt and self.guidance_scale <= 1 and not self._is_composed():
            hint = f"try {guidance:g}" if guidance > 1 else "leave it out"
            found.append(f"negative_prompt does nothing at guidance_scale 1 or less: {hint}")
        if self.strength is not None and self.image is None:
            found.append("strength does nothing without a picture: give image, or leave it out")
        if self.unconditional and self.guidance_scale not in (1, 7.5):
            found.append("guidance_scale does nothing with unconditional: leave it out")
        if self.emphasis != "original" and self.prompt_syntax != "a1111":
            found.append("emphasis does nothing without prompt_syntax a1111: leave it out")
        if self.eta and not SAMPLERS[self.sampler].eta:
            takes = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.eta)
            found.append(f"eta does nothing with {self.sampler}; it is for {takes}")
        for name, picture in OF_PICTURES.items():
            unset = getattr(self, name) == type(self).model_fields[name].default
            if getattr(self, picture) is None and not unset:
                found.append(f"{name} does nothing without {picture}: give one as well")
        if self.mask is not None and self.mask.getbbox() is None:
            found.append("mask has no white: nothing of the picture is repainted")
        return found + unused_inpainting(self) + unused_hires(self)

    def _is_composed(self) -> bool:
        """Return whether the prompt has AND or an overall weight, which use the negative prompt."""
        from safelight.prompt.dialects import read

        parts = read(self.prompt, self.prompt_syntax, steps=1, emphasis=self.emphasis).parts
        return len(parts) > 1 or any(part.weight != 1 for part in parts)

    @property
    def strength_taken(self) -> float | None:
        """How much of the picture is changed, by default if not given; None without a picture."""
        if self.image is None:
            return None
        own = STRENGTH if self.mask is None else 1.0
        return own if self.strength is None else self.strength

    @property
    def steps_taken(self) -> int:
        """The steps of a resolved request, without those that strength leaves out."""
        assert self.steps is not None
        return taken(self.steps, self.strength or 1)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """Return the same request with these values for settings that are left out or None.

        defaults: valid settings, as `defaults.defaults_of` returns them. A request with its own
        guidance_end gets no guidance_start, which could come after it; one with its own
        guidance_start gets no guidance_end that comes before it.
        """
        asked = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if self.guidance_end is not None:
            asked.add("guidance_start")
        if defaults.get("guidance_end", 1) < (self.guidance_start or 0):
            asked.add("guidance_end")
        return self.model_copy(update={k: v for k, v in defaults.items() if k not in asked})

    def replace(self, **changes: Any) -> Self:
        """Return the same request with these settings changed, checked anew.

        The seed stays; other settings that were left out stay left out. Pictures that stay are
        shared, not copied.
        """
        asked = {name: getattr(self, name) for name in (*self.model_fields_set, "seed")}
        kept = {name: asked.pop(name, None) for name in PICTURES if name not in changes}
        kept = {name: picture for name, picture in kept.items() if picture}
        stay = set(kept)
        if changes.keys() & {"image", "mask"}:  # one is checked against the other
            both = {name: kept.pop(name) for name in ("image", "mask") if name in kept}
            changes = {**changes, **both}
        made = type(self)(**{**asked, **changes})
        made = made._with_pictures(kept, {}) if kept else made
        made._digests = {n: one for n, one in self._digests.items() if setting_of(n) in stay}
        return made

    def without(self, *names: str) -> Self:
        """Return the same request as if these settings had been left out."""
        plain = {name: self.__class__.model_fields[name].get_default() for name in names}
        made = self.model_copy(update=plain)
        made.__pydantic_fields_set__.difference_update(names)
        return made

    def with_pictures(
        self, image: Image | None = None, mask: Image | None = None, **others: Any
    ) -> Self:
        """Return the same request with pictures, RGB, and a mask, L of 0 and 255; not copied."""
        given = {"image": image, "mask": mask, **others}
        given = {name: one for name, one in given.items() if one is not None}
        for name, pictures in given.items():
            check_area(name, each(pictures))
        return self._with_pictures(given, {})

    def _with_pictures(self, pictures: Mapping[str, Any], digests: Mapping[str, str]) -> Self:
        """Return the same request with pictures. digests: of the originals, where they differ."""
        made = self.model_copy(update=dict(pictures))
        made._digests = dict(digests)
        return made._check_together()

    def fitted(self, native: tuple[int, int] | None = None) -> Self:
        """Return the same request with its pictures at the size to draw.

        `to_dict` has the digests of the originals. Raises SafelightError for a picture that is too
        small or too large, if no size is asked for; it names a size like native, the model's own.
        """
        if self.sized_by is None:
            return self
        name = "control_image" if self.image is None else "image"
        size = size_of(self.sized_by.size, self.width, self.height, name=name, native=native)
        if self.hires_scale != 1:  # the engine fits them to each pass
            return self.model_copy(update=dict(zip(("width", "height"), size, strict=True)))
        how, small = {"mask": Resampling.NEAREST}, left_small(self, size)
        pictures = {
            name: resized(picture, size, how.get(name, Resampling.LANCZOS))
            for name, picture in self.pictures.items()
            if picture.size != size and setting_of(name) in DRAWN and name not in small
        }
        if not pictures:
            return self
        digests = {name: self._digest(name, self.pictures[name]) for name in pictures}
        fitted = by_setting({**self.pictures, **pictures})
        return self._with_pictures(fitted, {**self._digests, **digests})

    @property
    def pictures(self) -> dict[str, Image]:
        """The pictures that it has, by their inputs (see `request_pictures`)."""
        return by_input({name: getattr(self, name) for name in PICTURES})

    @property
    def sized_by(self) -> Image | None:
        """The picture whose size is drawn if none is asked for: the first that counts."""
        return None if self.is_cropped else self.image or first_guide(self)

    @property
    def is_cropped(self) -> bool:
        """Whether only the part around the mask is drawn: pictures keep their size until then."""
        return self.mask is not None and self.mask_padding is not None

    def _digest(self, name: str, picture: Image) -> str:
        """Return the SHA-256 of a picture as it was given."""
        return self._digests.get(name) or picture_sha256(picture)

    @property
    def was_resized(self) -> bool:
        """Whether its picture was given at another size and is `fitted` now."""
        if self.image is None or "image" not in self._digests:
            return False
        return self._digests["image"] != picture_sha256(self.image)

    def without_pictures(self) -> Self:
        """Return the same request without its pictures, which take much memory."""
        return self.model_copy(update={**dict.fromkeys(PICTURES), REFERENCES: ()})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them; pictures by their SHA-256 alone."""
        settings = self.model_dump()
        for name, value in settings.items():
            if isinstance(value, tuple):
                settings[name] = list(value)
        for name, picture in self.pictures.items():
            settings[digest_key(name)] = self._digest(name, picture)
        return settings

    @classmethod
    def from_dict(
        cls, settings: dict[str, Any], *, fitted: bool = False, **pictures: Unpack[Pictures]
    ) -> Self:
        """Return the request that `to_dict` wrote, given its pictures pixel for pixel.

        fitted: `Request.fitted` has resized them already; they are not copied.
        """
        settings = {str(name): value for name, value in settings.items()}
        digests = {name: settings.pop(digest_key(name), None) for name in INPUTS}
        for name in digests.keys() & settings.keys():
            raise SafelightError(
                f"{name} stands in a request as {digest_key(name)} alone, its digest", field=name
            )
        given = with_blanks(pictures, digests)
        check_there(by_input(given), digests)
        if fitted:
            request = cls(**settings).with_pictures(**given)
            request._digests = {name: one for name, one in digests.items() if one}
        else:
            request = cls(**settings, **given)
        for name, picture in request.pictures.items():
            check_digest(name, digests[name], request._digest(name, picture))
        return request

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, **pictures: Unpack[Pictures]) -> Self:
        """Return the request that `to_json` wrote; see `from_dict`."""
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError):
            raise SafelightError("a request must be a JSON object; this is not JSON") from None
        if not isinstance(settings, dict):
            raise SafelightError(f"a request must be a JSON object, not {shown(settings)}")
        return cls.from_dict(settings, **pictures)

    def idle(self) -> list[str]:
        """Deprecated: `unused_settings`."""
        warnings.warn("Request.idle is now unused_settings", DeprecationWarning, stacklevel=2)
        return self.unused_settings()

    def where_silent(self, settings: Mapping[str, Any]) -> Self:
        """Deprecated: `with_defaults`."""
        warnings.warn("Request.where_silent is now with_defaults", DeprecationWarning, stacklevel=2)
        return self.with_defaults(settings)


document(Request, RequestSettings)
