"""The base of the families of flow matching: transformers over the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families.autoencoded import AutoencodedFamily
from safelight.families.base import Cached, Conditioning, Family
from safelight.families.flow_files import Layout, Published, is_unused, unknown_variant
from safelight.families.flow_texts import MARKED, is_marked, readings_of, texts_of
from safelight.families.part import Part
from safelight.families.single import SingleFile
from safelight.prompt.networks import is_lora
from safelight.prompt.whole import Reader
from safelight.sampling import SAMPLERS, SchedulerConfig, Table, table
from safelight.weights.check import Header
from safelight.weights.names import (
    Section,
    from_single_file,
    qwen_folder_name,
    t5_folder_name,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from safelight.model import Model
    from safelight.nets.reuse import Reuse
    from safelight.prompt.reading import Word
    from safelight.prompt.text_tokenizer import TextTokenizer
    from safelight.prompt.tokenizer import Tokenizer
    from safelight.request import Request
    from safelight.weights.folder import Folder
    from safelight.weights.plan import Plan

T5_PART = Part(
    "safelight.nets.t5", "T5EncoderModel", "T5Config", stem="model", rename=t5_folder_name
)
T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")

QWEN3_PART = Part(
    "safelight.nets.qwen3",
    "Qwen3Model",
    "Qwen3Config",
    classes=("Qwen3Model", "Qwen3ForCausalLM"),
    stem="model",
    rename=qwen_folder_name,
)
QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


@dataclass(frozen=True, slots=True)
class Rows:
    """The inputs of a call of the network, a row for each evaluation.

    x: states, [n, channels, h, w]. timestep: float32 [n], from 0 to 1000. tokens: text states,
    [n, length, width]. pooled: [n, width]. guidance: the scales, float32 [n]. lengths: how many of
    each row's text states count; empty: all. references: latents of the reference pictures, each
    [n, channels, any, any].
    """

    x: Tensor
    timestep: Tensor
    tokens: Tensor
    pooled: Tensor | None
    guidance: Tensor
    lengths: list[int]
    references: Sequence[Tensor] = ()


class FlowFamily(AutoencodedFamily):
    """A family of flow matching.

    patch: side, in latents, of what is one token. trained, empirical: see `sampling.flow.Course`.
    layout: of its single files. published: what a single file of this variant does not hold; None
    if the variant is no published one.
    """

    network: ClassVar[str] = "transformer"
    trainable: ClassVar[bool] = False
    areas: ClassVar[tuple[float, float] | None] = (0.2, 2.5)
    half: ClassVar[str] = "bfloat16"  # they were trained in it, and overflow float16
    shortcuts: ClassVar[tuple[str, ...]] = ("guidance_start", "guidance_end", "linears")
    patch: ClassVar[int] = 2
    trained: ClassVar[bool] = False
    empirical: ClassVar[bool] = False
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
        if "sampler" in request.model_fields_set and SAMPLERS[request.sampler].flow is None:
            able = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.flow)
            raise SafelightError(
                f"{request.sampler} is no sampler for flow matching, by which {model.name} was "
                f"trained; those are {able}",
                field="sampler",
            )

    def warnings(self, model: Model, request: Request) -> list[str]:
        found: list[str] = []
        for name, (_, reading) in readings_of(model, request).items():
            found += [f"{name} has {said}" for said in reading.warnings]
            for network in reading.networks:
                told = f"{name}: <{':'.join(network):.60}> was left out"
                if not is_lora(network):
                    found.append(told)
                elif name == "negative_prompt":
                    found.append(f"{told}: LoRAs count in the prompt alone")
            if is_marked(reading):
                found.append(f"{name} has {MARKED.format(model.name)}")
        for name, text in texts_of(model, request).items():
            if (cut := self.left_out(model, text)) is not None:
                shown = repr(cut) if len(cut) <= 100 else f"{cut[:100]!r}…"
                found.append(f"{name} was cut; left out: {shown}")
        return found

    def reader(self, tokenizers: Mapping[str, Any]) -> Reader | Tokenizer:
        """Return what reads most of a text; CLIP's tokenizer, if that is all there is."""
        raise NotImplementedError

    def words(self, model: Model, text: str) -> list[Word]:
        """Return the words of a text that the network's attention is recorded for."""
        reader = self.reader(model.parts)
        return reader.words(text) if isinstance(reader, Reader) else []

    def products(self, model: Model) -> list[nn.Module]:
        """Return the products of attention in which picture and text read each other."""
        net: Any = model.network
        blocks = [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]
        return [block.attn.product for block in blocks]

    def places(self, picture: int, tokens: int, beside: int = 0) -> tuple[slice, slice]:
        """Return where the tokens of picture and text stand among those of `products`.

        picture, beside: how many the picture and its reference pictures have. tokens: how many all
        have together.
        """
        text = tokens - picture - beside
        return slice(text, text + picture), slice(0, text)

    def left_out(self, model: Model, text: str) -> str | None:
        """Return the end of a text that is longer than the model reads, None if it is not."""
        reader = self.reader(model.parts)
        return reader.cut(text) if isinstance(reader, Reader) else reader.encode(text).cut

    def steps_taken(self, request: Request) -> int:
        # As diffusers' pipelines of these models count, which differs from those of SD.
        assert request.steps is not None
        steps, strength = request.steps, request.strength or 1
        return max(steps - int(max(steps - min(steps * strength, steps), 0)), 1)

    def encode(self, model: Model, request: Request) -> Conditioning:
        return self.conditioning(model, request, lambda key, make: make())

    def encode_text(self, model: Model, text: str) -> Conditioning:
        """Return the conditioning of one text, of one evaluation."""
        raise NotImplementedError

    def conditioning(self, model: Model, request: Request, cached: Cached) -> Conditioning:
        """Return the conditioning of a resolved request.

        The cache has each text by itself, since long text encoders take their time, and both
        together. The scale is in neither.
        """
        texts = [*texts_of(model, request).values()]

        def together() -> Conditioning:
            make = partial(self.encode_text, model)
            return _joined([cached((text,), partial(make, text)) for text in texts])

        return replace(cached(tuple(texts), together), guidance=request.guidance_scale)

    def reads(
        self, refiner: Family | None = None, control: bool = False, ip_adapter: bool = False
    ) -> frozenset[str]:
        return super().reads(refiner, control, ip_adapter) | {"shift"}

    def table(self, model: Model, request: Request, skip: int | None = None) -> Table:
        # Imported here, as it needs NumPy, which a server or a help text does not.
        from safelight.sampling.flow import Course, shifted_by

        assert request.steps is not None
        steps = request.steps
        skip = steps - self.steps_taken(request) if skip is None else skip
        config = self.scheduler(model.scheduler)
        if request.shift is not None:
            config = shifted_by(config, request.shift)
        width, height = model.native_size
        *_, rows, columns = self.latent_shape(
            model, (request.width or width, request.height or height)
        )
        return table(
            request.sampler,
            config,
            steps,
            schedule=request.schedule,
            spacing=request.spacing,
            eta=request.eta,
            skip=skip,
            course=Course(
                (rows // self.patch) * (columns // self.patch), self.trained, self.empirical
            ),
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
            [
                torch.cat([one.expand(n, -1, -1, -1) for one, n in zip(each, counts, strict=True)])
                for each in zip(*(asked.references for asked in conditionings), strict=True)
            ],
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


def qwen_tokenizer(
    folder: Folder, configs: Mapping[str, Any], marks: tuple[str, ...]
) -> TextTokenizer:
    """Return Qwen3's tokenizer. Raises SafelightError unless each of `marks` is one token."""
    from safelight.prompt.text_tokenizer import folder_text_tokenizer

    return folder_text_tokenizer(folder, configs["text_encoder"].vocab_size, "tokenizer", marks)


def t5_states(model: Model, text: str, tokenizer: str, encoder: str, length: int) -> Tensor:
    """Return the states of T5 for a text that is cut or padded, [1, length, width].

    tokenizer, encoder: the names of the parts.
    """
    import torch

    ids = model.parts[tokenizer].encode(text, length, pad=True).ids
    return model.parts[encoder](torch.tensor([ids], device=model.device))


def _joined(read: list[Conditioning]) -> Conditioning:
    """Return the conditioning of several texts, a row for each; shorter ones end in zeros."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if len(read) == 1:
        return read[0]
    tokens = [one.tokens[0] for one in read if one.tokens is not None]
    pooled = [one.pooled for one in read if one.pooled is not None]
    lengths = [length for one in read for length in one.lengths or ()]
    return Conditioning(
        pad_sequence(tokens, batch_first=True),
        torch.cat(pooled) if pooled else None,
        lengths=tuple(lengths) or None,
    )
