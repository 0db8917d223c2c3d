"""Z-Image and Z-Image-Turbo: one transformer over text and picture (arXiv:2511.22699).

The text encoder is a chat model, Qwen3. It reads the prompt as a user's message and answers
nothing: its states before the last layer are what the transformer reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families import colours
from safelight.families.base import Conditioning
from safelight.families.flow import (
    QWEN3_PART,
    QWEN_TOKENIZERS,
    FlowFamily,
    Reader,
    Rows,
    qwen_tokenizer,
)
from safelight.families.flow_calls import by_length
from safelight.families.flow_files import Z_IMAGE, ZIMAGE_LAYOUT, Layout, Published
from safelight.families.latent import VAE_PART
from safelight.families.part import Part
from safelight.weights.names import Section
from safelight.weights.names_zimage import zimage_names, zimage_stacked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from safelight.model import Model
    from safelight.weights.folder import Folder

LONGEST = 512
"""The most tokens of a prompt, those of the chat around it included."""

_SIDE = 1024
"""Width and height of the training pictures; no config of a folder holds it."""

_BEFORE, _AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What Qwen3's chat template puts around a user's message, for an answer that may think first."""

_MARKS = ("<|im_start|>", "<|im_end|>")
"""What must be one token each."""

_TURBO = MappingProxyType({"sampler": "euler", "steps": 8, "guidance_scale": 1.0})
_BASE = MappingProxyType({"sampler": "euler", "steps": 50, "guidance_scale": 5.0})
"""The settings of the published folders. The guidance scale of diffusers' pipeline is 1 less."""

_TURBO_SHIFT = 3.0
"""Turbo and the base have equal shapes. Their schedulers differ: 3 and 6."""


@dataclass(frozen=True, eq=False)
class ZImage(FlowFamily):
    """One variant."""

    name: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: _BASE)
    distilled: bool = False
    latent_rgb: tuple[tuple[float, ...], ...] | None = colours.FLUX
    published: Published | None = Z_IMAGE

    title: ClassVar[str] = "Z-Image"
    pipelines: ClassVar[tuple[str, ...]] = (
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "transformer": Part("safelight.nets.zimage", "ZImageTransformer2DModel", "ZImageConfig"),
        "vae": VAE_PART,
        "text_encoder": QWEN3_PART,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": QWEN_TOKENIZERS}
    layout: ClassVar[Layout] = ZIMAGE_LAYOUT
    told_by_scheduler: ClassVar[bool] = True

    # --- files -------------------------------------------------------------------------------

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> ZImage:
        super().variant(configs, index, scheduler)
        found = TURBO if scheduler.get("shift") == _TURBO_SHIFT else BASE
        # The colours are those of FLUX.1's autoencoder, which the published models have.
        known = configs["vae"].latent_channels == len(colours.FLUX) - 1
        return found if known else replace(found, latent_rgb=None)

    def named_scheduler(self, name: str, scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
        turbo = "turbo" in name.casefold()
        return {**scheduler, "shift": _TURBO_SHIFT} if turbo else scheduler

    def published_variants(self) -> tuple[FlowFamily, ...]:
        return (BASE,)

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        net = configs["transformer"]
        for what, gives, reads in (
            ("text encoder", configs["text_encoder"].hidden_size, net.cap_feat_dim),
            ("vae", configs["vae"].latent_channels, net.in_channels),
        ):
            if gives != reads:
                raise SafelightError(
                    f"its {what} gives {gives} numbers, and its transformer reads {reads}"
                )

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        return _SIDE, _SIDE

    def original(self, part: str, config: Mapping[str, Any]) -> Section:
        if part == self.network:
            return Section(part, zimage_names(config), stacked=zimage_stacked(config))
        return super().original(part, config)

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        return {} if folder is None else {"tokenizer": qwen_tokenizer(folder, configs, _MARKS)}

    # --- drawing -----------------------------------------------------------------------------

    def reader(self, tokenizers: Mapping[str, Any]) -> Reader:
        return Reader(tokenizers["tokenizer"], LONGEST, _BEFORE, _AFTER)

    def encode_text(self, model: Model, text: str) -> Conditioning:
        import torch

        chat = f"{_BEFORE}{text}{_AFTER}"
        ids = model.parts["tokenizer"].encode(chat, LONGEST, pad=False).ids
        [states] = model.parts["text_encoder"](torch.tensor([ids], device=model.device), [-2])
        return Conditioning(states.to(model.dtype), lengths=(len(ids),))

    def products(self, model: Model) -> list[nn.Module]:
        net: Any = model.network
        return [block.attention.product for block in net.layers]

    def places(self, picture: int, tokens: int, beside: int = 0) -> tuple[slice, slice]:
        from safelight.nets.zimage import MULTIPLE

        filled = -(-picture // MULTIPLE) * MULTIPLE
        return slice(0, picture), slice(filled, tokens)

    def velocity(self, model: Model, rows: Rows) -> Tensor:
        # The network was trained with the time of the picture, from 0 to 1, and predicts
        # clean − noise.
        return by_length(
            rows, lambda x, timestep, text: -model.network(x, (1000 - timestep) / 1000, text)
        )

    def example(self, model: Model) -> Conditioning:
        import torch

        like = {"device": model.device, "dtype": model.dtype}
        tokens = torch.ones(1, 64, model.network.config.cap_feat_dim, **like)
        return Conditioning(tokens, lengths=(64,))


BASE = ZImage("z-image")
TURBO = ZImage("z-image-turbo", _TURBO, distilled=True)
