"""What requests may name on this server, and how it reads a prompt."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from safelight.errors import SafelightError
from safelight.request import Request
from safelight.server.apis.ours import MODEL, Problem, named, settings_of_body
from safelight.server.bodies import turn
from safelight.server.callers import hub_of
from safelight.server.names import Names
from safelight.server.served import MAX_NAME
from safelight.server.wording import public
from safelight.settings import json_schema
from safelight.weights.library import SUBFOLDERS

router = APIRouter(tags=["models"])

READ = ("prompt", "negative_prompt", "prompt_syntax", "emphasis", "steps", "embeddings")
"""The settings that say how prompts are read."""


class Embedding(BaseModel):
    """A textual inversion of the models folder."""

    name: str
    vectors: int | None = Field(None, description="the tokens that it takes in a prompt")
    problem: str | None = Field(None, description="why it cannot be used with the model")


class Library(BaseModel):
    """What requests may name."""

    models: list[str] = Field(description="in the models folder; the served one is /api/models'")
    loras: list[str]
    vaes: list[str] = Field(description="in the models folder; chosen when the server is started")
    embeddings: list[Embedding]
    styles: list[str]
    wildcards: bool = Field(description="whether `__name__` can be drawn")


def names_of(http: HttpRequest) -> Names:
    """Return the names that requests may use on this server."""
    return hub_of(http).names


@router.get("/api/library", response_model=Library, responses={422: {"model": Problem}})
async def library(
    http: HttpRequest,
    model: Annotated[str | None, Query(max_length=MAX_NAME, description=MODEL)] = None,
) -> Library:
    """List the LoRAs, embeddings and styles that requests may name."""
    name = await _found(http, model)
    async with turn(http):
        return await asyncio.to_thread(_library, names_of(http), name)


async def _found(http: HttpRequest, model: str | None) -> str | None:
    return None if model is None else await hub_of(http).find_model(model)


def _library(names: Names, model: str | None) -> Library:
    entries = {kind: [entry.name for entry in names.entries(kind)] for kind in SUBFOLDERS}
    embeddings = [
        Embedding(name=name, vectors=None, problem=public(str(found)))
        if isinstance(found, SafelightError)
        else Embedding(name=name, vectors=found.count, problem=None)
        for name, found in names.embeddings(model).items()
    ]
    return Library(
        models=entries["model"],
        loras=entries["lora"],
        vaes=entries["vae"],
        embeddings=embeddings,
        styles=list(names.styles()),
        wildcards=names.has_wildcards,
    )


def _schema() -> dict[str, Any]:
    schema = json_schema(Request)
    schema["properties"] = {name: schema["properties"][name] for name in READ}
    schema["properties"]["model"] = {"type": ["string", "null"], "description": MODEL}
    content = {"application/json": {"schema": schema, "example": {"prompt": "a (red:1.2) apple"}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/api/tokens", openapi_extra=_schema())
async def tokens(http: HttpRequest) -> dict[str, Any]:
    """Say how a model reads prompts: chunks, tokens, weights, schedule, and what is unknown.

    The answer has `prompt` and `negative_prompt`, each as `safelight tokens --json` prints it.
    """
    settings = await settings_of_body(http)
    model = await _found(http, named(settings))
    other = [name for name in settings if name not in READ]
    if other:
        raise SafelightError(
            f"{other[0][:40]!r} says nothing about tokens: send {', '.join(READ)} or model",
            code="unknown_setting",
            field=other[0][:40],
        )
    async with turn(http):
        return await asyncio.to_thread(_tokens, names_of(http), model, settings)


def _tokens(names: Names, model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    request = Request(**settings)
    return {
        "prompt": names.describe(request, model=model),
        "negative_prompt": names.describe(request, model=model, negative=True),
    }
