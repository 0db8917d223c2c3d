"""Check that a dropped model gives its memory back. `make soak` runs it.

    python tests/soak/eviction.py [--rounds 12] [--width 160] [--size 256] [--dtype auto]

A server has room for one of three models: the one that ships, and two of Stable Diffusion's shape
with random weights. They draw by turns; the worker's memory (RssAnon) is read after each picture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))

import diffusers
import torch
import transformers
from serving import Serving

from safelight.weights.estimate import estimate
from safelight.weights.find import MODELS

SMALL, LARGE = "embedded", ("one", "other")
NEEDED = 0.95
"""The share of a model's memory that must come back."""


def make(folder: Path, width: int) -> None:
    """Write a model of Stable Diffusion 1's shape. width: channels of its outermost level."""
    torch.manual_seed(0)
    small = MODELS / SMALL
    text = transformers.CLIPTextConfig(
        **json.loads((small / "text_encoder" / "config.json").read_text())
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=text.hidden_size,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=256,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(text)}
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    index = json.loads((small / "model_index.json").read_text())
    for name in ("unet", "vae"):
        index[name] = ["diffusers", type(parts[name]).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir()
        for file in (small / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())


def memory(server: Serving) -> float:
    """Return the worker's memory in MB, without pages of files, which the kernel can take back."""
    status = Path(f"/proc/{server.worker()}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def after(server: Serving, model: str, size: int) -> float:
    """Return the worker's memory in MB after a picture of a model that is then alone in memory."""
    asked: dict[str, Any] = {"prompt": "a cat", "steps": 2, "sampler": "euler", "seed": 1}
    asked |= {"width": size, "height": size} if model != SMALL else {}
    job = server.finished(server.submit(**asked, model=model), seconds=600)
    assert job["status"] == "succeeded", job["error"]
    there = [one["name"] for one in server.client.get("/api/models").json() if one["loaded"]]
    assert there == [model], there
    return memory(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        models = root / "models"
        make(models / LARGE[0], given.width)
        for path in [*(models / LARGE[0]).rglob("*")]:
            if path.is_file():
                link = models / LARGE[1] / path.relative_to(models / LARGE[0])
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
        needs = estimate(models / LARGE[0], device="cpu", dtype=given.dtype)
        bound = needs.weights + needs.work + 10**6  # the small one has no room beside it
        arguments = ("--models-dir", str(models), "--model-memory", str(bound))
        with Serving(root, "--dtype", given.dtype, *arguments) as server:
            server.ready()
            alone = [after(server, SMALL, given.size)]
            with_large = []
            for i in range(given.rounds):
                with_large.append(after(server, LARGE[i % 2], given.size))
                alone.append(after(server, SMALL, given.size))
    taken = min(with_large[1:]) - alone[1]
    kept = max(alone[2:]) - alone[1]
    sys.stdout.write(
        f"{given.rounds} rounds, {needs.dtype}, weights of {needs.weights / 1e6:.0f} MB and "
        f"{needs.work / 1e6:.0f} MB to work: with the small model alone {alone[0]:.0f} MB at "
        f"first, {alone[1]:.0f} MB after the first round, then {min(alone[2:]):.0f} to "
        f"{max(alone[2:]):.0f} MB; with a large one {min(with_large):.0f} to "
        f"{max(with_large):.0f} MB. {1 - max(kept, 0) / taken:.0%} comes back.\n"
    )
    assert kept < (1 - NEEDED) * taken, (alone, with_large)


if __name__ == "__main__":
    main()
