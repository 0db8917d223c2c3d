"""Make a job durable: first its input pictures, then its row."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Container
from typing import Any

from safelight.defaults import BY_MODEL
from safelight.errors import StorageError
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.hires import HIRES
from safelight.region import INPAINTING
from safelight.request import Request
from safelight.request_pictures import INPUTS, digest_key, setting_of
from safelight.server.files import Files
from safelight.server.jobs import Job
from safelight.server.store import Store
from safelight.upscaling.names import LANCZOS


def accept(
    files: Files,
    store: Store,
    job_id: str,
    request: Request,
    asked: Container[str],
    *,
    known: bool,
    key: str | None,
    named: str | None,
    webhook: str | None,
    **how: Any,
) -> tuple[Job, bool]:
    """Store a job with its input pictures; return it and whether it is new.

    asked: names of the settings that the request had before defaults were filled in. known: whether
    it has its model's defaults; if not, the worker that draws it fills them in. named: the model,
    if the request names one. how: arguments of `Store.submit`.
    """
    settings = request.to_dict()
    if not known:
        for name in BY_MODEL - request.model_fields_set:
            del settings[name]
    beside = {"model": named, "webhook": webhook}
    beside = {name: value for name, value in beside.items() if value is not None}
    # Defaults are left out: another start of the server may have others.
    of = {digest_key(name): setting_of(name) for name in INPUTS}
    own = {name: v for name, v in settings.items() if of.get(name, name) in asked}
    whole = settings | beside
    # The version of the other digest had no such settings.
    newer = [*CONTROL] if request.control_image is None else []
    newer += IP_ADAPTER if request.ip_adapter_image is None else ()
    newer += HIRES if request.hires_scale == 1 else ()
    newer += ["hires_upscaler"] if request.hires_upscaler == LANCZOS else []
    newer += INPAINTING if request.mask is None else ()
    whole = {name: value for name, value in whole.items() if name not in newer}
    if "seed" not in asked:
        del whole["seed"]  # each submission of one body draws another seed
    how |= {"digest": _digest(own | beside), "earlier": _digest(whole)}
    kept = False
    try:
        for name, picture in request.pictures.items():
            files.keep_input(job_id, name, picture)
        job, kept = store.submit(job_id, settings, key=key, webhook=webhook, **how)
    except StorageError:
        kept = _may_be_there(store, job_id)
        raise
    finally:
        if not kept and request.pictures:
            with contextlib.suppress(StorageError):  # else the next start puts them into quarantine
                files.remove_inputs(job_id)
    return job, kept


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _may_be_there(store: Store, job_id: str) -> bool:
    """Return whether a job that could not be stored may be there all the same.

    A database can go away between its commit and its answer. Then the job's input pictures are left
    for the next start to look at.
    """
    try:
        return store.get(job_id) is not None
    except StorageError:
        return True
