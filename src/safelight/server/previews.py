"""Previews of unfinished pictures."""

from __future__ import annotations

import base64
import io
from typing import Any


def encoded_preview(model: Any, latents: Any, size: tuple[int, int] | None) -> str:
    """Return the picture of latents as a PNG in base64; see `engine.preview.preview`."""
    from safelight.engine.preview import preview

    out = io.BytesIO()
    preview(model, latents, size).save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()
