"""The models in a worker's memory: loaded on demand within a bound, least recently used dropped."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from safelight.engine import Engine
from safelight.engine.capacity import Capacity, free_memory, out_of_memory
from safelight.errors import SafelightError
from safelight.fast import memory
from safelight.machine import device_memory, pick_device
from safelight.request_pictures import each
from safelight.server.jobs import ModelInfo
from safelight.server.pulse import Pulse
from safelight.server.served import Served
from safelight.server.settings import BESIDE, WorkerSettings
from safelight.weights.estimate import Estimate, estimate
from safelight.weights.find import (
    find,
    find_controlnet,
    find_image_encoder,
    find_ip_adapter,
    find_vae,
    parts_finder,
)
from safelight.weights.load import load_model
from safelight.weights.plan import read_plan

if TYPE_CHECKING:
    from safelight.model import Model

SHARE = 0.75
"""The share of the machine's memory, or of a GPU's, for models if no bound is given."""

PATIENCE = 4
"""A job whose model must be loaded waits longer than others, by this many times the loading time:
so loading takes at most about a fifth of the time.
"""

SHORTEST, LONGEST = 2.0, 120.0
"""The least and the most seconds of that wait."""

LISTED = 5.0
"""Seconds for which the list of the models folder is kept: each claim asks for it."""


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    needs: its estimated memory. used: time of its last step. step_seconds: seconds of all its
    steps, by which models share the time. was_idle: whether it had no steps to take at the last
    turn. precise: the same model in float32, if a picture needed it.
    """

    name: str
    model: Model
    engine: Engine
    needs: Estimate
    used: float = field(default_factory=time.monotonic)
    step_seconds: float = 0.0
    was_idle: bool = True
    precise: Model | None = None

    @property
    def weights(self) -> int:
        """Bytes of its weights, with those of its LoRAs and of a second copy in float32, if any."""
        own = self.needs.weights + self.model.adapters.size
        if self.precise is not None:
            copy = replace(self.needs, weights=self.needs.weights * 4 // self.model.dtype.itemsize)
            own += _as_loaded(copy, self.precise).weights
        return own


@dataclass(frozen=True)
class Loading:
    """A model that is being loaded. began: when its loading began."""

    name: str
    needs: Estimate
    began: float
    future: Future[Model]


class LoadedModels:
    """Loads one model at a time, while models that are loaded go on with their steps.

    on_change(kind, name, info): called when a model was "loaded", with its facts, or "dropped".
    """

    def __init__(
        self,
        settings: WorkerSettings,
        pulse: Pulse,
        on_change: Callable[[str, str, dict[str, Any] | None], None],
    ) -> None:
        self._settings, self._pulse, self._on_change = settings, pulse, on_change
        self.served = Served(settings)
        self.default = self.served.default
        self._loaded: dict[str, Loaded] = {}
        self._estimates: dict[str, Estimate] = {}
        self._capacities: dict[str, Capacity] = {}
        self._seconds = 0.0
        self._listed: list[str] | None = None
        self._listed_at = 0.0
        self._loader = ThreadPoolExecutor(1, "load")
        self._loading: Loading | None = None
        self.memory = device_memory(pick_device(settings.device))
        self.bound = settings.model_memory or ((self.memory or 0) << 20) * SHARE or math.inf

    @property
    def names(self) -> list[str]:
        """The names of the models in memory."""
        return list(self._loaded)

    @property
    def loadable(self) -> list[str] | None:
        """The models that this worker can load, if other workers may have more; None for all."""
        if not self._settings.elsewhere:
            return None
        if self._listed is None or time.monotonic() - self._listed_at > LISTED:
            self._listed, self._listed_at = list(self.served.sources()), time.monotonic()
        return self._listed

    @property
    def loading(self) -> str | None:
        """The model that is being loaded; None if none is."""
        return None if self._loading is None else self._loading.name

    @property
    def busy(self) -> list[Loaded]:
        """The models with unfinished pictures."""
        return [loaded for loaded in self._loaded.values() if loaded.engine.busy]

    @property
    def latest(self) -> Loaded | None:
        """The model that drew last; None if no model is in memory."""
        return max(self._loaded.values(), key=lambda loaded: loaded.used, default=None)

    @property
    def rows_a_second(self) -> float:
        """Rows of the network a second, of the model that drew last."""
        return 0.0 if self.latest is None else self.latest.engine.rows_a_second

    @property
    def patience(self) -> float:
        """Seconds that a job waits longer if its model is not in memory; see PATIENCE."""
        return min(max(PATIENCE * self._seconds, SHORTEST), LONGEST)

    def get(self, name: str) -> Loaded | None:
        """Return a model that is in memory; None for others."""
        return self._loaded.get(name)

    def load_first(self) -> ModelInfo:
        """Load the default model at once. Raises SafelightError if it cannot draw."""
        name = self.default
        began = time.monotonic()
        needs = None
        if self._settings.model_memory is not None:
            self._download()
            needs = self._needs(name)  # before it takes the memory
        model = self._load(name)
        return self._take(name, model, needs or self._needs(name), time.monotonic() - began)

    def room_for(self, name: str, in_use: Collection[str]) -> bool:
        """Return whether a model is in memory, or fits beside those in use or about to be."""
        if name in self._loaded or name == self.loading:
            return True
        try:
            if name not in self._estimates:  # headers are not read at each step
                self._estimates[name] = self._needs(name)
        except SafelightError:
            return True  # loading it will raise this error
        return self._fits(self._estimates[name], [other for other in in_use if other != name])

    def begin(self, name: str, in_use: Collection[str]) -> None:
        """Begin to load a model in a thread; drop others if needed, least recently used first.

        Raises SafelightError if the headers already show that it cannot be loaded.
        """
        needs = self._estimates[name] = self._needs(name)  # the file may have changed
        idle = sorted(
            (loaded for loaded in self._loaded.values() if loaded.name not in in_use),
            key=lambda loaded: loaded.used,
        )
        while idle and not self._fits(needs, self._loaded):
            self.drop(idle.pop(0).name)
        future = self._loader.submit(self._load, name)
        self._loading = Loading(name, needs, time.monotonic(), future)

    def arrived(self) -> tuple[str, SafelightError | None] | None:
        """Return the name of a model whose loading has just ended, and its error or None.

        None while no loading has ended.
        """
        coming = self._loading
        if coming is None or not coming.future.done():
            return None
        self._loading = None
        name, error = coming.name, coming.future.exception()
        if error is None:
            seconds = time.monotonic() - coming.began
            info = self._take(name, coming.future.result(), coming.needs, seconds)
            self._on_change("loaded", name, info.model_dump())
            return name, None
        if isinstance(error, SafelightError):
            return name, error
        if not out_of_memory(error):
            raise error
        free_memory(pick_device(self._settings.device))
        return name, SafelightError(
            f"out of memory while model {name!r} was loaded", code="out_of_memory"
        )

    def describe(self, name: str) -> ModelInfo:
        """Return a model's facts, by its headers if it is not loaded. Raises SafelightError."""
        loaded = self._loaded.get(name)
        return _info(name, self._needs(name)) if loaded is None else _info_of(name, loaded.model)

    def turn(self) -> Loaded | None:
        """Return the model that takes the next step: busy models share the time equally."""
        able = [loaded for loaded in self._loaded.values() if loaded.engine.tickets]
        at_it = [loaded.step_seconds for loaded in able if not loaded.was_idle]
        for loaded in self._loaded.values():
            if loaded in able and loaded.was_idle and at_it:  # unused time is not saved up
                loaded.step_seconds = max(loaded.step_seconds, min(at_it))
            loaded.was_idle = loaded not in able
        return min(able, key=lambda loaded: loaded.step_seconds, default=None)

    def precise(self, loaded: Loaded) -> Model:
        """Return the same model in float32, loading it on the first call.

        Raises SafelightError, code "weights_changed", if its name leads to other files now.
        """
        if loaded.precise is None:
            with self._pulse.patient():
                precise = self._load(loaded.name, "float32")
            if _digests(precise) != _digests(loaded.model):
                raise SafelightError(
                    f"the files of model {loaded.name!r} were replaced after it was loaded; "
                    "load the model again",
                    code="weights_changed",
                )
            loaded.precise = precise
            self._pulse.watch(loaded.precise)
        return loaded.precise

    def drop(self, name: str) -> None:
        """Let go of a model and its memory."""
        loaded = self._loaded.pop(name)
        device = loaded.model.device
        loaded.engine.close()
        del loaded
        gc.collect()  # networks have reference cycles
        memory.give_back()
        free_memory(device)
        self._on_change("dropped", name, None)

    def close(self) -> None:
        """End without waiting for a model that is being loaded."""
        self._loader.shutdown(wait=False)

    def _take(self, name: str, model: Model, needs: Estimate, seconds: float) -> ModelInfo:
        self._pulse.watch(model)
        settings = self._settings
        rows = 1 if settings.exact else settings.rows
        capacity = self._capacities.setdefault(model.sha256, Capacity(rows))
        engine = Engine(
            model,
            exact=settings.exact,
            rows=capacity,
            background=True,
            working=self._pulse.working,
        )
        self._loaded[name] = Loaded(name, model, engine, _as_loaded(needs, model))
        self._seconds = seconds
        return _info_of(name, model)

    def _load(self, name: str, dtype: str | None = None) -> Model:
        source, settings = self.served.source(name), self._settings
        if source is None:
            return load_model(settings.model, dtype=dtype or settings.dtype, **settings.loading)
        return load_model(source, dtype=dtype or settings.dtype, **settings.loading_others)

    def _download(self) -> None:
        """Download the default model and the networks beside it if they are on the hub."""
        settings = self._settings
        source = find(settings.model, models_dir=settings.models_dir)
        parts = parts_finder(settings.parts, models_dir=settings.models_dir)
        if parts:  # what is lacking is known by the plan, which downloads it
            without = () if settings.vae is None else ("vae",)
            read_plan(source, without=without, parts=parts)
        if settings.vae is not None:
            find_vae(settings.vae, models_dir=settings.models_dir)
        if settings.refiner is not None:
            find(settings.refiner, models_dir=settings.models_dir)
        for controlnet in each(settings.controlnet):
            find_controlnet(controlnet, models_dir=settings.models_dir)
        if settings.ip_adapter is not None:
            find_ip_adapter(settings.ip_adapter, models_dir=settings.models_dir)
        if settings.image_encoder is not None:
            find_image_encoder(settings.image_encoder, models_dir=settings.models_dir)

    def _needs(self, name: str) -> Estimate:
        """Return what a model needs. Raises SafelightError, also if it alone exceeds the bound."""
        settings, source = self._settings, self.served.source(name)
        names = BESIDE if source is None else ()
        own = {name: getattr(settings, name) for name in names if name != "preview_vae"}
        found = estimate(
            settings.model if source is None else source,
            device=settings.device,
            dtype=settings.dtype,
            low_memory=settings.low_memory,
            models_dir=settings.models_dir,
            **own,
        )
        limit = settings.model_memory
        if limit is not None and found.weights + found.work > limit:
            raise SafelightError(
                f"model {name!r} takes {(found.weights + found.work) / 1e9:.1f} GB, and "
                f"--model-memory is {limit / 1e9:.1f} GB",
                code="out_of_memory",
            )
        return found

    def _fits(self, needs: Estimate, beside: Collection[str]) -> bool:
        """Return whether a model fits into the bound beside others; alone it always does."""
        weights, work = needs.weights, needs.work
        for name in beside:
            loaded = self._loaded.get(name)
            known = self._estimates.get(name) if loaded is None else loaded.needs
            if known is not None:
                weights += known.weights if loaded is None else loaded.weights
                work = max(work, known.work)
        return not beside or weights + work <= self.bound


def _digests(model: Model) -> tuple[Any, ...]:
    """Return what says which files a model was loaded from."""
    refiner = model.refiner and model.refiner.sha256
    others = model.other_parts, model.other_vae, refiner, model.control, model.image_prompts
    return model.sha256, *others


def _as_loaded(needs: Estimate, model: Model) -> Estimate:
    """Return what a model needs as it was loaded; weights in few bits may have been decoded."""
    held = [one.weights_held for one in (model, model.refiner) if one is not None]
    known = [weights for weights in held if weights is not None]
    return replace(needs, weights=sum(known)) if len(known) == len(held) else needs


def _info_of(name: str, model: Model) -> ModelInfo:
    width, height = model.native_size
    return ModelInfo(
        name=name,
        sha256=model.sha256,
        kind=model.kind,
        uses_prompt=model.family.uses_prompt,
        family=model.family.name,
        width=width,
        height=height,
        vae=(model.other_vae or {}).get("name"),
        device=str(model.device),
        dtype=model.precision,
        ready=True,
        loaded=True,
    )


def _info(name: str, needs: Estimate) -> ModelInfo:
    width, height = needs.native_size
    return ModelInfo(
        name=name,
        kind=needs.family.kind,
        uses_prompt=needs.family.uses_prompt,
        family=needs.family.name,
        width=width,
        height=height,
        dtype=needs.dtype,
    )
