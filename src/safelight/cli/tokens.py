"""`safelight tokens`: how a prompt is read."""

import json
from typing import Annotated, Any, cast

from typer import Argument, Option

from safelight.cli import options
from safelight.cli.output import say


def tokens(
    prompt: Annotated[str, Argument(help="The prompt.")],
    model: Annotated[
        str | None,
        Option(
            "--model",
            "-m",
            help="A model's name, a diffusers folder, a checkpoint file or a hub id [embedded].",
            show_default=False,
        ),
    ] = None,
    prompt_syntax: Annotated[
        str, Option("--prompt-syntax", "--syntax", help="plain, a1111, comfy or compel.")
    ] = "plain",
    emphasis: Annotated[
        str, Option(help="In a1111: original, no-norm, ignore or none.")
    ] = "original",
    steps: Annotated[int, Option(help="Number of steps, for schedules such as [a:b:0.5].")] = 20,
    negative: Annotated[
        bool, Option("--negative", help="Read it as a negative prompt, without AND.")
    ] = False,
    seed: Annotated[int, Option("--seed", "-s", help="What dynamic prompts are drawn with.")] = 0,
    dynamic_prompts: Annotated[
        bool, Option("--dynamic-prompts", help="Draw `{a|b}` and `__name__`.")
    ] = False,
    wildcards: options.Wildcards = None,
    embedding: Annotated[
        list[str] | None,
        Option(help="A textual inversion by name or path; more than one may be given."),
    ] = None,
    models_dir: options.ModelsDir = None,
    parts: options.Parts = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how a prompt is read.

    Prints chunks, tokens, weights and schedule, and what is unknown. Only the model's tokenizer is
    loaded. A bar joins the tokens of one word.
    """
    from safelight.adapters.embeddings import EmbeddingFinder
    from safelight.adapters.reader import PromptReader
    from safelight.families import FAMILIES
    from safelight.paths import expanded
    from safelight.prompt.dynamic import draw
    from safelight.prompt.show import lines
    from safelight.request import Request
    from safelight.weights.find import find, parts_finder
    from safelight.weights.library import open_library
    from safelight.weights.plan import read_plan

    checked = Request(
        prompt=prompt,
        prompt_syntax=cast("Any", prompt_syntax),
        emphasis=cast("Any", emphasis),
        steps=steps,
        seed=seed,
        embeddings=embedding or (),
    )
    source = find(model or "embedded", models_dir=models_dir)
    # No network reads it here. What is taken from --parts, though, brings its own tokenizer.
    networks = {name for family in FAMILIES for name in family.parts}
    given = parts_finder(parts, models_dir=models_dir)
    plan = read_plan(source, without=("vae",) if parts else networks, parts=given)
    text = prompt
    if dynamic_prompts or wildcards is not None:
        [text] = draw([prompt], seed, None if wildcards is None else expanded(wildcards))
    own = "negative_prompt" if negative else "prompt"
    reader = PromptReader(plan, EmbeddingFinder(open_library(models_dir), takes_paths=True))
    found = reader.describe(
        checked.replace(**{"prompt": "", own: text}),
        negative=negative,
    )
    if as_json:
        say(json.dumps({"prompt": text, **found}, ensure_ascii=False))
        return
    if text != prompt:
        say(f"drawn: {text}")
    for line in lines(found):
        say(line)
