"""Single files of models of flow matching: the same pictures as their folders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safelight.errors import SafelightError
from safelight.families import flux, sd3
from safelight.families.flow_files import Published
from safelight.weights import load_model
from safelight.weights.convert import convert
from tests.parity.flow_models import SCHNELL, SD3_SCHEDULER, make_flux, make_sd3

ASKED = {"steps": 2, "width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    return {
        "sd3": make_sd3(root / "sd3"),
        "bare": make_sd3(root / "bare", t5=False),
        "flux": make_flux(root / "flux", guided=False),
    }


@pytest.fixture(autouse=True)
def tiny(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give variants the shapes of the tiny models."""
    published = Published(configs(folders["sd3"]), SD3_SCHEDULER, 64)
    small = replace(sd3.VARIANTS[0], layers=3, published=published)
    monkeypatch.setattr(sd3, "VARIANTS", (small,))
    [schnell] = [one for one in flux.VARIANTS if not one.guided]
    published = Published(configs(folders["flux"]), SCHNELL, 1024)
    small = replace(schnell, layers=2, singles=2, published=published)
    monkeypatch.setattr(flux, "VARIANTS", (small,))


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/config.json")
    }
    return {
        part: {key: value for key, value in config.items() if value is not None}
        for part, config in found.items()
    }


def drawn(model: Path, **given: Any) -> np.ndarray:
    loaded = load_model(str(model), device="cpu", dtype="float32", **given)
    return np.asarray(loaded.generate("a red apple", **ASKED).images[0]).astype(int)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Weights of a mapped file may lie at other places in memory, which can change last bits."""
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_file_with_parts_of_the_folder(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    file = tmp_path / f"{name}.safetensors"
    convert(str(folders[name]), file)
    assert_same(drawn(file, parts=folders[name]), drawn(folders[name]))


def test_stable_diffusion_3_without_t5_needs_no_parts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "bare.safetensors"
    convert(str(folders["bare"]), file)
    assert_same(drawn(file), drawn(folders["bare"]))
    told = load_model(str(file), device="cpu", dtype="float32").warnings
    assert any("--parts" in said for said in told)


def test_what_a_file_lacks_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    convert(str(folders["flux"]), file)
    with pytest.raises(SafelightError, match=r"no tokenizer_2 in the file; give a folder of FLUX"):
        load_model(str(file), device="cpu")
    with pytest.raises(SafelightError):
        load_model(str(file), device="cpu", parts=folders["sd3"])
