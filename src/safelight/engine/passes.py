"""The second pass of a picture, which begins when the first is decoded, and perhaps enlarged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from safelight.engine.refining import table_of
from safelight.engine.requests import latents_of
from safelight.engine.ticket import Later
from safelight.errors import SafelightError
from safelight.hires import about_second_pass, final_size, second_pass
from safelight.upscaling.names import is_lanczos

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.engine.job import Job
    from safelight.model import Model
    from safelight.request import Request


def later_of(
    model: Model,
    request: Request,
    size: Callable[[tuple[int, ...]], float],
    make: Callable[[Request], tuple[Model, Job]],
    named: Mapping[str, str] | None = None,
) -> Later | None:
    """Return the second pass of a resolved request of one picture; None if it has none.

    size: returns the size of latents, as `Ticket` has it, from their shape. make: returns the job
    of a pass's request, and the model that draws it. named: name and SHA-256 of the upscaler, as
    the result has them. Raises SafelightError if the second pass cannot be drawn, before the first.
    """
    if request.hires_scale == 1:
        return None
    native = model.native_size
    planned = second_pass(request, native)
    with about_second_pass():
        table, _ = table_of(model, planned)

    def begin(picture: Image) -> tuple[Model, Job]:
        return make(second_pass(request, native, picture))

    def enlarge(picture: Image) -> Iterator[Image | None]:
        with about_second_pass():
            upscaler = model.upscalers.get(request.hires_upscaler)
            assert upscaler is not None
            check_same(named, upscaler.used)
            work = upscaler.begin(picture, size=final_size(request, native))
        yield None  # loading it was a step
        for _ in work:
            yield None
        yield work.picture

    own = None if is_lanczos(request.hires_upscaler) else enlarge
    return Later(table, size(latents_of(model, planned)), begin, own)


def check_same(named: Mapping[str, str] | None, used: Mapping[str, str] | None) -> None:
    """Raise SafelightError if an upscaler's file is not the one that a result names.

    named: its name and SHA-256 in the result. used: those of the file that is there now.
    """
    if named and used and named["sha256"] != used["sha256"]:
        raise SafelightError(
            f"the upscaler {named['name']} changed while pictures were drawn: draw them again"
        )
