"""The base of all families of models: their parts, their files, and how they draw.

Importing this does not import PyTorch, so that a server or `safelight models` can ask a family
about its files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.families.conditioning import Cached, Conditioning
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.families.part import Part
from safelight.request_pictures import REFERENCES
from safelight.sampling import Level, SchedulerConfig, Table, clean_estimate, table
from safelight.weights.names import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safelight.families.single import SingleFile
    from safelight.model import Model
    from safelight.nets.config import NetConfig
    from safelight.nets.reuse import Reuse
    from safelight.request import Request
    from safelight.weights.check import Header
    from safelight.weights.folder import Folder
    from safelight.weights.plan import Plan


SHORTCUTS = (
    *("cache_every", "cache_branch", "guidance_start", "guidance_end", "text_end"),
    "linears",
)
"""The settings of the fast mode, besides its level; see `engine.shortcuts`."""


class Family:
    """A kind of model. One file holds one family; an instance is one variant of it.

    name: of the variant, as `safelight inspect` shows it. kind: "text" or "pixels", as in the
    APIs. title: of the family, in messages. uses_prompt: whether a prompt has an effect.
    pipelines: classes in model_index.json. parts: its networks by the names of their folders.
    tokenizers: names of their folders, with the classes that model_index.json may name.
    optional: parts and tokenizers that a model may lack.
    text_parts: the names of tokenizer and text encoder, for each text encoder that reads a prompt.
    flat: a folder may have the files of the one network in its root. network: the part that
    denoises. fixed_size: it draws its native size alone. conditioned_on: the settings of a
    request that `encode` reads. defaults: settings that it draws best with. distilled:
    whether it was taught to draw with these, in few steps. trainable: whether `train` supports it.
    refinable: whether another model of the family can take its last steps. shortcuts: those of the
    fast mode's settings that work with its network. told_by_scheduler: its variants have equal
    shapes and differ in the scheduler, which a single file does not hold. told_by_index: the same,
    and they differ in model_index.json. usual: of these, the first is meant unless a file or folder
    says another, and no warning tells which. half: the precision that
    `dtype` auto takes on a GPU that has it. areas: of the pictures that it draws well in any
    shape, the least and the most, in those of its native size; None: it draws that size best.
    latent_rgb: colours of latents for previews, see `families.colours`; None if they are unknown.
    """

    name: str
    kind: ClassVar[str] = "text"
    title: ClassVar[str]
    uses_prompt: ClassVar[bool] = True
    pipelines: ClassVar[tuple[str, ...]]
    parts: ClassVar[Mapping[str, Part]]
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    optional: ClassVar[tuple[str, ...]] = ()
    text_parts: ClassVar[tuple[tuple[str, str], ...]] = ()
    flat: ClassVar[bool] = False
    network: ClassVar[str] = "unet"
    fixed_size: ClassVar[bool] = False
    conditioned_on: ClassVar[tuple[str, ...]] = ()
    defaults: Mapping[str, Any] = MappingProxyType({})
    distilled: bool = False
    trainable: ClassVar[bool] = True
    refinable: ClassVar[bool] = False
    told_by_scheduler: ClassVar[bool] = False
    told_by_index: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    half: ClassVar[str] = "float16"
    areas: ClassVar[tuple[float, float] | None] = None
    shortcuts: ClassVar[tuple[str, ...]] = ()
    latent_rgb: tuple[tuple[float, ...], ...] | None = None

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            warnings.warn(
                "Model.family is an object now; compare its name", DeprecationWarning, stacklevel=2
            )
            return self.name == other
        return self is other

    __hash__ = object.__hash__

    @property
    def references(self) -> int:
        """The most reference pictures that the network reads."""
        return 0

    @property
    def edits(self) -> bool:
        """Whether it was trained to edit a picture that is given as a reference."""
        return self.references > 0

    @property
    def only_edits(self) -> bool:
        """Whether img2img of AUTOMATIC1111's API gives the picture as a reference, not a start."""
        return False

    def reads(
        self, refiner: Family | None = None, control: bool = False, ip_adapter: bool = False
    ) -> frozenset[str]:
        """Return which of the settings that only some models read this family reads.

        refiner: the family of the model that takes its last steps. control, ip_adapter: whether the
        model has a ControlNet, and an IP-Adapter.
        """
        found = {*self.conditioned_on, *(CONTROL if control else ())}
        found |= {*(IP_ADAPTER if ip_adapter else ())}
        if refiner is not None:
            found |= {*refiner.conditioned_on, "refiner_start"}
        if self.references:
            found.add(REFERENCES)
        if self.shortcuts:
            found |= {"fast", *self.shortcuts}
        return frozenset(found)

    def __deepcopy__(self, memo: Any) -> Family:
        return self  # it holds no state

    # --- files -------------------------------------------------------------------------------

    def owns(self, index: Mapping[str, Any]) -> bool:
        """Return whether a model_index.json belongs to this family."""
        return index.get("_class_name") in self.pipelines

    def lacks(self, index: Mapping[str, Any], part: str) -> bool:
        """Return whether a folder lacks an optional part or tokenizer, by its model_index.json."""
        return part in self.optional and index.get(part) in (None, [None, None])

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> Family:
        """Return the variant of a folder; self by default.

        configs: of its networks. index, scheduler: its model_index.json and its scheduler's config.
        """
        return self

    def named_scheduler(self, name: str, scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the scheduler's config that the name of a single file tells.

        scheduler: what is returned if it tells nothing. See `told_by_scheduler`.
        """
        return scheduler

    def named_index(self, name: str) -> Mapping[str, Any]:
        """Return what the name of a single file tells of model_index.json; see `told_by_index`."""
        return {}

    def dtype_of(self, part: str, config: NetConfig, dtype: torch.dtype) -> torch.dtype:
        """Return the precision that a part computes in, for a model in precision `dtype`."""
        return dtype

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        """Raise SafelightError if the networks do not fit one another."""

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        """Return width and height in pixels of the pictures that a folder was trained on.

        Raises SafelightError if the configs do not say.
        """
        raise NotImplementedError

    def original(self, part: str, config: Mapping[str, Any]) -> Section:
        """Return where the original code has a network's modules; without `names`, as we do.

        config: the network's own.
        """
        return Section(part)

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        """Return the tokenizers by name. folder: None for a single file. names: those that are
        read from it, where a file takes parts from it."""
        return {}

    def identify(self, header: Header) -> Family | None:
        """Return the variant of a single file, by its keys and shapes, or None.

        Raises SafelightError for a file of this family in an unknown variant.
        """
        return None

    def sections(self) -> Mapping[str, Section]:
        """Return which keys of a single file belong to which network, by their prefixes.

        If a network has several prefixes, `safelight convert` writes the first.
        """
        return {}

    def file_marks(self, scheduler: SchedulerConfig) -> tuple[str, ...]:
        """Return the keys of the empty tensors by which a single file says how it was trained."""
        return ()

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model_index.json of this variant, without its parts."""
        return {"_class_name": self.pipelines[0]}

    def single_file(self, header: Header) -> SingleFile:
        """Return what a single file of this variant holds.

        Raises SafelightError with the keys that belong to no network.
        """
        raise NotImplementedError

    # --- drawing -----------------------------------------------------------------------------

    def check_request(self, model: Model | Plan, request: Request) -> None:
        """Raise SafelightError if a model of the family cannot draw a request.

        model: may be a Plan, read from headers alone, so that a server can refuse at once.
        """

    def warnings(self, model: Model, request: Request) -> list[str]:
        """Return warnings about a resolved request, one line each."""
        return []

    def steps_taken(self, request: Request) -> int:
        """Return the steps of a resolved request, without those that strength leaves out."""
        return request.steps_taken

    def takes_guidance(self, model: Model | Plan) -> bool:
        """Return whether the network was distilled to take the guidance scale as an input.

        Such a network draws with guidance in one evaluation, without a negative prompt.
        """
        return False

    def encode(self, model: Model, request: Request) -> Conditioning:
        """Return the conditioning of a resolved request."""
        return Conditioning()

    def conditioning(self, model: Model, request: Request, cached: Cached) -> Conditioning:
        """Return the conditioning of a resolved request, or what the cache has of it."""
        return cached(self.conditioning_key(request), lambda: self.encode(model, request))

    def conditioning_key(self, request: Request) -> tuple[Any, ...]:
        """Return what `encode` reads of a request: equal keys have the same conditioning."""
        return tuple(getattr(request, name) for name in self.conditioned_on)

    def scheduler(self, config: SchedulerConfig) -> SchedulerConfig:
        """Return the scheduler config for tables, from that of the model."""
        return config

    def table(self, model: Model, request: Request, skip: int | None = None) -> Table:
        """Return the table of a resolved request.

        skip: number of first steps to leave out, as another model takes them, instead of strength.
        """
        assert request.steps is not None
        return table(
            request.sampler,
            self.scheduler(model.scheduler),
            request.steps,
            schedule=request.schedule,
            spacing=request.spacing,
            eta=request.eta,
            strength=1.0 if request.strength is None else request.strength,
            skip=skip,
        )

    def call(
        self,
        model: Model,
        inputs: list[Tensor],
        timesteps: list[float],
        conditionings: list[Conditioning],
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Return the network's outputs, float32 [sum of evaluations, channels, h, w].

        inputs: each picture's state as the network sees it, float32 [1, channels, h, w].
        timesteps, conditionings: of each picture. All have the same `Conditioning.call_key`.
        reuse: what is reused from earlier calls, if the family has `shortcuts`. The outputs of a
        picture are adjacent, in the order of its conditioning.
        """
        raise NotImplementedError

    def rescaled(self, model: Model, output: Tensor, prompt: Tensor) -> Tensor:
        """Return the guided output as the sampler takes it; families may rescale it.

        output: after the formula of guidance. prompt: for the prompt alone. Both are [1, channels,
        h, w].
        """
        return output

    def clean(self, model: Model, state: Tensor, level: Level, output: Tensor) -> Tensor:
        """Return the clean estimate that follows from an output, in the state's shape."""
        return clean_estimate(state, level, output, model.scheduler.prediction_type)

    def example(self, model: Model) -> Conditioning:
        """Return some conditioning of one evaluation, to measure the network with."""
        return Conditioning()

    # --- pictures and latents ----------------------------------------------------------------

    def factor(self, model: Model) -> int:
        """Return how many pixels wide a latent is."""
        return 1

    def latent_shape(self, model: Model, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the shape of the state for a width and height in pixels.

        If a side is not a multiple of `factor`, the latents cover more than the picture.
        """
        width, height = (-(-side // self.factor(model)) for side in size)
        return 1, model.network.config.out_channels, height, width

    def reads_mask(self, model: Model | Plan) -> bool:
        """Return whether the network reads a mask and the picture around it as extra channels.

        Without a mask it draws as with one that is white everywhere.
        """
        return False

    def encode_picture(self, model: Model, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return the latents of a picture, float32 [1, channels, h, w].

        pixels: [1, 3, H, W] from −1 to 1. noise: of the latents' shape, to sample them with.
        """
        return pixels

    def reference_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height at which a reference picture of a size is read."""
        return self.reference_sizes(size)[1]

    def reference_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size that a reference picture is resized to, and that of its middle to read.

        Both are for a family with `references`.
        """
        raise NotImplementedError

    def reference_problem(self, size: tuple[int, int]) -> str:
        """Return why a reference picture of a size cannot be read, and what can; "" if it can."""
        return ""

    def decode_latents(self, model: Model, latents: Tensor) -> Tensor:
        """Return the pixels of clean latents, float32 [1, 3, H, W] from −1 to 1."""
        return latents
