"""FLUX.2's weights in few bits, and its autoencoder on its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.engine import preview
from safelight.families import flux2
from safelight.families.flow_files import Published
from safelight.weights import load_model
from safelight.weights.convert import convert
from safelight.weights.kinds import kind_of
from tests.parity.flow_models import ASKED, DEV, VAE_16, configs, make_klein
from tests.parity.test_quantised import as_codes, float8_file, gguf_file, per_row
from tests.weights_tiny import refused

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_klein(tmp_path_factory.mktemp("few") / "klein", distilled=True)


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(configs(folder), {**DEV, "shift": 3.0})
    small = tuple(
        replace(flux2.VARIANTS[i], layers=2, singles=3, published=published) for i in (0, 2)
    )
    monkeypatch.setattr(flux2, "VARIANTS", small)


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> State:
    convert(str(folder), tmp_path / "whole.safetensors")
    return load_file(tmp_path / "whole.safetensors")


def drawn(path: Path, **given: Any) -> tuple[Any, bytes]:
    model = load_model(str(path), device="cpu", dtype="float32", **given)
    return model, model.generate("a red apple", **ASKED).images[0].tobytes()


# --- weights in few bits -------------------------------------------------------------------------


def test_gguf(folder: Path, whole: State, tmp_path: Path) -> None:
    """As people quantise the transformer: codes draw what their numbers draw."""
    path = gguf_file(whole, tmp_path / "klein.gguf")
    numbers = path.with_suffix(".decoded.safetensors")
    model, picture = drawn(path, parts=folder)
    assert picture == drawn(numbers, parts=folder)[1]
    assert model.family.name == "flux2-klein-4b"
    short, picture = drawn(path, parts=folder, low_memory=True)
    assert "transformer.transformer_blocks.0.ff.linear_in" in as_codes(short)
    assert picture == drawn(numbers, parts=folder, low_memory=True)[1]


def test_float8(folder: Path, whole: State, tmp_path: Path) -> None:
    """With scales, as the authors and ComfyUI write it."""
    path = float8_file(whole, tmp_path / "klein.safetensors", per_row)
    numbers = path.with_suffix(".decoded.safetensors")
    assert drawn(path, parts=folder)[1] == drawn(numbers, parts=folder)[1]


# --- its autoencoder -----------------------------------------------------------------------------


def other_vae(path: Path, **config: Any) -> Path:
    """Write another autoencoder than that of the folder."""
    make_klein(path, distilled=True, batch_norm_eps=0.02, **config)
    return path / "vae"


def test_an_autoencoder_in_each_layout(folder: Path, tmp_path: Path) -> None:
    vae = other_vae(tmp_path / "other")
    own = drawn(folder)[1]
    wanted = drawn(folder, vae=vae)[1]
    assert own != wanted
    # A file has no config: it is read with that of the model's own autoencoder.
    config = vae / "config.json"
    config.write_text(config.read_text().replace("0.02", "0.0001"))
    wanted = drawn(folder, vae=vae)[1]
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    assert kind_of(weights) == "vae"
    convert(str(vae.parent), tmp_path / "whole.safetensors")
    original = {
        key.removeprefix("vae."): tensor
        for key, tensor in load_file(tmp_path / "whole.safetensors").items()
        if key.startswith("vae.")
    }
    assert "encoder.quant_conv.weight" in original
    for prefix in ("", "vae."):
        for state in (weights, original):
            named = {prefix + key: tensor.contiguous() for key, tensor in state.items()}
            save_file(named, file := tmp_path / "vae.safetensors")
            assert drawn(folder, vae=file)[1] == wanted


def test_a_smaller_decoder(folder: Path, tmp_path: Path) -> None:
    vae = other_vae(tmp_path / "other", decoder_block_out_channels=(4, 8, 8, 12))
    assert drawn(folder, vae=vae)[1] != drawn(folder)[1]


def test_autoencoders_of_other_families_are_refused(folder: Path, tmp_path: Path) -> None:
    given: Any = {"device": "cpu", "dtype": "float32"}
    diffusers.AutoencoderKL(**VAE_16).save_pretrained(tmp_path / "flux")
    refused(lambda: load_model(folder, vae=tmp_path / "flux", **given), "8 pixels a latent", "16")
    state = load_file(tmp_path / "flux/diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "flux.safetensors")
    refused(lambda: load_model(folder, vae=tmp_path / "flux.safetensors", **given), "channels")
    mine = folder / "vae"
    refused(lambda: load_model("embedded", vae=mine, **given), "an autoencoder of 16 channels")


def test_previews_are_decoded_smaller(folder: Path) -> None:
    """No table of colours is known for these latents."""
    model = drawn(folder)[0]
    assert model.family.latent_rgb is None
    latents = torch.randn(1, model.vae.config.channels, 48, 32)
    assert preview.preview(model, latents).size == (11 * 16, 16 * 16)
