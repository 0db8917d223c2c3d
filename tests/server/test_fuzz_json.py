"""A fuzzer of the JSON bodies that the APIs take; see tests/test_fuzz.py.

Each body is refused in one line, in the shape of its API, or is valid. No job is drawn: the queue
is full and refuses all of them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hostile import encoded
from hypothesis import strategies as st
from inside import Inside

from safelight.errors import SafelightError
from safelight.request import Request
from safelight.server.apis.openai_shapes import ImagesBody
from safelight.server.apis.sdapi_shapes import ImageToImage, TextToImage
from safelight.server.jobs import BusyError, ModelInfo
from safelight.settings import settings_of
from test_fuzz import SPOTS, TEXTS, VALUES, changed, changes, fuzz, mutated

pytestmark = pytest.mark.xdist_group("fuzz json")
PICTURE = base64.b64encode(encoded()).decode()
OWN = dict.fromkeys(settings_of(Request)) | {"prompt": "a cat", "steps": 2, "sampler": "euler"}
OPENAI = dict.fromkeys(ImagesBody.model_fields) | {"prompt": "a cat", "n": 1, "steps": 2}
SDAPI = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64}
ROUTES: dict[str, dict[str, Any]] = {
    "/api/jobs": OWN | {"image": PICTURE, "mask": None},
    "/api/tokens": {"prompt": "a (cat:1.1)", "prompt_syntax": "a1111", "clip_skip": 1},
    "/v1/images/generations": OPENAI,
    "/sdapi/v1/txt2img": dict.fromkeys(TextToImage.model_fields) | SDAPI,
    "/sdapi/v1/img2img": dict.fromkeys(ImageToImage.model_fields)
    | SDAPI
    | {"init_images": [PICTURE]},
    "/sdapi/v1/png-info": {"image": PICTURE},
    "/sdapi/v1/options": {"sd_model_checkpoint": "tiny"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """Return a server whose queue is full, and whose model counts as loaded."""
    with Inside(tmp_path_factory.mktemp("fuzz"), draws=False) as running:

        async def submit(*_: Any, **__: Any) -> Any:
            raise BusyError(1, 1)

        running.hub.submit = submit  # pyright: ignore[reportAttributeAccessIssue]
        info = ModelInfo(name="tiny", width=64, height=64, ready=True)

        async def load() -> None:
            running.hub._on_message("ready", [info.model_dump()])

        async def facts(name: str) -> ModelInfo:  # of any model: no worker will say
            return info

        running.hub.catalogue.facts = facts  # pyright: ignore[reportAttributeAccessIssue]

        running.within(load())
        yield running


def raw(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize("route", ROUTES)
def test_bodies(server: Inside, route: str, capfd: pytest.CaptureFixture[str]) -> None:
    known = ROUTES[route]
    plain = {name: value for name, value in known.items() if value is not None}
    strategy = st.one_of(
        changes(known).map(lambda c: raw(changed(plain, c))),
        st.dictionaries(st.one_of(st.sampled_from(sorted(known)), TEXTS), VALUES).map(raw),
        VALUES.map(lambda value: json.dumps(value).encode()),
        SPOTS.map(lambda spots: mutated(raw(plain), spots)),
        changes(known).map(  # each key twice
            lambda c: raw(plain)[:-1] + b", " + raw(changed({"prompt": "b"}, c))[1:]
        ),
    )

    def try_it(body: bytes) -> None:
        answer = server.ask("POST", route, body)
        assert answer.status < 500, answer
        told = answer.json()
        if answer.status in (200, 429):
            return
        line = told["error"]["message"] if "/v1/images" in route else told["detail"]
        assert isinstance(line, str)
        raise SafelightError(line)

    # An unknown setting is answered with the names of all that there are.
    fuzz(f"JSON to {route}", 60, strategy, try_it, capfd, longest=1000)
