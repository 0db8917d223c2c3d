"""Commands whose help lists the options below several headings."""

from typing import Any

from typer.core import TyperCommand

SETTINGS, LOADING = "Settings", "Model and folders"
"""The headings of most settings, and of the options that say how a model is loaded."""

_FIRST = ("Arguments", "Options", SETTINGS, LOADING)
"""The order of the headings. Others follow, in the order of their first options."""


class SectionedCommand(TyperCommand):
    """A command whose help lists each option below its `rich_help_panel`.

    Typer itself has such headings only in help that rich draws, which takes twice as long.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, each below its heading."""
        found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in _FIRST}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            found.setdefault("Arguments" if is_argument else heading, []).append(line)
        for heading, lines in found.items():
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)
