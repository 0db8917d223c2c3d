"""A loaded model: its networks, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

import torch

from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet import UNet2DConditionModel
from safelight.nets.unet2d import UNet2DModel
from safelight.nets.vae import AutoencoderKL
from safelight.sampling.schedule import SchedulerConfig
from safelight.weights.tokenizer import Tokenizer

if TYPE_CHECKING:
    from safelight.engine import Run, Step
    from safelight.request import GenerateSettings, Request
    from safelight.result import Result


@dataclass
class Model:
    """A model that is ready to draw, as `safelight.weights.load.load_model` returns it.

    name, path: as it was asked for, and where it was found.
    sha256: of a single file, its own; of a folder, of the names and digests of all its files.
    kind: "text" draws what a prompt says, and has tokenizer, text_encoder and vae; "pixels" has
      a UNet2DModel alone.
    family: "sd1", "sd1-inpainting", "sd2", "sd2-inpainting", "custom" or "pixels".
    words: those the model was taught, None if it does not say.
    notes: what else stands in the folder's safelight.json.
    native_size: width and height, in pixels, of the pictures it was trained on.
    warnings: what the user should know about how it was loaded.
    """

    name: str
    path: str
    sha256: str
    kind: str
    family: str
    tokenizer: Tokenizer | None
    text_encoder: CLIPTextModel | None
    unet: UNet2DConditionModel | UNet2DModel
    vae: AutoencoderKL | None
    scheduler: SchedulerConfig
    words: frozenset[str] | None
    native_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def generate(
        self,
        prompt: Request | str = "",
        *,
        on_step: Callable[[Step], object] | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> Result:
        """The pictures of a request, or of a prompt and the settings that a Request takes.

        on_step is called after every step. Raises SafelightError for settings that cannot be.
        """
        run = self.stream(prompt, **settings)
        for step in run:
            if on_step is not None:
                on_step(step)
        return run.result

    def stream(self, prompt: Request | str = "", **settings: Unpack[GenerateSettings]) -> Run:
        """As `generate`, to iterate over:

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
