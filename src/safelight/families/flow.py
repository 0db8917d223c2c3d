"""The base of the families of flow matching: transformers over the latents of an autoencoder.

Such a network reads whole prompts. Weights, schedules and AND of the prompt syntaxes have no effect
on it, and a warning says so. (ComfyUI weights the states of T5, which then say little else.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families.autoencoded import AutoencodedFamily
from safelight.families.base import Conditioning, Part
from safelight.families.flow_files import Layout, Published, is_unused, unknown_variant
from safelight.families.single import SingleFile
from safelight.prompt.dialects import read
from safelight.prompt.networks import is_lora
from safelight.sampling import SchedulerConfig, Table, table
from safelight.weights.check import Header
from safelight.weights.names import Section, from_single_file, t5_folder_name

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.nets.reuse import Reuse
    from safelight.prompt.reading import Reading
    from safelight.request import Request
    from safelight.weights.plan import Plan

T5_PART = Part(
    "safelight.nets.t5", "T5EncoderModel", "T5Config", stem="model", rename=t5_folder_name
)
T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")


@dataclass(frozen=True, slots=True)
class Rows:
    """The inputs of a call of the network, a row for each evaluation.

    x: states, [n, channels, h, w]. timestep: float32 [n], from 0 to 1000. tokens: text states,
    [n, length, width]. pooled: [n, width]. guidance: the scales, float32 [n]. lengths: how many of
    each row's text states count; empty: all.
    """

    x: Tensor
    timestep: Tensor
    tokens: Tensor
    pooled: Tensor | None
    guidance: Tensor
    lengths: list[int]


class FlowFamily(AutoencodedFamily):
    """A family of flow matching.

    patch: side, in latents, of what is one token. trained: see `sampling.flow.Course`. layout: of
    its single files. published: what a single file of this variant does not hold; None if the
    variant is no published one.
    """

    network: ClassVar[str] = "transformer"
    trainable: ClassVar[bool] = False
    shortcuts: ClassVar[tuple[str, ...]] = ("guidance_start", "guidance_end", "linears")
    patch: ClassVar[int] = 2
    trained: ClassVar[bool] = False
    layout: ClassVar[Layout]
    published: Published | None = None
    conditioned_on: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "guidance_scale",
        "prompt_syntax",
        "emphasis",
    )

    # --- files -------------------------------------------------------------------------------

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> FlowFamily:
        if not SchedulerConfig.from_dict(scheduler).is_flow:
            raise SafelightError(
                f"its scheduler is {scheduler.get('_class_name')!r:.40}; one of flow matching is "
                "needed, such as FlowMatchEulerDiscreteScheduler"
            )
        return self

    def published_variants(self) -> tuple[FlowFamily, ...]:
        """Return the variants that single files may be of."""
        raise NotImplementedError

    def identify(self, header: Header) -> FlowFamily | None:
        prefix = self.layout.prefix(header)
        if prefix is None:
            return None
        told = self.layout.told(header, prefix)
        for variant in self.published_variants():
            if self.layout.wanted(variant.configs["transformer"]) == told:
                return variant
        raise unknown_variant(header, told, self)

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """The config of each network of a single file; empty for a variant that has none."""
        return {} if self.published is None else self.published.configs

    def sections(self) -> dict[str, Section]:
        if not self.configs:
            return {}
        transformer = self.original(self.network, self.configs[self.network])
        return self.layout.sections(transformer, self.configs["vae"])

    def single_file(self, header: Header) -> SingleFile:
        assert self.published is not None
        weights = from_single_file(header, self.parts, self.sections(), is_unused)
        return SingleFile(self.configs, weights, self.published.scheduler, self.published.native)

    # --- drawing -----------------------------------------------------------------------------

    def check_request(self, model: Model | Plan, request: Request) -> None:
        if request.unconditional:
            raise SafelightError(
                f"{model.name} draws from words: leave out unconditional, or load "
                "embedded-unconditional",
                field="unconditional",
            )

    def warnings(self, model: Model, request: Request) -> list[str]:
        found: list[str] = []
        for name, reading in _readings(model, request).items():
            found += [f"{name} has {said}" for said in reading.warnings]
            for network in reading.networks:
                told = f"{name}: <{':'.join(network):.60}> was left out"
                if not is_lora(network):
                    found.append(told)
                elif name == "negative_prompt":
                    found.append(f"{told}: LoRAs count in the prompt alone")
            if _is_marked(reading):
                found.append(
                    f"{name} has weights or changes, which {model.name} does not read: the words "
                    "of its beginning count"
                )
        for name, text in texts_of(model, request).items():
            if (cut := self.left_out(model, text)) is not None:
                shown = repr(cut) if len(cut) <= 100 else f"{cut[:100]!r}…"
                found.append(f"{name} was cut; left out: {shown}")
        return found

    def left_out(self, model: Model, text: str) -> str | None:
        """Return the end of a text that is longer than the model reads, None if it is not."""
        return None

    def table(self, model: Model, request: Request, skip: int | None = None) -> Table:
        # Imported here, as it needs NumPy, which a server or a help text does not.
        from safelight.sampling.flow import Course

        assert request.steps is not None
        steps, strength = request.steps, request.strength
        if skip is None and strength is not None:
            # As diffusers' pipelines of these models count, which differs from those of SD.
            skip = int(max(steps - min(steps * strength, steps), 0))
        width, height = model.native_size
        *_, rows, columns = self.latent_shape(
            model, (request.width or width, request.height or height)
        )
        return table(
            request.sampler,
            self.scheduler(model.scheduler),
            steps,
            schedule=request.schedule,
            spacing=request.spacing,
            eta=request.eta,
            skip=skip,
            course=Course((rows // self.patch) * (columns // self.patch), self.trained),
        )

    def call(
        self,
        model: Model,
        inputs: list[Tensor],
        timesteps: list[float],
        conditionings: list[Conditioning],
        reuse: Reuse | None = None,
    ) -> Tensor:
        import torch

        counts = [asked.evaluations for asked in conditionings]
        together = list(zip(inputs, timesteps, conditionings, counts, strict=True))
        x = torch.cat([state.expand(n, -1, -1, -1) for state, _, _, n in together])
        times = [time for _, time, _, n in together for _ in range(n)]
        scales = [asked.guidance for _, _, asked, n in together for _ in range(n)]
        tokens = [asked.tokens for asked in conditionings if asked.tokens is not None]
        pooled = [asked.pooled for asked in conditionings if asked.pooled is not None]
        rows = Rows(
            x.to(model.dtype),
            torch.tensor(times, device=x.device),
            torch.cat(tokens).to(model.dtype),
            torch.cat(pooled).to(model.dtype) if pooled else None,
            torch.tensor(scales, device=x.device),
            [length for asked in conditionings for length in asked.lengths or ()],
        )
        return self.velocity(model, rows).float()

    def velocity(self, model: Model, rows: Rows) -> Tensor:
        """Return what the network predicts, noise − clean, in the shape of rows.x."""
        raise NotImplementedError

    # --- pictures and latents ----------------------------------------------------------------

    def latent_shape(self, model: Model, size: tuple[int, int]) -> tuple[int, int, int, int]:
        cell = self.factor(model) * self.patch
        width, height = (-(-side // cell) * self.patch for side in size)
        return 1, model.vae.config.latent_channels, height, width


def texts_of(model: Model, request: Request) -> dict[str, str]:
    """Return the texts to encode; the negative prompt, if it is evaluated, is the first."""
    return {name: _words(reading) for name, reading in _readings(model, request).items()}


def t5_states(model: Model, text: str, tokenizer: str, encoder: str, length: int) -> Tensor:
    """Return the states of T5 for a text that is cut or padded, [1, length, width].

    tokenizer, encoder: the names of the parts.
    """
    import torch

    ids = model.parts[tokenizer].encode(text, length, pad=True).ids
    return model.parts[encoder](torch.tensor([ids], device=model.device))


def _readings(model: Model, request: Request) -> dict[str, Reading]:
    names = ["prompt"]
    if request.guidance_scale > 1 and not model.family.takes_guidance(model):
        names.insert(0, "negative_prompt")
    return {
        name: read(
            getattr(request, name),
            request.prompt_syntax,
            steps=request.steps_taken,
            emphasis=request.emphasis,
            negative=name == "negative_prompt",
        )
        for name in names
    }


def _words(reading: Reading) -> str:
    """Return the words of a prompt at its first step, without weights."""
    return "".join(piece.text for piece in reading.parts[0].stages[0].pieces)


def _is_marked(reading: Reading) -> bool:
    """Return whether a prompt has weights, changes from step to step, or has several parts."""
    stages = [stage for part in reading.parts for stage in part.stages]
    return len(stages) > 1 or any(piece.weight != 1 for piece in stages[0].pieces)
