"""What requests may name on this server: LoRAs, embeddings, autoencoders and styles.

They are looked up without a model's weights, so that a missing name is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from safelight.adapters.asked import asked_of, found_in
from safelight.adapters.embedding import EmbeddingFile, look_at
from safelight.adapters.embeddings import EmbeddingFinder
from safelight.adapters.keys import (
    called,
    differ,
    family_of_keys,
    family_of_width,
    text_width,
)
from safelight.adapters.reader import PromptReader
from safelight.defaults import defaults_of
from safelight.errors import SafelightError
from safelight.families import Family, family_of_folder
from safelight.families.control import check_networks
from safelight.families.references import check_references
from safelight.hires import check_model
from safelight.prompt.styles import Style, apply_styles, read_styles
from safelight.request import Request
from safelight.request_pictures import each
from safelight.server.served import Served
from safelight.server.settings import WorkerSettings
from safelight.upscaling.loaded import Upscalers
from safelight.weights.check import printable, read_header
from safelight.weights.find import PartsFinder, Source, find, parts_finder
from safelight.weights.folder import Folder
from safelight.weights.library import ENDINGS, Entry, Library, open_library
from safelight.weights.matching import last_part
from safelight.weights.plan import Plan, read_plan

MAX_READERS = 8
"""The number of models whose tokenizers are kept: the ones used last."""


class Names:
    """The files that requests may name, and how prompts are read.

    For use in threads: it reads files on each call, so that new ones are found.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings, self._served = settings, Served(settings)
        self._readers: dict[Path, tuple[float, PromptReader]] = {}

    @cached_property
    def library(self) -> Library | None:
        """The models folder, None if the server has none."""
        return open_library(self._settings.models_dir)

    def styles(self) -> Mapping[str, Style]:
        """Return the styles by name; empty without a file of styles."""
        file = self._settings.styles_file
        return {} if file is None else read_styles(file)

    @property
    def vae(self) -> str | None:
        """The file name of the autoencoder that replaces the model's own; None without one."""
        chosen = self._settings.vae
        return None if chosen is None else PurePath(chosen).name

    @property
    def has_wildcards(self) -> bool:
        """Whether dynamic prompts have a folder of words."""
        return self._settings.wildcards_dir is not None

    def entries(self, kind: str) -> list[Entry]:
        """Return the models folder's files of a kind; see `Library.entries`."""
        return [] if self.library is None else self.library.entries(kind)

    def upscaler(self, name: str, field: str) -> None:
        """Raise SafelightError if there is no upscaler of a name, or nothing to read it with."""
        Upscalers("cpu", self._settings.models_dir, takes_paths=False).check(name, field)

    def embeddings(self, model: str | None = None) -> dict[str, EmbeddingFile | SafelightError]:
        """Return the embeddings of the models folder by name.

        The value is an error for a file that is not an embedding, or does not fit the model. model:
        a name that `Served.find` returns; None for the server's own.
        """
        widths = {key: net.hidden_size for key, net in self._reader(model).encoders.items()}
        found: dict[str, EmbeddingFile | SafelightError] = {}
        for entry in self.entries("embedding"):
            name = last_part(entry.name)
            try:
                one = look_at(entry.path, name)
                one.fitting(widths)
                found[name] = one
            except SafelightError as error:
                found[name] = error
        return found

    def metadata(self, entry: Entry) -> dict[str, str]:
        """Return the metadata in a LoRA's file; empty if it cannot be read."""
        try:
            return read_header(entry.path).metadata
        except SafelightError:
            return {}

    def check(self, request: Request, model: str | None = None) -> None:
        """Raise SafelightError for a request that cannot be drawn, as far as headers tell.

        That is a name that is not there, a LoRA for another kind of model, a setting that the model
        cannot draw, or a prompt that it cannot read. The words that dynamic prompts choose are not
        known yet.
        """
        asked = request
        styled = apply_styles(
            self.styles(), request.styles, request.prompt, request.negative_prompt
        )
        words = ("", "") if request.dynamic_prompts else styled
        # A copy without validation, which would convert the request's pictures again.
        update: dict[str, Any] = dict(zip(("prompt", "negative_prompt"), words, strict=True))
        request = request.model_copy(update=update)
        finder = EmbeddingFinder(self.library)
        for name in request.embeddings:
            finder.located(name)
        loras: list[Entry] = []
        for lora in asked_of(request)[0]:
            if self.library is None:
                raise SafelightError(
                    f"no lora {lora.name[:60]!r}: this server has no models folder (--models-dir)",
                    code="no_model",
                    field="loras",
                )
            loras.append(found_in(self.library, lora))
        try:
            reader = self._reader(model)
        except (SafelightError, OSError):
            return  # it may be back by then; the worker tells if not
        reader.plan.family.check_request(reader.plan, asked)
        adapter = self.ip_adapter(model)
        beside = {"controlnet": len(self.controlnets(model)), "ip_adapter": adapter is not None}
        check_networks(reader.plan.name, asked, beside)
        check_model(reader.plan, asked)
        check_references(reader.plan, asked)
        if asked.hires_scale > 1:
            self.upscaler(asked.hires_upscaler, "hires_upscaler")
        for entry in loras:
            _check_made_for(entry, reader.plan)
        reader.check(request)

    def describe(
        self, request: Request, *, model: str | None = None, negative: bool = False
    ) -> dict[str, Any]:
        """Return how a model reads a request's prompt; see `PromptReader.describe`.

        Steps are the model's own, unless the request names some.
        """
        reader = self._reader(model)
        request = request.with_defaults(defaults_of(reader.plan.family, reader.plan.notes))
        return reader.describe(request, negative=negative)

    def plan(self, model: str | None = None) -> Plan:
        """Return a model's plan, from its headers. Raises SafelightError if it is not here."""
        return self._reader(model).plan

    def without_prompt(self) -> set[str]:
        """Return the names of the models on this machine that draw from noise alone.

        Single files are left out: `family_of_file` only knows models that read a prompt.
        """
        found: set[str] = set()
        for name, source in self._served.sources().items():
            with suppress(OSError, SafelightError):  # drawing with it gives the error
                source = source or self._own()
                if source.path.is_dir():
                    index = Folder(source.path, name).index
                    found |= set() if family_of_folder(index, name).uses_prompt else {name}
        return found

    def refiner(self, model: str | None = None) -> Family | None:
        """Return the family of the refiner, which takes a model's last steps; None without one."""
        settings = self._settings
        if settings.refiner is None or model not in (None, self._served.default):
            return None
        found = find(settings.refiner, models_dir=settings.models_dir, download=False)
        return read_plan(found).family

    def controlnets(self, model: str | None = None) -> list[str]:
        """Return the names of a model's ControlNets; only the server's own model may have some."""
        named = (self._beside(model, one) for one in each(self._settings.controlnet))
        return [name for name in named if name is not None]

    def ip_adapter(self, model: str | None = None) -> str | None:
        """Return the name of a model's IP-Adapter; only the server's own model may have one."""
        return self._beside(model, self._settings.ip_adapter)

    def _beside(self, model: str | None, given: str | None) -> str | None:
        """Return the name of what was given with the server's own model; None for others."""
        if given is None or model not in (None, self._served.default):
            return None
        name = PurePath(given).name
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
        return name.removesuffix(ending)

    def _own(self) -> Source:
        """Return the source of the server's own model."""
        settings = self._settings
        return find(settings.model, models_dir=settings.models_dir, download=False)

    def _parts(self, *, own: bool = True) -> PartsFinder:
        """Return what finds the parts that a model lacks. own: it is the server's own model."""
        settings = self._settings
        given = settings.parts if own else None
        return parts_finder(given, models_dir=settings.models_dir, download=False)

    def _source(self, model: str | None) -> Source | None:
        """Return a model's source; None for the server's own."""
        return None if model in (None, self._served.default) else self._served.source(model)

    def _reader(self, model: str | None) -> PromptReader:
        settings, given = self._settings, self._source(model)
        source = given or self._own()
        index = source.path / "model_index.json"
        written = (index if index.is_file() else source.path).stat().st_mtime
        before = self._readers.pop(source.path, None)
        if before is None or before[0] != written:
            own = given is None
            without = ("vae",) if own and settings.vae is not None else ()
            plan = read_plan(source, without=without, parts=self._parts(own=own))
            before = written, PromptReader(plan, EmbeddingFinder(self.library))
        self._readers[source.path] = before
        for oldest in [*self._readers][:-MAX_READERS]:
            self._readers.pop(oldest, None)
        return before[1]


def _check_made_for(entry: Entry, plan: Plan) -> None:
    """Raise SafelightError for a LoRA of another kind of model, as its keys tell.

    The worker reads the whole file, and reports whatever else does not fit.
    """
    try:
        header = read_header(entry.path)
    except SafelightError:
        return
    shapes = {key: one.shape for key, one in header.tensors.items()}
    config = plan.configs[plan.family.network]
    name, made_for = called(plan.family, config), family_of_keys(shapes)
    mine, width = getattr(config, "cross_attention_dim", None), text_width(shapes)
    if made_for is None and width not in (None, mine):
        made_for = family_of_width(width)
        if made_for is None and isinstance(mine, int):
            made_for = f"text states of {width} numbers"
    if made_for is not None and differ(made_for, name):
        raise SafelightError(
            f"lora {printable(entry.name, 60)}: it is for {made_for}, and this model is {name}",
            field="loras",
        )
