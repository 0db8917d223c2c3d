"""Small pictures of a job in the making."""

from __future__ import annotations

import base64
import io
from typing import Any

PREVIEW_LATENTS = 24
"""Longest side of the latents that a preview is decoded from: larger ones are averaged down."""


def encoded_preview(model: Any, latents: Any) -> str:
    """Return the picture of latents as a PNG in base64."""
    out = io.BytesIO()
    preview(model, latents).save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()


def preview(model: Any, latents: Any) -> Any:
    """Return latents as a small picture; large ones are averaged down first."""
    import torch
    import torch.nn.functional as F

    from safelight.engine.job import decode

    with torch.inference_mode():
        largest = max(latents.shape[-2:])
        if model.vae is not None and largest > PREVIEW_LATENTS:
            latents = F.avg_pool2d(latents, -(-largest // PREVIEW_LATENTS), ceil_mode=True)
        return decode(model, latents)
