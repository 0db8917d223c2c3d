"""The pictures of a request as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.picture import to_tensor

if TYPE_CHECKING:
    from safelight.model import Model


def covering(model: Model, image: Image.Image) -> Tensor:
    """Return the pixels of all that a picture's latents cover, [1, C, H, W] from −1 to 1.

    Where that is more than the picture, its edge pixels are repeated.
    """
    *_, rows, columns = model.family.latent_shape(model, image.size)
    factor = model.family.factor(model)
    beyond = (0, columns * factor - image.width, 0, rows * factor - image.height)
    return F.pad(to_tensor(image).to(model.device), beyond, mode="replicate")
