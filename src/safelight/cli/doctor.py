"""The command that says what this machine has."""

import json
from typing import Annotated

from typer import Option

from safelight.cli.output import printable, say


def doctor(
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has and what Safelight uses of it.

    The output is safe to put into a bug report.
    """
    from safelight.doctor import examine, report

    found = examine()
    if as_json:
        say(json.dumps(found))
        return
    for line in report(found):
        say(printable(line))
