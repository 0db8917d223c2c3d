"""The pictures of a request, and everything that was done to make them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from safelight import __version__
from safelight.picture import check_writable, output_paths, save_picture
from safelight.recipe import png_texts


@dataclass
class Result:
    """The pictures of one request, and everything that was done to make them.

    settings: those of `Request.to_dict`, with the defaults of model and sampler filled in.
    seeds: seeds[i] made images[i]. timings: in seconds. paths: where the pictures were saved.
    drawn: what else their last bits depend on, see `safelight.machine`.
    words: with styles or dynamic prompts, the prompt and negative prompt of each seed.
    embeddings: for each seed, name and sha256 of its textual inversions.
    parts: name and sha256 of what the model's single file took parts from, a list if of several.
    vae: name and sha256 of the autoencoder, if it is not the model's own.
    prediction_type: what the network predicts, if that was given when the model was loaded.
    refiner: name and sha256 of the model that took the last steps, if one did.
    controlnet: name and sha256 of the ControlNet that guided the pictures, if one did; a list if
      several did.
    ip_adapter, image_encoder: the same of the IP-Adapter that read a picture as a prompt, and of
      the network that it reads with, if one did.
    upscaler: the same of the network that enlarged the pictures between two passes, if one did.
    loras: for each seed with LoRAs, their name, weights, SHA-256, A1111's hash, and whether it
      stands in the prompt.
    """

    images: list[Image]
    seeds: list[int]
    settings: dict[str, Any]
    model: str
    sha256: str
    device: str
    dtype: str
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    drawn: dict[str, Any] = field(default_factory=dict)
    words: dict[int, tuple[str, ...]] = field(default_factory=dict)
    embeddings: dict[int, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    parts: dict[str, str] | list[dict[str, str]] | None = None
    vae: dict[str, str] | None = None
    prediction_type: str | None = None
    refiner: dict[str, str] | None = None
    controlnet: dict[str, str] | list[dict[str, str]] | None = None
    ip_adapter: dict[str, str] | None = None
    image_encoder: dict[str, str] | None = None
    upscaler: dict[str, str] | None = None
    loras: dict[int, tuple[dict[str, Any], ...]] = field(default_factory=dict)

    def recipe(self, i: int = 0) -> dict[str, Any]:
        """Return everything that makes picture i again, alone. It is written into its PNG.

        With styles or dynamic prompts it has the resulting words, and the original texts as
        `template`.
        """
        seed = self.seeds[i]
        settings, template = {**self.settings, "seed": seed, "count": 1}, {}
        if seed in self.words:
            names = ("prompt", "negative_prompt")
            template = {"template": {name: settings[name] for name in (*names, "styles")}}
            settings |= dict(zip(names, self.words[seed], strict=True))
            settings |= {"dynamic_prompts": False, "styles": []}
        embeddings = list(self.embeddings.get(seed, ()))
        if embeddings:  # by name: a path would tell about this machine
            settings["embeddings"] = [one["name"] for one in embeddings]
        return {
            "safelight": __version__,
            "model": {"name": self.model, "sha256": self.sha256},
            "device": self.device,
            "dtype": self.dtype,
            "drawn": self.drawn,
            "size": list(self.images[i].size),
            "settings": settings,
            "warnings": self.warnings,
            **({} if self.parts is None else {"parts": self.parts}),
            **({} if self.vae is None else {"vae": self.vae}),
            **({} if self.refiner is None else {"refiner": self.refiner}),
            **({} if self.controlnet is None else {"controlnet": self.controlnet}),
            **({} if self.ip_adapter is None else {"ip_adapter": self.ip_adapter}),
            **({} if self.image_encoder is None else {"image_encoder": self.image_encoder}),
            **({} if self.upscaler is None else {"upscaler": self.upscaler}),
            **({} if self.prediction_type is None else {"prediction_type": self.prediction_type}),
            **({"embeddings": embeddings} if embeddings else {}),
            **({"loras": list(self.loras[seed])} if seed in self.loras else {}),
            **template,
        }

    def save(self, out: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every picture that is there with its recipe; return the paths, in order.

        out: a file name or a folder, see `safelight.picture.output_paths`. Raises SafelightError
        if a file exists or cannot be written; pictures written before that stay.
        """
        paths = output_paths(out, self.seeds, overwrite=overwrite)[: len(self.images)]
        for path in paths:
            check_writable(path, overwrite=overwrite)
        for i, path in enumerate(paths):
            self.save_one(i, path, overwrite=overwrite)
        return paths

    def save_one(self, i: int, path: Path, *, overwrite: bool = False) -> None:
        """Write picture i with its recipe; raises as `save` does."""
        save_picture(self.images[i], path, png_texts(self.recipe(i)), overwrite=overwrite)
        self.paths.append(path)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, as JSON has it."""
        return {
            "paths": [str(path) for path in self.paths],
            "seeds": self.seeds,
            "model": {"name": self.model, "sha256": self.sha256},
            "device": self.device,
            "dtype": self.dtype,
            "drawn": self.drawn,
            "settings": self.settings,
            "warnings": self.warnings,
            "timings": self.timings,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)
