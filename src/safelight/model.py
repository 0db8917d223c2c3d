"""A loaded model: its networks, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Unpack

import torch

from safelight.controls import CONTROLNETS
from safelight.defaults import defaults_of
from safelight.errors import SafelightError
from safelight.families import Family
from safelight.sampling import SchedulerConfig

if TYPE_CHECKING:
    from safelight.adapters.asked import Unmatched
    from safelight.adapters.embeddings import Embeddings
    from safelight.adapters.select import Adapters, Selection
    from safelight.engine import Run, Step
    from safelight.keywords import GenerateSettings
    from safelight.prompt.styles import Style
    from safelight.request import Request
    from safelight.result import Result
    from safelight.upscaling.loaded import Upscalers
    from safelight.weights.library import Library
    from safelight.weights.stored import Stored


class Lock:
    """An RLock; a model that is deep-copied or unpickled gets a new one.

    `with` calls the RLock's own methods: Ctrl-C within a Python method could leave it held.
    """

    def __init__(self) -> None:
        self._lock = RLock()

    @property
    def __enter__(self) -> Callable[[], object]:
        return self._lock.__enter__

    @property
    def __exit__(self) -> Callable[..., None]:
        return self._lock.__exit__

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


@dataclass(repr=False)
class Model:
    """A model that is ready to draw, as `safelight.load` returns it.

    name, path: as it was asked for, and where it was found.
    sha256: the digest of a single file, or of the names and digests of all files of a folder.
    family: what it is and how it draws; its name is "sd1", "sd1-inpainting", "sd2",
      "sd2-inpainting", "sdxl", "sdxl-inpainting", "sdxl-refiner", "ssd-1b", "vega", "sd3",
      "sd3.5-medium", "sd3.5-large", "flux-dev", "flux-schnell", "flux2-klein-4b", "flux2-klein-9b",
      "flux2-klein-base-4b", "flux2-klein-base-9b", "z-image", "z-image-turbo" or "pixels"; "custom"
      and names that end in "-custom" are of other shapes.
    parts: its networks and tokenizers by the names of their folders.
    words: those it was trained on, None if it does not say.
    notes: what else stands in the folder's safelight.json.
    native_size: width and height, in pixels, of the pictures it was trained on.
    warnings: what the user should know about how it was loaded.
    wildcards_dir: the folder that `__name__` in a prompt is drawn from, None if there is none.
    styles: named words that a request may put around its prompts.
    library: the models folder that LoRAs and embeddings are found in, None if there is none.
    other_parts: name and sha256 of what a single file took parts from, a list if of several; None
      if it took none.
    other_vae: name and sha256 of the autoencoder that took the place of its own, None if none did.
    prediction_type: what its network predicts, if that was given and not taken from its files.
    refiner: the model that takes the last steps, None if none does.
    control: name and sha256 of its ControlNet, a list if it has several; None if it has none.
    image_prompts: name and sha256 of its "ip_adapter" and of that one's "image_encoder", by these
      names; empty if it has none.
    stored: its weights where they are stored; None if it was not loaded from files.
    weights_held: how many bytes of weights stay in memory on a CPU, as it was loaded; None if
      that is not known.
    takes_paths: whether a LoRA or an embedding may be named by its path; not for requests of
      strangers.
    lora_files, embedding_files: files by the names of LoRAs and embeddings that stand for them.
    base, selection: of an adapted model, the model without LoRAs, and the LoRAs merged into it.
    lock: held while it computes, so that several threads may draw with it; its adapted models
      share it.
    """

    name: str
    path: str
    sha256: str
    family: Family
    parts: dict[str, Any]
    scheduler: SchedulerConfig
    words: frozenset[str] | None
    native_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    wildcards_dir: Path | None = None
    styles: Mapping[str, Style] = field(default_factory=dict)
    library: Library | None = None
    other_parts: dict[str, str] | list[dict[str, str]] | None = None
    other_vae: dict[str, str] | None = None
    prediction_type: str | None = None
    refiner: Model | None = None
    control: dict[str, str] | list[dict[str, str]] | None = None
    image_prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    stored: Stored | None = None
    weights_held: int | None = None
    takes_paths: bool = True
    lora_files: dict[str, Path] = field(default_factory=dict)
    embedding_files: dict[str, Path] = field(default_factory=dict)
    base: Model | None = None
    selection: Selection | None = None
    lock: Lock = field(default_factory=Lock, compare=False)

    def __repr__(self) -> str:
        width, height = self.native_size
        return (
            f"<safelight.Model {self.name}: {self.family}, {width}x{height}, "
            f"{self.precision} on {self.device}>"
        )

    @property
    def kind(self) -> str:
        """ "text" draws what a prompt says, "pixels" from noise alone."""
        return self.family.kind

    @property
    def uses_prompt(self) -> bool:
        """Whether it draws what a prompt says."""
        return self.family.uses_prompt

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that it draws best with, for those that a request leaves out."""
        return defaults_of(self.family, self.notes)

    @property
    def precision(self) -> str:
        """The name of its dtype: "float32", "bfloat16" or "float16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def configs(self) -> dict[str, Any]:
        """The config of each network."""
        return {name: p.config for name, p in self.parts.items() if hasattr(p, "config")}

    @property
    def network(self) -> Any:
        """The network that denoises."""
        return self.parts[self.family.network]

    @property
    def unet(self) -> Any:
        return self.parts.get("unet")

    @property
    def vae(self) -> Any:
        """The autoencoder, None if the model draws pixels."""
        return self.parts.get("vae")

    @property
    def controlnet(self) -> Any:
        """The first of `controlnets`, None if there is none."""
        return self.parts.get("controlnet")

    @property
    def controlnets(self) -> list[Any]:
        """The networks through which a request's pictures guide it, one each, in their order."""
        return [self.parts[use] for use in CONTROLNETS if use in self.parts]

    @property
    def ip_adapter(self) -> Any:
        """The network through which a picture is a prompt of it, None if there is none."""
        return self.parts.get("ip_adapter")

    @property
    def image_encoder(self) -> Any:
        """The network that its IP-Adapter reads pictures with, None if there is none."""
        return self.parts.get("image_encoder")

    @property
    def preview_vae(self) -> Any:
        """The tiny autoencoder that previews are decoded with, None if there is none."""
        return self.parts.get("preview_vae")

    @property
    def text_encoder(self) -> Any:
        """The text encoder, the first of two, None if the model reads no text."""
        return self.parts.get("text_encoder") or self.parts.get("text_encoder_2")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, the first of two, None if the model reads no text."""
        return self.parts.get("tokenizer") or self.parts.get("tokenizer_2")

    @cached_property
    def embeddings(self) -> Embeddings:
        """Finds textual inversions, and keeps models that know them."""
        from safelight.adapters.embeddings import Embeddings

        return Embeddings(self)

    @cached_property
    def adapters(self) -> Adapters:
        """Finds LoRAs and merges them."""
        from safelight.adapters.select import Adapters

        return Adapters(self)

    @cached_property
    def upscalers(self) -> Upscalers:
        """Loads the networks that enlarge its pictures between two passes."""
        from safelight.upscaling.loaded import Upscalers

        root = None if self.library is None else self.library.root
        return Upscalers(self.device, root, takes_paths=self.takes_paths)

    def adapted(self, loras: Sequence[str], *, unmatched: Unmatched = "error") -> Model:
        """Return a model with LoRAs and their kin merged, which shares all else with this one.

        loras: as `Request.loras` has them, added to those that this model has. unmatched: "warn"
        leaves out keys that belong to nothing in the model. The last few adapted models are kept,
        so that the same LoRAs give the same object. This model draws as before.

        Raises SafelightError, one line, for a file that is not found, is damaged or does not fit.
        """
        from safelight.adapters.asked import AskedLora

        base = self.base or self
        asked = [AskedLora.parse(text) for text in loras]
        with self.lock:
            selection = base.adapters.choose(asked, unmatched, after=self.selection)
            return base.adapters.adapted(selection)

    def generate(
        self,
        prompt: Request | str = "",
        *,
        on_step: Callable[[Step], object] | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> Result:
        """Return the pictures of a request, or of a prompt and the settings of a Request.

        on_step is called after every step. Raises SafelightError for settings that the model
        cannot draw with.
        """
        run = self.stream(prompt, **settings)
        for step in run:
            if on_step is not None:
                on_step(step)
        return run.result

    def stream(self, prompt: Request | str = "", **settings: Unpack[GenerateSettings]) -> Run:
        """Return a run that draws as `generate` does, to iterate over step by step:

        run = model.stream("a red apple", seed=7)
        for step in run:
            step.preview().save(f"step-{step.step}.png")
        run.result.save("apple.png")
        """
        from safelight.engine import Run
        from safelight.request import Request

        if isinstance(prompt, Request):
            if settings:
                raise SafelightError("give a Request, or a prompt and settings, not both")
            return Run(self, prompt)
        return Run(self, Request(prompt=prompt, **settings))
