"""Qwen-Image: a transformer of two streams that reads a chat model's states (arXiv:2508.02324).

The language model of Qwen2.5-VL reads the prompt as a user's message, below a system's message that
asks for a description. Its last states are what the transformer reads, without those of the
system's message.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.families.flow import QWEN_TOKENIZERS, FlowFamily, Reader, Rows, qwen_tokenizer
from safelight.families.flow_calls import by_length
from safelight.families.flow_files import Layout, Published
from safelight.families.part import Part
from safelight.families.qwenimage_files import (
    NOT_READ,
    QWEN_IMAGE,
    QWEN_IMAGE_LAYOUT,
    other_kind,
)
from safelight.weights.check import refusal
from safelight.weights.names_qwen import (
    qwen2_folder_name,
    qwen_vae_folder_name,
    qwen_vae_shape,
)

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.weights.check import Header
    from safelight.weights.folder import Folder

_BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
"""What the model was trained with around a prompt."""

DROPPED = 34
"""The tokens of `_BEFORE`, whose states are not read."""

LONGEST = DROPPED + 512
"""The most tokens of a prompt, those of the chat around it included."""

_MARKS = ("<|im_start|>", "<|im_end|>")
"""What must be one token each."""

_DEFAULTS = MappingProxyType({"sampler": "euler", "steps": 50, "guidance_scale": 4.0})
"""The settings of the published model."""

QWEN_VAE_PART = Part(
    "safelight.nets.vae_qwen",
    "AutoencoderKLQwenImage",
    "QwenVAEConfig",
    rename=qwen_vae_folder_name,
    reshape=qwen_vae_shape,
    whole=False,
)


@dataclass(frozen=True, eq=False)
class QwenImage(FlowFamily):
    """Qwen-Image, with parts of the published sizes or of others."""

    name: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: _DEFAULTS)
    published: Published | None = None

    title: ClassVar[str] = "Qwen-Image"
    pipelines: ClassVar[tuple[str, ...]] = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "transformer": Part(
            "safelight.nets.qwenimage", "QwenImageTransformer2DModel", "QwenImageConfig"
        ),
        "vae": QWEN_VAE_PART,
        "text_encoder": Part(
            "safelight.nets.qwen2",
            "Qwen2Model",
            "Qwen2Config",
            classes=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
            stem="model",
            rename=qwen2_folder_name,
            whole=False,
        ),
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": QWEN_TOKENIZERS}
    layout: ClassVar[Layout] = QWEN_IMAGE_LAYOUT

    # --- files -------------------------------------------------------------------------------

    def published_variants(self) -> tuple[FlowFamily, ...]:
        return (BASE,)

    def identify(self, header: Header) -> FlowFamily | None:
        prefix = self.layout.prefix(header)
        if prefix is not None and (other := other_kind(header, prefix)) is not None:
            raise refusal(header.name, NOT_READ.format(other))
        return super().identify(header)

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        net, vae = configs["transformer"], configs["vae"]
        latents = vae.latent_channels
        for what, gives, reads in (
            ("text encoder", configs["text_encoder"].hidden_size, net.joint_attention_dim),
            ("vae", self.patch**2 * latents, net.in_channels),
            ("transformer", net.out_channels, latents),
        ):
            if gives != reads:
                raise SafelightError(
                    f"its {what} gives {gives} numbers, and {reads} are read of them"
                )

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        # No config of a folder holds it.
        return QWEN_IMAGE.native, QWEN_IMAGE.native

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        return {} if folder is None else {"tokenizer": qwen_tokenizer(folder, configs, _MARKS)}

    # --- drawing -----------------------------------------------------------------------------

    def reader(self, tokenizers: Mapping[str, Any]) -> Reader:
        return Reader(tokenizers["tokenizer"], LONGEST, _BEFORE, _AFTER, DROPPED)

    def encode_text(self, model: Model, text: str) -> Conditioning:
        import torch

        chat = f"{_BEFORE}{text}{_AFTER}"
        ids = model.parts["tokenizer"].encode(chat, LONGEST, pad=False).ids
        [states] = model.parts["text_encoder"](torch.tensor([ids], device=model.device), [-1])
        states = states[:, DROPPED:].to(model.dtype)
        return Conditioning(states, lengths=(states.shape[1],))

    def velocity(self, model: Model, rows: Rows) -> Tensor:
        return by_length(rows, model.network)

    def rescaled(self, model: Model, output: Tensor, prompt: Tensor) -> Tensor:
        """Return the guided output, each patch rescaled to its norm for the prompt alone.

        As QwenImagePipeline of diffusers does, with `true_cfg_scale`.
        """
        import torch.nn.functional as F

        wanted, found = (
            F.avg_pool2d(one.square().sum(1, keepdim=True), self.patch).sqrt()
            for one in (prompt, output)
        )
        factor = wanted / found.clamp_min(1e-12)
        return output * F.interpolate(factor, scale_factor=self.patch)

    def example(self, model: Model) -> Conditioning:
        import torch

        like = {"device": model.device, "dtype": model.dtype}
        tokens = torch.ones(1, 64, model.network.config.joint_attention_dim, **like)
        return Conditioning(tokens, lengths=(64,))


BASE = QwenImage("qwen-image", published=QWEN_IMAGE)
