"""Uploads that no job has used yet: they have a quota, and broken-off ones leave nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from safelight.server import uploads as module
from safelight.server.callers import SCOPE, Caller
from safelight.server.uploads import Uploads


class Gradio:
    """Writes as Gradio does: a file tmp*, which is then moved to a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.error: BaseException | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f"tmp{self.number:08x}"
        temporary.write_bytes(b"x" * int(dict(scope["headers"])[b"content-length"]))
        (self.folder / f"tmp{self.number:09x}f").mkdir()
        if self.error is not None:
            raise self.error
        (self.folder / f"tmp{self.number:09x}f").rmdir()
        place = self.folder / f"{self.number:064x}" / "image.png"
        place.parent.mkdir()
        temporary.rename(place)
        self.number += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps([str(place)]).encode()})


def upload(app: Uploads, size: int, owner: str | None = None, client: str = "10.0.0.1") -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "headers": [(b"content-length", str(size).encode())],
        SCOPE: Caller(client, owner),
    }
    asyncio.run(app(scope, None, send))
    return sent[0]["status"]


@pytest.fixture
def gradio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gradio:
    monkeypatch.setattr(module, "OWN", 250)
    monkeypatch.setattr(module, "ALL", 1000)
    monkeypatch.setattr(module, "LEAST", 1)
    return Gradio(tmp_path / "uploads")


def test_one_owner_is_bounded_and_costs_the_others_nothing(gradio: Gradio) -> None:
    app = Uploads(gradio, gradio.folder)
    assert [upload(app, 60) for _ in range(10)] == [200] * 4 + [429] * 6
    assert upload(app, 60, client="10.0.0.2") == 200
    assert [upload(app, 60, owner="key") for _ in range(5)] == [200] * 4 + [429]
    assert upload(app, 251, owner="another") == 429


def test_uploads_that_come_together_do_not_share_one_room(gradio: Gradio) -> None:
    """Each is counted once, as it is announced, while it is written."""
    sent: list[int] = []
    begun, go = 0, asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal begun
        begun += 1
        gradio.folder.mkdir(exist_ok=True)
        (gradio.folder / f"tmp{begun:08x}").write_bytes(b"x" * 100)
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    async def all_at_once() -> None:
        app = Uploads(slow, gradio.folder)
        scope = {"type": "http", "headers": [(b"content-length", b"100")]}
        callers = [Caller("10.0.0.1")] * 4 + [Caller(f"10.0.1.{i}") for i in range(9)]
        calls = [asyncio.ensure_future(app(scope | {SCOPE: one}, None, send)) for one in callers]
        while begun < 10 and len([one for one in calls if one.done()]) < 5:
            await asyncio.sleep(0.01)
        assert sent.count(429) == 2 + 1  # of one owner's four, and of all
        go.set()
        await asyncio.gather(*calls)

    asyncio.run(asyncio.wait_for(all_at_once(), 60))
    assert sent.count(200) == 10


def test_all_together_are_bounded(gradio: Gradio) -> None:
    """This holds after a start as well, when their owners are not known."""
    app = Uploads(gradio, gradio.folder)
    said = [upload(app, 200, client=f"10.0.0.{i}") for i in range(7)]
    assert said == [200] * 5 + [429] * 2
    assert upload(Uploads(gradio, gradio.folder), 200) == 429


def test_what_is_not_fresh_makes_room(gradio: Gradio) -> None:
    app = Uploads(gradio, gradio.folder)
    assert [upload(app, 100) for _ in range(3)] == [200, 200, 429]
    oldest = gradio.folder / f"{0:064x}" / "image.png"
    os.utime(oldest, (0, oldest.stat().st_mtime - module.FRESH - 1))
    assert upload(app, 100) == 200
    assert not oldest.exists()
    assert (gradio.folder / f"{1:064x}" / "image.png").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_a_507_and_heals(gradio: Gradio, code: int) -> None:
    app = Uploads(gradio, gradio.folder)
    gradio.error = OSError(code, os.strerror(code))
    assert upload(app, 100) == 507
    assert list(gradio.folder.iterdir()) == []
    gradio.error = None
    assert upload(app, 100) == 200


def test_broken_off_uploads_leave_nothing(gradio: Gradio) -> None:
    app = Uploads(gradio, gradio.folder)
    for error in (ClientDisconnect(), asyncio.CancelledError(), ValueError("no form")):
        gradio.error = error
        with pytest.raises(type(error)):
            upload(app, 100)
        assert list(gradio.folder.iterdir()) == []


def test_what_an_earlier_server_left_is_cleaned_up(gradio: Gradio) -> None:
    """Broken-off files and folders are removed; complete uploads stay."""
    upload(Uploads(gradio, gradio.folder), 100)
    (gradio.folder / "tmpabc_0123").write_bytes(b"x")
    (gradio.folder / "tmpdef_4567").mkdir()
    (gradio.folder / "tmpdef_4567" / "a.png").write_bytes(b"x")
    Uploads(gradio, gradio.folder).clean_up()
    assert [path.name for path in gradio.folder.iterdir()] == [f"{0:064x}"]


def test_what_another_writes_stays(gradio: Gradio) -> None:
    app = Uploads(gradio, gradio.folder)
    gradio.folder.mkdir()
    (gradio.folder / "tmpabc_0123").write_bytes(b"x")
    app._coming["another"] = 1
    gradio.error = OSError(errno.ENOSPC, "full")
    upload(app, 1)
    assert (gradio.folder / "tmpabc_0123").exists()
