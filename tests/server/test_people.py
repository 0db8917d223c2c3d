"""Keys of people: given out, counted and taken back while a server runs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inside import Answer, Inside
from PIL import Image
from sqlalchemy import text
from test_store import claim, submit

from safelight import SafelightError
from safelight.cli import run
from safelight.errors import StorageError
from safelight.request import Request
from safelight.server import allowances, entrance, keyring
from safelight.server.allowances import Allowance, SpentError, duration, parse
from safelight.server.callers import Caller
from safelight.server.costs import cost, pixel_steps
from safelight.server.people import digest
from safelight.server.store import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with Inside(tmp_path_factory.mktemp("people"), draws=False, token="the admin's") as opened:
        yield opened


def ask(server: Inside, secret: str | None, path: str = "/api/jobs", body: Any = None) -> Answer:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    return server.ask("GET" if body is None else "POST", path, body, **headers)


def forget(server: Inside) -> None:
    """Act as if a second had passed: the next request reads the keys again."""
    server.hub.keys._at -= keyring.FRESH


def command(folder: Path, *arguments: str) -> int:
    return run(["keys", *arguments, "--data-dir", str(folder)])


# --- the command ----------------------------------------------------------------------------------


def test_from_a_key_s_first_day_to_its_last(
    server: Inside, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(server.data, "add", "anna", "--pictures", "3/day") == 0
    secret = capsys.readouterr().out.strip()
    assert re.fullmatch(r"slk_[\w-]{43}", secret)
    forget(server)
    assert ask(server, secret).status == 200
    assert ask(server, secret[:-1]).status == 401
    assert ask(server, None).status == 401
    job = ask(server, secret, body={"prompt": "a secret"}).json()
    assert ask(server, secret, f"/api/jobs/{job['id']}").status == 200
    assert ask(server, "the admin's", f"/api/jobs/{job['id']}").status == 200

    assert command(server.data, "add", "ben") == 0
    other = capsys.readouterr().out.strip()
    forget(server)
    assert ask(server, other, f"/api/jobs/{job['id']}").status == 404
    assert ask(server, other).json() == []

    assert command(server.data, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [key["name"] for key in listed] == ["anna", "ben"]
    assert listed[0]["limits"] == [{"kind": "pictures", "limit": "3/day", "left": 2.0}]
    assert command(server.data, "list") == 0
    told = capsys.readouterr().out
    assert re.search(r"anna +\d{4}-\d\d-\d\d +2 of 3/day pictures\n", told)
    assert secret not in told
    assert secret.encode() not in (server.data / "jobs.sqlite3").read_bytes()

    for name in ("anna", "ben"):
        assert command(server.data, "remove", name) == 0
    forget(server)
    assert ask(server, secret).status == 401


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "admin"], "no name of a key"),
        (["add", "a/b"], "no name of a key"),
        (["add", "a" * 41], "no name of a key"),
        (["add", "twice"], "there is a key twice already"),
        (["remove", "nobody"], "there is no key 'nobody'"),
        (["limit", "nobody", "--pictures", "1/day"], "there is no key 'nobody'"),
        (["limit", "twice"], "say which limit"),
        (["limit", "twice", "--pictures", "many"], "expected a number and one of minute"),
        (["limit", "twice", "--pictures", "-1/day"], "expected a number"),
        (["limit", "twice", "--pictures", "nan/day"], "expected a number"),
        (["add", "third", "--pixel-steps", "5/year"], "is no limit of pixel-steps"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command(tmp_path, "add", "twice")
    capsys.readouterr()
    assert command(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_database_of_another_version_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    store.migrate()
    with store.engine.begin() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '0002'"))
    store.close()
    assert command(tmp_path, "list") == 2
    assert "start its server once" in capsys.readouterr().err


# --- who may ask ----------------------------------------------------------------------------------


def test_without_a_token_the_first_key_closes_the_server(tmp_path: Path) -> None:
    with Inside(tmp_path, draws=False) as server:
        assert ask(server, None).status == 200
        secret = server.hub.store.add_key("anna")
        forget(server)
        assert [ask(server, given).status for given in (None, "x", secret)] == [401, 401, 200]
        assert server.ask("GET", "/healthz").status == 200


def test_a_browser_s_cookie_stands_for_the_key_and_goes_with_it(server: Inside) -> None:
    secret = server.hub.store.add_key("carl")
    forget(server)
    form = f"token={secret}".encode()
    entered = server.ask("POST", entrance.ENTER, form)
    assert entered.status == 303
    cookie = entered.headers["set-cookie"].partition(";")[0]
    assert server.ask("GET", "/api/jobs", cookie=cookie).status == 200
    assert secret not in cookie
    server.hub.store.remove_key("carl")
    forget(server)
    assert server.ask("GET", "/api/jobs", cookie=cookie).status == 401


def test_keys_of_before_count_while_the_database_is_away() -> None:
    async def both() -> tuple[str | None, str | None]:
        key = SimpleNamespace(name="anna", token=digest(b"x"), cookie="", allowances=())
        given: list[Any] = [[key], StorageError("away"), []]

        def read() -> Any:
            found = given.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        ring = keyring.Keyring(read)
        ring._at -= 10
        away = await ring.of_token(b"x")
        return away, await ring.of_token(b"x")

    assert asyncio.run(both()) == ("anna", None)


def test_a_name_leads_to_its_owner() -> None:
    assert Caller("10.0.0.1", "anna").owner == "key:anna"


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seconds"), [("100/day", 86400), ("2e9/hour", 3600), ("0/minute", 60)]
)
def test_a_limit_is_written_as_it_is_read(given: str, seconds: int) -> None:
    found = parse("pictures", given)
    assert found is not None
    assert found.period == seconds
    assert parse("pictures", str(found)) == found
    assert parse("pictures", "none") is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (59, "59s"), (360, "6m0s"), (86399, "23h59m59s")]
)
def test_durations_are_openai_s(seconds: int, said: str) -> None:
    assert duration(seconds) == said


def test_what_is_used_is_counted_until_the_window_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(store, "now", lambda: now[0])
    store.add_key("anna")
    store.allow("anna", [("pictures", parse("pictures", "3/hour"))])
    how: dict[str, Any] = {"owner": "key:anna"}
    first = submit(store, count=2, key="k", digest="d", **how)
    assert submit(store, count=2, key="k", digest="d", **how).id == first.id  # is not counted
    now[0] += 600
    with pytest.raises(SpentError, match=r"has 1 of 3/hour left: .*again in 50m[01]s") as refused:
        submit(store, count=2, **how)
    assert refused.value.retry_after in (3000, 3001)  # two moments are never the same
    submit(store, count=1, **how)
    with pytest.raises(SafelightError, match="takes 4 pictures, and the key anna has 3/hour"):
        submit(store, count=4, **how)
    store.close()  # a restart forgets nothing
    with pytest.raises(SpentError):
        submit(store, count=1, **how)
    submit(store, count=5, owner="key:ben")
    now[0] += 3001  # a second more: the clock of PostgreSQL is read anew after a close
    submit(store, count=3, **how)
    assert store.counts() == {"queued": 4}


def test_all_or_nothing_of_two_limits(store: Store) -> None:
    store.add_key("anna")
    limits = [("pictures", parse("pictures", "9/day")), ("pixel_steps", parse("", "1e6/day"))]
    store.allow("anna", limits)
    submit(store, owner="key:anna", pixel_steps=6e5)
    with pytest.raises(SpentError, match="takes 600000 pixel-steps"):
        submit(store, owner="key:anna", pixel_steps=6e5)
    used = {one.kind: one.used for key in store.all_keys() for one in key.allowances}
    assert used == {"pictures": 1.0, "pixel_steps": 6e5}


@pytest.mark.parametrize(
    ("asked", "picture", "drawn"),
    [
        ({}, None, (256, 256)),
        ({"width": 512}, None, (512, 256)),
        ({}, (1024, 2048), (1024, 2048)),
        ({"width": 512}, (64, 128), (512, 1024)),
        ({"width": 64, "height": 64}, (1024, 1024), (64, 64)),
    ],
)
def test_pixel_steps_are_of_the_size_to_draw(asked: Any, picture: Any, drawn: Any) -> None:
    image = picture and Image.new("RGB", picture)
    request = Request(prompt="a cat", image=image, count=2, **asked).fitted()
    assert pixel_steps(request, 5, (256, 256)) == 2 * 5 * drawn[0] * drawn[1]
    assert cost(request, 5, (256, 256)) == 2 * 2 * 5 * drawn[0] * drawn[1] // 256**2


def test_a_part_that_is_drawn_costs_its_whole_picture_once_for_each_result() -> None:
    """Each result is as large as the picture, whatever the size of the part."""
    image, mask = Image.new("RGB", (2000, 1000)), Image.new("L", (2000, 1000), 255)
    asked: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 64, "count": 3}
    request = Request(image=image, mask=mask, mask_padding=4, guidance_scale=4, **asked).fitted()
    assert pixel_steps(request, 5, (256, 256)) == 3 * (5 * 64 * 64 + 2_000_000)
    assert cost(request, 5, (256, 256)) == round(3 * (2 * 5 * 64 * 64 + 2_000_000) / 256**2)


def test_a_data_folder_that_is_none_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["list"], ["remove", "anna"], ["limit", "anna", "--pictures", "3/day"]):
        for folder in (tmp_path, tmp_path / "typo"):
            assert command(folder, *arguments) == 2
            assert capsys.readouterr().err == (
                f"error: {folder} has no server's jobs: give its --data-dir or --database\n"
            )
    assert list(tmp_path.iterdir()) == []
    # The first key may come before the server.
    assert command(tmp_path / "new", "add", "anna") == 0
    assert capsys.readouterr().err.startswith(f"no server has used {tmp_path / 'new'} so far\n")
    assert command(tmp_path / "new", "list") == 0
    assert command(tmp_path / "new", "add", "ben") == 0
    assert "so far" not in capsys.readouterr().err


def test_keys_need_the_server_s_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("safelight.cli.serve.find_spec", lambda _: None)
    for arguments in (["list"], ["add", "anna", "--pictures", "3/day"]):
        assert command(tmp_path, *arguments) == 2
        assert "pip install 'safelight[server]'" in capsys.readouterr().err


def test_a_retry_counts_again(store: Store) -> None:
    store.add_key("anna")
    store.allow("anna", [("pictures", parse("pictures", "3/day"))])
    job = submit(store, count=2, owner="key:anna")
    claim(store)
    store.cancel(job.id)
    with pytest.raises(SpentError):
        store.retry(job.id, 100, "key:anna")


def test_a_model_that_only_workers_have_counts_at_its_own_size(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any) -> None:
        raise SafelightError("no model of that name is here")

    def describe(_: str, name: str) -> None:
        facts = {"name": name, "width": 1024, "height": 1024}
        catalogue.on_message("described", [name, facts, None])

    catalogue = server.hub.catalogue
    monkeypatch.setattr(server.hub.names, "plan", plan)
    monkeypatch.setattr(catalogue, "_elsewhere", ["large"])
    monkeypatch.setattr(catalogue, "_send", describe)
    server.within(_loaded(server))
    secret = server.hub.store.add_key("far")
    server.hub.store.allow("far", [("pixel_steps", parse("pixel_steps", "1e6/day"))])
    forget(server)
    refused = ask(server, secret, body={"prompt": "a cat", "model": "large", "steps": 1})
    assert (refused.status, refused.json()["code"]) == (422, "over_limit")
    assert "takes 1048576 pixel-steps" in refused.json()["detail"]


GENERATIONS = "/v1/images/generations"


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/api/jobs", lambda body: (body["code"], body["detail"])),
        (GENERATIONS, lambda body: (body["error"]["code"], body["error"]["message"])),
        ("/sdapi/v1/txt2img", lambda body: (body["error"], body["detail"])),
    ],
)
def test_all_three_interfaces_say_what_is_left(server: Inside, path: str, shape: Any) -> None:
    from safelight.server.jobs import ModelInfo

    name = path.strip("/").replace("/", ".")
    secret = server.hub.store.add_key(name)
    limits = [("pictures", parse("", "2/day")), ("pixel_steps", parse("", "1e6/day"))]
    server.hub.store.allow(name, limits)
    forget(server)
    # No worker has told the size of the model's pictures yet, but its headers do.
    server.hub.catalogue.info = ModelInfo(name="embedded")
    accepted = ask(server, secret, body={"prompt": "a cat", "steps": 5, "count": 2})
    server.hub.catalogue.info = ModelInfo(name="embedded", width=256, height=256)
    server.within(_loaded(server))
    assert accepted.status == 202
    assert accepted.headers["x-ratelimit-limit-requests"] == "2"
    assert accepted.headers["x-ratelimit-remaining-requests"] == "0"
    assert accepted.headers["x-ratelimit-reset-requests"] == "24h0m0s"
    assert accepted.headers["x-ratelimit-remaining-pixel-steps"] == str(1000000 - 2 * 5 * 256 * 256)
    refused = ask(server, secret, path, {"prompt": "a cat", "steps": 5})
    assert refused.status == 429
    code, said = shape(refused.json())
    assert code in ("limit_reached", "rate_limit_exceeded", "SpentError")
    assert "has 0 of 2/day left" in said
    assert 86000 < int(refused.headers["retry-after"]) <= 86400
    assert refused.headers["x-should-retry"] == "false"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-requests" not in ask(server, "the admin's").headers


async def _loaded(server: Inside) -> None:
    server.hub.catalogue.arrived.set()


def test_a_limit_that_was_lowered_leaves_nothing_rather_than_less() -> None:
    found = dict(allowances.headers([Allowance("pictures", 5, 3600, since=100, used=9)], 200))
    assert found["x-ratelimit-remaining-requests"] == "0"


def test_figures_are_told_by_key(server: Inside) -> None:
    secret = server.hub.store.add_key("dora")
    forget(server)
    ask(server, secret, body={"prompt": "a cat", "steps": 5, "count": 2, "width": 64, "height": 64})
    told = ask(server, "the admin's", "/metrics").body.decode()
    assert 'safelight_key_pictures{key="dora"} 2.0' in told
    assert 'safelight_key_unfinished_jobs{key="dora"} 1.0' in told
    assert f'safelight_key_pixel_steps{{key="dora"}} {2 * 5 * 64 * 64:.1f}' in told
    server.hub.store.remove_key("dora")
    assert "dora" not in ask(server, "the admin's", "/metrics").body.decode()
