"""The command line. Paths and JSON go to stdout, messages for a person to stderr.

Only Typer is imported here. Each command imports what it needs when it runs, so that
`safelight --help` answers at once.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from safelight import __version__
from safelight.cli import (
    backup,
    batch,
    bench,
    compare,
    convert,
    doctor,
    download,
    explain,
    generate,
    keys,
    options,
    serve,
    studio,
    tokens,
    tools,
    train,
    upscale,
    worker,
)
from safelight.cli.commands import AliasedCommand, PromptCommand
from safelight.cli.output import escape_what_stdout_lacks, fail, help_alone, note, say
from safelight.errors import SafelightError

BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="safelight",
    help="Words into pictures with Stable Diffusion class models, on the machine you have.",
    invoke_without_command=True,
    rich_markup_mode=None,  # plain help comes twice as fast
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
options.register(app, generate.generate)
options.register(app, compare.compare, without=("count",))
options.register(app, explain.explain, without=("count",))
options.register(app, batch.batch, without=("prompt",))
app.command()(tools.samplers)
app.command()(tools.models)
app.command()(tools.inspect)
app.command()(download.download)
app.command()(convert.convert)
app.command()(upscale.upscale)
app.command(cls=AliasedCommand)(tools.verify)
app.command(cls=PromptCommand)(tokens.tokens)
app.command()(serve.serve)
app.command()(studio.studio)
app.command()(worker.worker)
app.command()(backup.backup)
app.command()(backup.restore)
app.command()(bench.bench)
app.command()(doctor.doctor)
app.add_typer(keys.app, name="keys")
app.add_typer(train.app, name="train")


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        say(f"safelight {__version__}")
        raise typer.Exit
    help_alone(context)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 2 for bad input, 130 after Ctrl-C."""
    escape_what_stdout_lacks()
    try:
        code = app(arguments, prog_name="safelight", standalone_mode=False) or 0
    except SafelightError as error:
        fail(str(error))
        return BAD_INPUT
    except typer.TyperException as error:
        fail(error.format_message())
        return BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        note("stopped")
    return code
