"""The model of a call of AUTOMATIC1111's API: its own, or the one that the caller chose before."""

from __future__ import annotations

from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException

from safelight.errors import SafelightError
from safelight.server.apis.sdapi_bodies import DrawBody
from safelight.server.callers import caller_of, hub_of

OPTION = "sd_model_checkpoint"


async def model_of(http: HttpRequest, body: DrawBody) -> tuple[str | None, list[str]]:
    """Return the model of a call, and warnings.

    It is the call's own model, else the caller's choice, else None for the server's.
    """
    named = body.override_settings.get(OPTION)
    return await chosen(http) if named in (None, "") else (await found(http, named), [])


async def chosen(http: HttpRequest) -> tuple[str | None, list[str]]:
    """Return the model that the caller chose, and warnings.

    The model is None if the caller chose none, or one that is not there any more. The choice is
    kept, as the model may come back.
    """
    name = await hub_of(http).chosen(caller_of(http.scope).owner)
    if name is None:
        return None, []
    try:
        return await found(http, name), []
    except HTTPException:
        told = f"{OPTION}: the chosen model {name!r:.60} is not here any more; the server's is used"
        return None, [told]


async def choose(http: HttpRequest, label: object) -> None:
    """Choose the model for the caller's later calls. Other callers' models do not change."""
    name = await found(http, label)
    await hub_of(http).choose(name, caller_of(http.scope).owner)


async def found(http: HttpRequest, label: object) -> str:
    """Return the name of the model that a name, title or hash means.

    Raises HTTPException, 404, if there is none.
    """
    try:
        return await hub_of(http).find_model(str(label))
    except SafelightError as error:
        if error.code != "no_model":
            raise
        raise HTTPException(404, f"Model not found: {error}") from None
