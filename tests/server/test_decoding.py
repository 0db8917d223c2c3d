"""The processes that read what strangers send: their limits, and how they are shared."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hostile import NOISE, encoded

from safelight.errors import SafelightError
from safelight.server import caged
from safelight.server.decoder import Sent
from safelight.server.decoding import Decoders


def within(work: Callable[[Decoders], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        decoders = Decoders(2)
        try:
            return await work(decoders)
        finally:
            decoders.close()

    return asyncio.run(run())


PICTURE = "safelight.server.caged:picture"


def test_a_picture_comes_back_as_it_is() -> None:
    image = within(lambda d: d.call(PICTURE, [encoded()], name="the picture"))
    assert (image.mode, image.size) == ("RGB", (64, 64))


def test_a_refusal_comes_back_in_words() -> None:
    with pytest.raises(SafelightError, match="must be a PNG, JPEG or WebP picture"):
        within(lambda d: d.call(PICTURE, [b"GIF89a"], name="the picture"))


@pytest.mark.parametrize("function", ["signal:pause", "os:abort", "sys:exit"])
def test_a_stuck_or_dying_decoder_is_replaced(function: str) -> None:
    async def work(decoders: Decoders) -> None:
        began = time.monotonic()
        with pytest.raises(SafelightError):
            await decoders.call(function, wall=5.0)
        assert time.monotonic() - began < 60
        assert (await decoders.call(PICTURE, [encoded()], name="it")).size == (64, 64)

    within(work)


def test_memory_is_limited() -> None:
    """secrets.token_bytes returns as many bytes as it is told to, so it can use up memory."""
    with pytest.raises(SafelightError, match="too much memory"):
        within(lambda d: d.call("secrets:token_bytes", nbytes=1 << 30))


def test_a_fault_of_ours_says_nothing_of_the_input() -> None:
    with pytest.raises(SafelightError) as refusal:
        within(lambda d: d.call("json:loads", s='{"secret": '))
    assert "secret" not in str(refusal.value)


def test_one_client_never_has_all_decoders() -> None:
    async def work(decoders: Decoders) -> float:
        await decoders.call(PICTURE, [encoded()], client="warm", name="it")
        stuck = [
            asyncio.ensure_future(decoders.call("signal:pause", client="hostile", wall=3.0))
            for _ in range(8)
        ]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        for _ in range(3):
            await decoders.call(PICTURE, [encoded()], client="other", name="it", wall=60.0)
        waited = time.monotonic() - began
        assert not any(one.done() and one.exception() is None for one in stuck)
        for one in stuck:
            one.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        return waited

    assert within(work) < 15  # not the 24 s of eight stuck calls, on a busy machine either


def test_a_cancelled_wait_keeps_no_place() -> None:
    async def work(decoders: Decoders) -> None:
        first = asyncio.ensure_future(decoders.call("signal:pause", client="a", wall=1.0))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(decoders.call(PICTURE, [b""], client="a", name="it"))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert (await decoders.call(PICTURE, [encoded()], client="a", name="it")).size == (64, 64)

    within(work)


def test_a_large_body_is_taken_apart() -> None:
    picture = bytes(range(256)) * 5000
    text = base64.b64encode(picture).decode()
    within_objects = {"scripts": {"net": {"args": [{"image": text, "weight": 1}, "x" * 20_001]}}}
    body = {"prompt": "a", "image": text, "init_images": [text], "text": "x" * 20_001}
    sent = json.dumps(body | within_objects)
    reduced, one, two = within(lambda d: d.call("safelight.server.caged:body", [sent.encode()]))
    assert (one, two) == (picture, picture)
    assert reduced["prompt"] == "a"
    assert reduced["text"] == "x" * 20_001
    assert (reduced["image"], reduced["init_images"]) == ({"": 0}, [{"": 1}])
    # Pictures for a web UI's extensions are read by nobody.
    assert reduced["scripts"]["net"]["args"] == [{"image": None, "weight": 1}, "x" * 20_001]


def test_a_body_that_was_read_is_freed_at_once() -> None:
    """Until the next garbage collection, a decoder would hold its pictures."""
    text = base64.b64encode(bytes(50_000)).decode()
    sent = json.dumps({"image": text, "init_images": [text]}).encode()
    gc.collect()
    gc.disable()
    try:
        caged.body(Sent(sent))
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("body", [b"[]", b"{", b"[" * 100_000, b"\xff", b'{"a":1e999999}x'])
def test_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(SafelightError):
        caged.body(Sent(body))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"a": x}', "not a valid JSON object: line 1, column 7"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number of too many digits"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_what_is_wrong_with_json_is_said(body: bytes, told: str) -> None:
    with pytest.raises(SafelightError, match=told) as refused:
        caged.body(Sent(body))
    assert refused.value.code == "not_json"


WEBPS = {
    "lossy": encoded(NOISE.resize((48, 32)), "WEBP"),
    "lossless": encoded(NOISE.resize((48, 32)), "WEBP", lossless=True),
    "alpha": encoded(NOISE.resize((48, 32)).convert("RGBA"), "WEBP", exif=b"Exif\0\0"),
}


@pytest.mark.parametrize("kind", WEBPS)
def test_a_webp_that_takes_too_much_memory_is_refused_before(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = WEBPS[kind]
    monkeypatch.setattr(caged, "MEMORY", caged.WEBP_ROOM + len(data) + 16 * 48 * 32)
    assert caged.picture(Sent(data), "it").size == (48, 32)
    monkeypatch.setattr(caged, "MEMORY", caged.MEMORY - 1)
    with pytest.raises(SafelightError, match=r"million pixels as a WebP .* not 48x32: make it"):
        caged.picture(Sent(data), "it")


def test_a_large_picture_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some decoders call it damage if there is too little memory."""
    cut = encoded()[:-400]
    with pytest.raises(SafelightError, match="damaged or cut off"):
        caged.picture(Sent(cut), "it")
    monkeypatch.setattr(caged, "LARGE", 64 * 64 - 1)
    with pytest.raises(SafelightError, match=r"cannot be read \(.*\): make it smaller"):
        caged.picture(Sent(cut), "it")


def test_base64_of_white_space_takes_little_memory() -> None:
    import tracemalloc

    text = " a" * (4 << 20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="not base64"):
        caged.from_base64(text + "!")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(text)
