"""The command that measures this machine."""

import json
from typing import Annotated

from typer import Option

from safelight.cli.output import note, say, table


def bench(
    only: Annotated[
        list[str] | None,
        Option(help='One that runs, such as "safelight bfloat16"; may be repeated. [all]'),
    ] = None,
    repeat: Annotated[int, Option(min=1, max=100, help="Rounds.")] = 5,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine: Stable Diffusion 1.5 with random weights, beside what is installed."""
    from safelight import bench

    found = bench.run(only or bench.contenders(), repeat=repeat, log=note)
    if as_json:
        say(json.dumps(found))
        return
    for what in ("step", "decode", "start"):
        part = found[what]
        ours = list(part["ratio"])
        lines = [
            (
                name,
                f"{seconds:.2f} s",
                *(f"{part['ratio'][mine][name]:.2f}" if name != mine else "" for mine in ours),
            )
            for name, seconds in part["seconds"].items()
        ]
        for line in table([(what.upper(), "MEDIAN", *(f"× {name}" for name in ours)), *lines]):
            say(line)
        if "matmul_gflops" in part:
            say(f"a large matrix product: {part['matmul_gflops']:.0f} GFLOP/s")
        for name, error in part.get("error", {}).items():
            say(f"error of {name}: {error:.2g}")
        say("")
