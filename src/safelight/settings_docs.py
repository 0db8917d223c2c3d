"""The documentation of a Request class: docs/settings.md, its docstring and its signature."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, get_type_hints

from safelight.settings import settings_of

if TYPE_CHECKING:
    from safelight.request import Request


def markdown(request_type: type[Request]) -> str:
    """Return the table of docs/settings.md."""
    lines = [
        "| setting | option | what it does | values | if left out |",
        "|---|---|---|---|---|",
    ]
    for setting in settings_of(request_type).values():
        short = f"`{setting.about.short}`, " if setting.about.short else ""
        option = "the argument" if setting.name == "prompt" else f"{short}`{setting.option}`"
        lines.append(
            f"| `{setting.name}` | {option} | {setting.description} | {setting.accepts} | "
            f"{setting.left_out} |"
        )
    return "\n".join(lines) + "\n"


def document(request_type: type[Request], keywords: type) -> None:
    """Give a Request class the docstring and the signature that `help` shows.

    keywords: a TypedDict of its settings.
    """
    settings = settings_of(request_type)
    lines = [f"{s.name}: {s.description}; {s.must_be}." for s in settings.values()]
    request_type.__doc__ = "\n    ".join([f"{request_type.__doc__}", *lines, ""])
    request_type.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=settings[name].default,
                annotation=annotation,
            )
            for name, annotation in sorted(
                get_type_hints(keywords).items(), key=lambda item: [*settings].index(item[0])
            )
        ]
    )
