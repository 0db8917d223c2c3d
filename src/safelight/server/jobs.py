"""Jobs as the routes answer with them, and their errors."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field

from safelight.errors import SafelightError


class Status(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (Status.QUEUED, Status.RUNNING)


class Picture(BaseModel):
    """One finished picture of a job; its bytes are at /api/pictures/{id}."""

    id: str = Field(description="opaque, and unguessable")
    index: int = Field(description="which of the job's pictures, from 0")
    seed: int
    width: int
    height: int
    recipe: dict[str, Any] = Field(description="all it takes to make this picture again")


class Progress(BaseModel):
    """Steps taken and steps in all, summed over all pictures of a job."""

    step: int = 0
    steps: int = 0

    @property
    def share(self) -> float:
        return self.step / self.steps if self.steps else 0.0


class Job(BaseModel):
    id: str
    status: Status
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    client: str = Field("api", description="which interface it came through")
    model: str | None = Field(None, description="the name of the model that draws it")
    settings: dict[str, Any] = Field(description="the request as it was sent, pictures by SHA-256")
    progress: Progress = Progress()
    warnings: list[str] = []
    error: str | None = Field(default=None, description="one line, of a job that failed")
    pictures: list[Picture] = []
    attempts: int = 0
    expires_at: datetime | None = Field(
        None, description="when it is deleted, with its pictures: the server keeps no more"
    )


class Event(BaseModel):
    """Something that happened to a job just now.

    kind: "progress"; "preview", with the clean estimate of picture `index` and its noisy state,
    each a PNG in base64; "picture", when picture `index` is finished; "end", the last event. `job`
    is the job at that time.
    """

    kind: str
    job: Job
    index: int | None = None
    preview: str | None = None
    noisy: str | None = None
    at: float | None = Field(
        default=None, description="when the previewed step ended, seconds since 1970"
    )


class ModelInfo(BaseModel):
    """A model that this server draws with; what is not known yet is None."""

    name: str
    sha256: str | None = None
    kind: str | None = None
    uses_prompt: bool = True
    family: str | None = None
    width: int | None = None
    height: int | None = None
    vae: str | None = Field(default=None, description="the autoencoder in place of the model's own")
    device: str | None = None
    dtype: str | None = None
    ready: bool = Field(default=False, description="whether the worker takes jobs")
    loaded: bool = Field(
        default=False, description="whether it is in memory; others are loaded on demand"
    )


class WorkerInfo(BaseModel):
    """A worker of the fleet, as it described itself."""

    id: str
    model: ModelInfo = Field(description="the one that it began with")
    models: list[str] = Field([], description="all that it draws jobs of; it loads them by turns")
    memory: int | None = Field(None, description="MiB of the device that it draws on")
    joined_at: datetime
    seen_at: datetime = Field(description="when it last said that it is well")


class TooMuchError(SafelightError):
    """More was asked for than can be taken now: try again after `retry_after` seconds."""

    def __init__(self, message: str, *, code: str, retry_after: int) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class BusyError(TooMuchError):
    """The queue is full."""

    def __init__(self, bound: int, retry_after: int) -> None:
        super().__init__(
            f"the queue of {bound} pictures is full: try again in {retry_after} s",
            code="queue_full",
            retry_after=retry_after,
        )


class StoppingError(SafelightError):
    """The server is about to end."""

    def __init__(self) -> None:
        super().__init__("the server is stopping: try again when it is back", code="stopping")


_STATUS = {
    "queue_full": 429,
    "limit_reached": 429,
    "stopping": 503,
    "no_worker": 503,
    "storage": 507,
    "storage_away": 503,
    "not_found": 404,
}


def status_of(error: SafelightError) -> int:
    """Return the HTTP status of an error, by its code."""
    return _STATUS.get(error.code, 422)


def retry_after(error: SafelightError) -> dict[str, str]:
    """Return the headers that say when to try again, if the error knows."""
    if not isinstance(error, TooMuchError):
        return {}
    found = {"Retry-After": str(error.retry_after)}
    # OpenAI's clients try again by themselves, sooner than that.
    return found if error.retry_after <= 60 else {**found, "x-should-retry": "false"}
