"""Find a request's LoRAs, match them to the model and merge them; the last few sets are kept."""

from __future__ import annotations

import gc
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from safelight.adapters.asked import AskedLora, Unmatched, found_in
from safelight.adapters.file import (
    AdapterFile,
    Match,
    Shapes,
    match,
    open_adapter,
    refusal,
    told_repeated,
    told_unmatched,
    unmatched_error,
)
from safelight.adapters.keys import called
from safelight.adapters.merge import Chosen, merged
from safelight.adapters.names import Target, layers_of, table
from safelight.adapters.places import config_of, file_in, on_hub
from safelight.errors import SafelightError, StorageError
from safelight.fast import memory
from safelight.fast.replace import keeps_in_file
from safelight.weights.cache import stamp_of
from safelight.weights.check import printable
from safelight.weights.digest import tensors_digest
from safelight.weights.find import hub_file
from safelight.weights.library import IN_FOLDER

if TYPE_CHECKING:
    from safelight.model import Model

MAX_SETS = 4
"""Adapted models that are kept, and that may be drawn with at once."""

MEMORY_SHARE = 0.25
"""The share of the machine's memory that they may take together."""

MAX_FILES = 16
"""Files that are kept open."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The LoRAs of one picture.

    asked: all of them. chosen: those that change something. key: equal for those that make the
    same model. size: bytes of new weights that are kept in memory, not in a file. records: all, as
    a recipe has them. warnings: about keys that were left out.
    """

    asked: tuple[AskedLora, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    key: tuple[Any, ...] = ()
    size: int = 0
    records: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


class Adapters:
    """The adapted models of one base model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._table: dict[str, Target] | None = None
        self._shapes: Shapes = {}
        self._files: OrderedDict[Any, tuple[AdapterFile, Match]] = OrderedDict()
        self._kept: OrderedDict[Any, tuple[Model, int]] = OrderedDict()
        self._alive: WeakValueDictionary[Any, Model] = WeakValueDictionary()

    def choose(
        self,
        asked: Sequence[AskedLora],
        unmatched: Unmatched = "error",
        after: Selection | None = None,
    ) -> Selection:
        """Return the LoRAs that are asked for, after a check that they fit; reads no weight.

        after: a selection that they are added to. Raises SafelightError for one that is not found
        or does not fit, and for keys that belong to nothing if `unmatched` is "error".
        """
        before = after or Selection()
        names, chosen = list(before.asked), list(before.chosen)
        records, warnings = list(before.records), list(before.warnings)
        network = self._model.family.network
        for one in asked:
            path, name = self._locate(one)
            file, found = self._matched(path)
            if not file.header.tensors:
                raise refusal(file.name, "it holds nothing; a LoRA has tensors")
            if found.unmatched and (unmatched == "error" or not found.changes):
                raise unmatched_error(file, found, self._family)
            if found.idle and not found.changes:
                raise refusal(file.name, "its keys do nothing in any program")
            if not found.changes:
                raise refusal(file.name, "it holds embeddings alone; a LoRA changes weights")
            if found.unmatched:
                warnings.append(f"lora {file.name}: {told_unmatched(file, found)}")
            if found.repeated:
                warnings.append(f"lora {file.name}: {told_repeated(file, found)}")
            mine = Chosen(replace(one, name=name), file, found.changes)
            names.append(mine.asked)
            records.append(_record(mine))
            if any(mine.strength(change.part, network) for change in mine.changes):
                chosen.append(mine)
        return Selection(
            tuple(names),
            tuple(chosen),
            tuple(_key(c) for c in chosen),
            self._size(chosen),
            tuple(records),
            tuple(dict.fromkeys(warnings)),
        )

    def adapted(self, selection: Selection) -> Model:
        """Return the model with a selection merged; the base model itself if it changes nothing.

        Raises SafelightError for a file that cannot be read, numbers that are not finite, and too
        little memory.
        """
        if not selection.key:
            return self._model
        model = self._alive.get(selection.key)
        if model is None:
            self._make_room(selection.size)
            self._check_memory(selection)
            model = replace(self._merged(selection), base=self._model, selection=selection)
            self._alive[selection.key] = model
        self._kept[selection.key] = model, selection.size
        self._kept.move_to_end(selection.key)
        self._make_room(0)
        return model

    def _merged(self, selection: Selection) -> Model:
        """Return the model with a selection merged.

        Models that were used longest ago are forgotten if there is no room on the disk.
        """
        while True:
            try:
                return merged(self._model, selection.chosen)
            except StorageError:
                if not self._kept:
                    raise
                self._kept.popitem(last=False)
                gc.collect()  # layers and what they packed refer to each other

    @property
    def size(self) -> int:
        """Bytes of the weights that the adapted models have of their own."""
        return sum(size for _, size in self._kept.values())

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether models with these numbers of changed bytes may be held at once."""
        return len(sizes) <= 1 or (len(sizes) <= MAX_SETS and sum(sizes) <= self._budget)

    def _make_room(self, size: int) -> None:
        """Forget the models that were used longest ago, until one of `size` bytes fits."""
        more = [size] if size else []
        while self._kept and not self.fits([*(s for _, s in self._kept.values()), *more]):
            self._kept.popitem(last=False)

    def _check_memory(self, selection: Selection) -> None:
        """Raise SafelightError if the new weights do not fit into free memory.

        Models that were used longest ago are forgotten first.
        """
        if self._model.device.type != "cpu":
            return
        while self._kept and selection.size > (memory.free() or math.inf):
            self._kept.popitem(last=False)
            gc.collect()
            memory.give_back()
        free = memory.free()
        if free and selection.size > free:
            loras = ", ".join(printable(one.asked.name, 40) for one in selection.chosen[:2])
            more = " …" if len(selection.chosen) > 2 else ""
            low = self._size(selection.chosen, low_memory=True) < selection.size
            way = "low_memory keeps them in a file" if low else "close other programs"
            raise SafelightError(
                f"lora {loras}{more}: {selection.size / 1e9:.1f} GB of changed weights do not fit "
                f"beside the model, and {free / 1e9:.1f} GB are free: {way}",
                field="loras",
            )

    @property
    def _budget(self) -> float:
        device = self._model.device
        if device.type == "cuda":
            there = torch.cuda.get_device_properties(device).total_memory
        else:
            there = memory.total()
        return there * MEMORY_SHARE or math.inf

    @property
    def _family(self) -> str:
        return called(self._model.family, self._model.network.config)

    def _locate(self, asked: AskedLora) -> tuple[Path, str]:
        """Return the path of a LoRA, and a name for it that tells nothing about this machine."""
        model, name = self._model, asked.name
        if name in model.lora_files:
            return model.lora_files[name], name
        if model.takes_paths and not asked.tagged:
            try:
                path = Path(name).expanduser()
                if path.exists() and not self._hides(path, name):
                    return path, (path.resolve().stem if path.is_file() else path.resolve().name)
            except (OSError, RuntimeError, ValueError):
                pass  # too long, or no home: not a path
            if (hub := hub_file(name, "lora", model.library)) is not None:
                return on_hub(hub), str(hub)
        if model.library is None:
            where = "no file here, and " if model.takes_paths and not asked.tagged else ""
            raise SafelightError(
                f"no lora {printable(repr(name), 80)}: {where}no models folder is given "
                "(--models-dir, SAFELIGHT_MODELS)",
                code="no_model",
                field="loras",
            )
        return found_in(model.library, asked).path, name

    def _hides(self, path: Path, name: str) -> bool:
        """Return whether a path is a folder without a LoRA, and the models folder has the name."""
        if path.is_file() or any((path / one).is_file() for one in IN_FOLDER):
            return False
        library = self._model.library
        return library is not None and bool(library.matches(name, "lora"))

    def _matched(self, path: Path) -> tuple[AdapterFile, Match]:
        try:
            weights = file_in(path)
            config = config_of(weights)
            key = (path, stamp_of(weights), config and stamp_of(config))
        except SafelightError as error:
            raise SafelightError(f"lora {error}", code=error.code, field="loras") from None
        except OSError as error:
            raise refusal(path.name, f"cannot be read ({error.strerror})") from None
        if key not in self._files:
            if self._table is None:
                self._shapes = _shapes_of(self._model)
                self._table = table(self._model, layers_of(self._shapes))
            file = open_adapter(path)
            reads = bool(self._model.family.text_parts)
            found = match(file, self._table, self._shapes, self._family, reads)
            self._files[key] = file, found
            while len(self._files) > MAX_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]

    def _size(self, chosen: Sequence[Chosen], low_memory: bool = False) -> int:
        """Return the bytes of the changed weights that are kept in memory.

        low_memory: as if the model were loaded with it.
        """
        network = self._model.family.network
        changed = {
            (change.part, name)
            for one in chosen
            for change in one.changes
            if one.strength(change.part, network)
            for name in change.parameters
        }
        numbers = 0
        for part, name in changed:
            size = math.prod(self._shapes[part][name])
            if not keeps_in_file(self._model.parts[part], name, size, low_memory):
                numbers += size
        return numbers * self._model.dtype.itemsize


def _shapes_of(model: Model) -> Shapes:
    if model.stored is not None:
        return model.stored.shapes
    return {
        name: {key: tuple(tensor.shape) for key, tensor in part.state_dict().items()}
        for name, part in model.parts.items()
        if isinstance(part, torch.nn.Module)
    }


def _key(chosen: Chosen) -> tuple[Any, ...]:
    """Return a key that is equal for equal changes. PEFT's alphas are in a file of their own."""
    asked, file = chosen.asked, chosen.file
    alphas = tuple((change.alpha, change.rooted, change.rank) for change in chosen.changes)
    return file.sha256, asked.weight, asked.text_weight, alphas


def _record(chosen: Chosen) -> dict[str, Any]:
    """Return a LoRA as a recipe has it. hash: what A1111 calls it by."""
    asked, file = chosen.asked, chosen.file
    called = file.header.metadata.get("sshs_model_hash", "").lower()
    if len(called) != 64:
        is_plain = file.header.format == "safetensors"
        called = tensors_digest(file.header.path) if is_plain else file.sha256
    return {
        "name": asked.name,
        "weight": asked.weight,
        "text_weight": asked.text_weight,
        "sha256": file.sha256,
        "hash": called[:12],
        "in_prompt": asked.tagged,
    }
