"""The pictures of a request: the settings that they are, and the names that they are stored under.

Recipes and databases have their digests in their place, as `image_sha256`. Importing this does not
import Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = ("image", "mask", "control_image", "ip_adapter_image")
"""The settings that are one picture."""

REFERENCES = "reference_images"
"""The setting that is several pictures. They have no size in common, nor with what is drawn."""

MAX_REFERENCES = 10
"""The most reference pictures of a request: each makes a step longer. Models may take fewer."""

MAX_TOGETHER = 64_000_000
"""The most pixels of all reference pictures of a request: each is held in memory as it was given.
"""

ALL = (*PICTURES, REFERENCES)
"""The settings that are pictures."""

STORED = (*PICTURES, *(f"{REFERENCES}-{i + 1}" for i in range(MAX_REFERENCES)))
"""The names that the pictures of a request may be stored under."""


def digest_key(name: str) -> str:
    """Return the key of stored settings that has the digest of a setting's picture, or a list."""
    return f"{name}_sha256"


def stored_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the names that the pictures of stored settings are stored under."""
    names = [name for name in PICTURES if digest_key(name) in settings]
    return names + [*STORED[len(PICTURES) :]][: len(settings.get(digest_key(REFERENCES)) or ())]


def setting_of(name: str) -> str:
    """Return the setting of a picture's stored name."""
    return name if name in PICTURES else REFERENCES


def by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures among settings, or what stands for them, by their stored names."""
    found = {name: settings[name] for name in PICTURES if settings.get(name) is not None}
    several = settings.get(REFERENCES) or ()
    return found | dict(zip(STORED[len(PICTURES) :], several, strict=False))


def by_setting(pictures: Mapping[str, Any]) -> dict[str, Any]:
    """Return pictures by their settings. pictures: by their stored names; None is left out."""
    found = {name: one for name, one in pictures.items() if name in PICTURES}
    several = tuple(one for name in STORED[len(PICTURES) :] if (one := pictures.get(name)))
    return found | ({REFERENCES: several} if several else {})


def changed(settings: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return the pictures among settings, or what stands for them, each of them changed.

    change: given the setting, and one picture. Raises SafelightError if several are no list.
    """
    found = {name: change(name, settings[name]) for name in PICTURES if name in settings}
    if REFERENCES in settings:
        several = settings[REFERENCES]
        if not isinstance(several, list | tuple) or len(several) > MAX_REFERENCES:
            raise SafelightError(
                f"{REFERENCES} must be a list of at most {MAX_REFERENCES} pictures",
                field=REFERENCES,
            )
        found[REFERENCES] = tuple(change(REFERENCES, one) for one in several)
    return found


def copied(picture: Image, name: str) -> Image:
    """Return a converted copy: later changes to the caller's picture do not reach it.

    name: of its setting. Raises SafelightError for a picture that cannot be converted.
    """
    from safelight.pixels import as_mask, as_rgb

    if picture.mode in ("I", "F"):
        raise SafelightError(
            f"{name} has PIL's mode {picture.mode}, which does not say what white is: bring it "
            "to 0 to 255 and convert it to L",
            field=name,
        )
    try:
        return as_mask(picture) if name == "mask" else as_rgb(picture)
    except (OSError, SyntaxError) as error:  # PIL decodes a file when it is first used
        raise SafelightError(f"{name} cannot be decoded: {error}", field=name) from None


def check_area(pictures: Sequence[Image]) -> None:
    """Raise SafelightError if reference pictures are too large together."""
    if sum(one.width * one.height for one in pictures) > MAX_TOGETHER:
        raise SafelightError(
            f"{REFERENCES} may have {MAX_TOGETHER // 10**6} million pixels together: make them "
            "smaller; no model reads more than about a million of each",
            field=REFERENCES,
        )


def check_digest(name: str, wanted: Any, found: Any) -> None:
    """Raise SafelightError if a picture is not the one that stored settings have.

    wanted: the digest there, found: that of the picture, or None; lists of several pictures.
    """
    if (wanted or None) == (found or None):
        return
    told = ", ".join(map(str, wanted)) if isinstance(wanted, list) else wanted
    if not wanted:
        problem = "was not part of this request: leave it out"
    elif not found:
        problem = f"is needed again: the one of SHA-256 {told}"
    else:
        has = ", ".join(found) if isinstance(found, list) else found
        problem = f"must be the one of SHA-256 {told}, not {has}"
    raise SafelightError(f"{name} {problem}", field=name)
