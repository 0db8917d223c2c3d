"""The upscalers that a process has loaded, by name."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.upscaling.names import check_installed, is_lanczos
from safelight.weights.cache import Stamp, stamp_of
from safelight.weights.digest import digest_file
from safelight.weights.find import find_upscaler

if TYPE_CHECKING:
    import torch

    from safelight.upscaling.upscaler import Upscaler

KEPT = 2
"""The number of networks that are kept: those used last. The largest have 0.2 GB."""


class Upscalers:
    """Loads upscalers by name, and keeps the last ones. For use in any thread.

    device, models_dir: see `load_upscaler`. takes_paths: whether a name may be a path. files: paths
    of names that are not looked up, as those of a recipe.
    """

    def __init__(
        self,
        device: str | torch.device,
        models_dir: str | Path | None = None,
        *,
        takes_paths: bool = True,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.device, self.models_dir, self.takes_paths = device, models_dir, takes_paths
        self.files: dict[str, Path] = dict(files or {})
        self._kept: OrderedDict[Path, tuple[Stamp, Upscaler]] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Upscalers:
        return self  # networks that do not change are shared by copies of a model

    def __reduce__(self) -> Any:
        return _again, (self.device, self.models_dir, self.takes_paths, self.files)

    def check(self, name: str, field: str | None = None) -> None:
        """Raise SafelightError if there is no upscaler of a name, or no library to read it.

        field: of the error.
        """
        if is_lanczos(name):
            return
        try:
            check_installed()
            self._path(name)
        except SafelightError as error:
            raise SafelightError(str(error), code=error.code, field=field) from None

    def used(self, name: str) -> dict[str, str]:
        """Return name and SHA-256 of an upscaler's file, as a recipe has them."""
        path, title = self._path(name)
        return {"name": title, "sha256": digest_file(path).sha256}

    def get(self, name: str) -> Upscaler | None:
        """Return an upscaler, loaded if it is not; None for Lanczos. Raises as `load_upscaler`."""
        if is_lanczos(name):
            return None
        from safelight.upscaling.upscaler import load_upscaler

        with self._lock:
            path, title = self._path(name)
            stamp, before = stamp_of(path), self._kept.pop(path, None)
            if before is None or before[0] != stamp:
                before = stamp, load_upscaler(path, device=self.device, title=title)
            self._kept[path] = before
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return before[1]

    def _path(self, name: str) -> tuple[Path, str]:
        """Return the file of a name, and what the upscaler is called."""
        if name in self.files:
            return self.files[name].resolve(), name
        found = find_upscaler(name, models_dir=self.models_dir, takes_paths=self.takes_paths)
        return found.path.resolve(), found.name


def _again(device: Any, models_dir: Any, takes_paths: bool, files: Mapping[str, Path]) -> Upscalers:
    return Upscalers(device, models_dir, takes_paths=takes_paths, files=files)
