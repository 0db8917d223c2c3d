"""Where each weight of FLUX.2's autoencoder lies in a single file and in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelight.weights.names import vae_folder_name, vae_names

STATISTICS = "bn.running_mean"
"""A weight that no other autoencoder has."""

_COUNT = "bn.num_batches_tracked"
"""Only training reads it."""


def flux2_vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of FLUX.2's autoencoder, from the original names to ours.

    There the two convolutions around the latents belong to encoder and decoder, and the statistics
    of latents are a batch norm's. ComfyUI also knows the convolutions without their network.
    """
    own = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    # Of two names for one module, the last is written: that of the authors.
    return {**vae_names(config), "bn": "bn", **own}


def flux2_vae_folder_name(key: str) -> str | None:
    """Return our name of a key in a folder; None for what we do not read."""
    return None if key == _COUNT else vae_folder_name(key)
