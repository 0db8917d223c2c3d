"""The command that measures this machine."""

import json
from typing import Annotated, Any

from typer import Option

from safelight.cli.output import note, say, table


def bench(
    only: Annotated[
        list[str] | None,
        Option(help='One that runs, such as "safelight bfloat16"; may be repeated. [all]'),
    ] = None,
    part: Annotated[
        list[str] | None,
        Option(
            help="step, decode, picture, one-step, start, busy, threads or fast; may be repeated. "
            "[all that can run here]"
        ),
    ] = None,
    repeat: Annotated[int, Option(min=1, max=100, help="Rounds.")] = 5,
    model: Annotated[
        str, Option(help="A model that draws words, whose pictures the part fast compares.")
    ] = "embedded",
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine.

    It draws with Stable Diffusion 1.5 of random weights, beside what else is installed.
    """
    from safelight import bench

    names, parts = only or bench.contenders(), part or bench.parts_here()
    bench.check(names, parts, model)
    told: dict[str, Any] = {}
    for what in dict.fromkeys(parts):
        found = bench.run(names, parts=[what], repeat=repeat, model=model, log=note)
        if as_json:
            told |= found
        else:  # at once: a later part may fail
            _say(what, found["by threads" if what == "threads" else what])
    if as_json:
        say(json.dumps(told))


def _say(what: str, taken: dict[str, Any]) -> None:
    if what == "busy":
        _say_busy(taken)
        return
    if what == "fast":
        _say_fast(taken)
        return
    ours = list(taken["ratio"])
    lines = [
        (
            name,
            f"{seconds:.2f} s",
            *(f"{taken['ratio'][mine][name]:.2f}" if name != mine else "" for mine in ours),
        )
        for name, seconds in taken["seconds"].items()
    ]
    for line in table([(what.upper(), "MEDIAN", *(f"× {name}" for name in ours)), *lines]):
        say(line)
    if "matmul_gflops" in taken:
        say(f"a large matrix product: {taken['matmul_gflops']:.0f} GFLOP/s")
    for name, error in taken.get("error", {}).items():
        say(f"error of {name}: {error:.2g}")
    say("")


def _say_busy(taken: dict[str, Any]) -> None:
    lines = [(name, f"{seconds:.2f} s") for name, seconds in taken["seconds"].items()]
    for line in table([("BUSY", "MEDIAN"), *lines]):
        say(line)
    for way, ratio in taken["busy over quiet"].items():
        say(f"beside two others it takes {ratio:.2f} times as long, {way}")
    for where, ratio in taken["asleep over spinning"].items():
        say(f"asleep takes {ratio:.2f} times as long as spinning, {where}")


def _say_fast(taken: dict[str, Any]) -> None:
    lines: list[tuple[str, ...]] = [
        ("FAST", "MEDIAN", "TIMES AS FAST", "PSNR", "WORST", "SSIM", "WORST")
    ]
    for way, seconds in taken["seconds"].items():
        far = taken["distance"].get(way)
        shown = [""] * 5
        if far is not None:
            shown = [f"{1 / taken['ratio']['full'][way]:.2f}"]
            shown += [f"{far[name]:.1f}" for name in ("psnr", "worst psnr")]
            shown += [f"{far[name]:.3f}" for name in ("ssim", "worst ssim")]
        lines.append((str(way), f"{seconds:.2f} s", *shown))
    for line in table(lines):
        say(line)
    say("")
