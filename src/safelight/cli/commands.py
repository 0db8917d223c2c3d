"""Commands that understand how other programs' options are written, and a prompt without quotes."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.settings import Setting


class PromptCommand(TyperCommand):
    """A command with a prompt, which says so where its words come as several arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            told = error.format_message()
            if not told.startswith("Got unexpected extra argument"):
                raise
            if not any(parameter.name == "prompt" for parameter in self.params):
                raise
            raise SafelightError(
                f'{told}: put the prompt in quotes, as in safelight {ctx.info_name} "a red apple"',
                field="prompt",
            ) from None


class AliasedCommand(TyperCommand):
    """A command that takes other programs' names of the settings that it has."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; other programs' names of options are replaced by ours."""
        from safelight.request import Request
        from safelight.settings import settings_of

        taken = {parameter.name for parameter in self.params}
        names = {
            name: setting
            for setting in settings_of(Request).values()
            for name in (setting.option, setting.about.short, *setting.about.aliases)
            if name and setting.name in taken
        }
        return super().parse_args(ctx, _renamed(args, names))


def _renamed(args: Sequence[str], names: dict[str, "Setting"]) -> list[str]:
    """Replace other programs' names of options by ours, up to `--`, after which none are options.

    names: all names of settings, ours included. Raises SafelightError for two names of one setting.
    """
    found: list[str] = []
    said: dict[str, str] = {}
    for i, argument in enumerate(args):
        if argument == "--":
            return found + list(args[i:])
        name, equals, value = argument.partition("=")
        if re.fullmatch(r"-[a-zA-Z][0-9]+", argument):  # as -n2
            name = argument[:2]
        if name not in names:
            found.append(argument)
            continue
        setting = names[name]
        before = said.setdefault(setting.name, name)
        if before != name and not setting.several:
            raise SafelightError(f"{before} and {name} are one setting: give one of them")
        aliased = name in setting.about.aliases
        found.append(f"{setting.option}{equals}{value}" if aliased else argument)
    return found
