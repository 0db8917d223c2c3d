"""How many finished jobs a server keeps: `--keep 90d,50GB,10000`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from safelight.errors import SafelightError

AGES = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
SIZES = {
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_UNITS = {unit.lower(): unit for unit in (*AGES, *SIZES)}


@dataclass(frozen=True)
class Keep:
    """Limits beyond which finished jobs are deleted, the oldest first; None is no limit.

    seconds: time since a job ended. size: bytes of all pictures, finished ones and inputs. jobs:
    number of finished jobs.
    """

    seconds: float | None = None
    size: int | None = None
    jobs: int | None = None

    def __bool__(self) -> bool:
        return self != Keep()

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Return the limits of a text such as "90d,50GB,10000". Raises SafelightError."""
        found: dict[str, float | int] = {}
        for part in text.split(","):
            name, value = _limit(part.strip())
            if name in found:
                raise _invalid(text, "each kind of limit can be given once")
            if value <= 0:
                raise _invalid(text, "a limit is more than 0")
            found[name] = value
        return cls(**found)  # pyright: ignore[reportArgumentType]


def _limit(part: str) -> tuple[str, float | int]:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)", part, flags=re.ASCII)
    unit = match and (_UNITS.get(match[2].lower()) if match[2] else "")
    if match is None or unit is None:
        raise _invalid(part, "nothing else is known")
    if unit in AGES:
        return "seconds", float(match[1]) * AGES[unit]
    if unit in SIZES:
        return "size", int(float(match[1]) * SIZES[unit])
    if "." in match[1]:
        raise _invalid(part, "a number of jobs is whole")
    return "jobs", int(match[1])


def _invalid(text: str, why: str) -> SafelightError:
    return SafelightError(
        f"--keep {text[:40]}: {why}: expected an age (90d, 12h, 8w, 2y), a size (50GB, 500MiB) "
        "or a number of jobs (10000), or several with commas"
    )
