"""The pictures of a request: the settings that they are, and the names that they are stored under.

A setting may have several pictures. Each is stored under a name of its own, an input's: that of the
setting for the first, and "control_image_2" and so on for further ones. Recipes and databases have
their digests in their place, as `control_image_2_sha256`. Importing this does not import Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CONTROLS = 4
"""The most pictures that guide at once, each through a network of its own."""

REFERENCES = "reference_images"
"""The setting of the reference pictures. It is always a tuple; other settings are one only if they
have several pictures.

Reference pictures may differ in size from each other and from the picture that is drawn.
"""

MAX_REFERENCES = 10
"""The most reference pictures of a request: each makes a step longer. Models may take fewer."""

MAX_PICTURES = {
    "image": 1,
    "mask": 1,
    "control_image": MAX_CONTROLS,
    "ip_adapter_image": 1,
    REFERENCES: MAX_REFERENCES,
}
"""How many pictures each setting may have. A new setting that is a picture is a row here."""

PICTURES = tuple(MAX_PICTURES)
"""The settings that are pictures."""

MAX_TOGETHER = 64_000_000
"""The most pixels of several pictures of a setting: each is held in memory as it was given."""


def inputs_of(setting: str) -> tuple[str, ...]:
    """Return the names that the pictures of a setting may be stored under, in their order."""
    return (setting, *(f"{setting}_{place}" for place in range(2, MAX_PICTURES[setting] + 1)))


_SETTINGS = {name: setting for setting in PICTURES for name in inputs_of(setting)}

INPUTS = tuple(_SETTINGS)
"""The names that all pictures of a request may be stored under."""


def setting_of(name: str) -> str:
    """Return the setting that an input belongs to."""
    return _SETTINGS[name]


def digest_key(name: str) -> str:
    """Return the key of stored settings that has the digest of an input."""
    return f"{name}_sha256"


def inputs_in(settings: Mapping[str, Any]) -> list[str]:
    """Return the inputs of stored settings: those whose digests they have."""
    return [name for name in INPUTS if settings.get(digest_key(name)) is not None]


def each(value: Any) -> tuple[Any, ...]:
    """Return the values of a setting or an argument as a tuple; none for None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def by_input(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures among settings, or what stands for them, by their inputs.

    Raises SafelightError for more pictures than a setting may have.
    """
    found: dict[str, Any] = {}
    for setting, most in MAX_PICTURES.items():
        if (given := settings.get(setting)) is None:
            continue
        several = (given,) if most == 1 else each(given)
        if len(several) > most or not (several or setting == REFERENCES):
            told = f"a list of at most {most}" if setting == REFERENCES else f"1 to {most}"
            raise SafelightError(
                f"{setting} must be {told} pictures, not {len(several)}", field=setting
            )
        found |= zip(inputs_of(setting), several, strict=False)
    return found


def by_setting(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return pictures by their settings, the reverse of `by_input`. None is left out."""
    found: dict[str, Any] = {}
    for setting in PICTURES:
        several = [one for n in inputs_of(setting) if (one := inputs.get(n)) is not None]
        if several:
            alone = len(several) == 1 and setting != REFERENCES
            found[setting] = several[0] if alone else tuple(several)
    return found


def changed(settings: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return the pictures among settings, or what stands for them, each of them changed.

    change: given the setting, and one picture. Raises SafelightError as `by_input` does.
    """
    given = by_input(settings)
    return by_setting({name: change(setting_of(name), one) for name, one in given.items()})


def copied(setting: str, picture: Image) -> Image:
    """Return a converted copy: later changes to the caller's picture do not reach it.

    Raises SafelightError for a picture that cannot be converted.
    """
    from safelight.pixels import as_mask, as_rgb

    if picture.mode in ("I", "F"):
        raise SafelightError(
            f"{setting} has PIL's mode {picture.mode}, which does not say what white is: bring it "
            "to 0 to 255 and convert it to L",
            field=setting,
        )
    try:
        return as_mask(picture) if setting == "mask" else as_rgb(picture)
    except (OSError, SyntaxError) as error:  # PIL decodes a file when it is first used
        raise SafelightError(f"{setting} cannot be decoded: {error}", field=setting) from None


def check_area(setting: str, pictures: Sequence[Image]) -> None:
    """Raise SafelightError if several pictures of a setting are too large together."""
    if len(pictures) > 1 and sum(one.width * one.height for one in pictures) > MAX_TOGETHER:
        hint = "; no model reads more than about a million of each" if setting == REFERENCES else ""
        raise SafelightError(
            f"{setting} may have {MAX_TOGETHER // 10**6} million pixels together: make the "
            f"pictures smaller{hint}",
            field=setting,
        )


def check_there(given: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    """Raise SafelightError if pictures are not those that stored settings name.

    given: by their inputs; None for those that are not there. digests: those of the settings.
    """
    for name in INPUTS:
        wanted, there = digests.get(name), given.get(name) is not None
        if (wanted is not None) == there:
            continue
        problem = f"is needed again: the one of SHA-256 {wanted}"
        if there:
            problem = "was not part of this request: leave it out"
        raise SafelightError(f"{name} {problem}", field=setting_of(name))


def check_digest(name: str, wanted: Any, found: str) -> None:
    """Raise SafelightError if an input's digest is not the one that stored settings have."""
    if wanted != found:
        problem = f"must be the one of SHA-256 {wanted}, not {found}"
        raise SafelightError(f"{name} {problem}", field=setting_of(name))
