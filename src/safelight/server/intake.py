"""Make a job durable: first its input pictures, then its row."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from safelight.defaults import BY_MODEL
from safelight.errors import StorageError
from safelight.request import Request
from safelight.server.files import Files
from safelight.server.jobs import Job
from safelight.server.store import Store


def accept(
    files: Files,
    store: Store,
    job_id: str,
    request: Request,
    *,
    known: bool,
    key: str | None,
    named: str | None,
    webhook: str | None,
    **how: Any,
) -> tuple[Job, bool]:
    """Store a job with its input pictures; return it and whether it is new.

    known: whether the request has its model's defaults; if not, the worker that draws it fills them
    in. named: the model, if the request names one. how: arguments of `Store.submit`.
    """
    settings = request.to_dict()
    if not known:
        for name in BY_MODEL - request.model_fields_set:
            del settings[name]
    beside = {"model": named, "webhook": webhook}
    asked = settings | {name: value for name, value in beside.items() if value is not None}
    if "seed" not in request.model_fields_set:
        asked.pop("seed")  # each submission of one body draws another seed
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    kept = False
    try:
        for name, image in (("image", request.image), ("mask", request.mask)):
            if image is not None:
                files.keep_input(job_id, name, image)
        job, kept = store.submit(job_id, settings, key=key, digest=digest, webhook=webhook, **how)
    except StorageError:
        kept = _may_be_there(store, job_id)
        raise
    finally:
        if not kept and request.image is not None:
            with contextlib.suppress(StorageError):  # else the next start puts them into quarantine
                files.remove_inputs(job_id)
    return job, kept


def _may_be_there(store: Store, job_id: str) -> bool:
    """Return whether a job that could not be stored may be there all the same.

    A database can go away between its commit and its answer. Then the job's input pictures are left
    for the next start to look at.
    """
    try:
        return store.get(job_id) is not None
    except StorageError:
        return True
