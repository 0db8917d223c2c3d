"""Tokens, limits by client, addresses, errors: what an attack found, and variants."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from test_guard import ask

from safelight.errors import SafelightError
from safelight.server import limits, sites, tokens
from safelight.server.bodies import RefusedError
from safelight.server.callers import Caller, address_of, network, shortened
from safelight.server.guard import Rules
from safelight.server.limits import Guesses, Share, Sparing
from safelight.server.listening import listen
from safelight.server.wording import clipped, hide, public

HOST = {"host": "localhost"}


@pytest.mark.parametrize("token", ["grün", "schlüssel-ß", "ключ", "鍵 mit Lücke", "s3cret"])
def test_tokens_of_any_letters(token: str) -> None:
    rules = Rules(token)
    ways = [f"Bearer {token}".encode(), b"Basic " + base64.b64encode(f"me:{token}".encode())]
    if token.isascii() or max(token) < "\u0100":
        ways.append(f"Bearer {token}".encode("latin-1"))
    for value in ways:
        assert _status(rules, value) == 200
    assert _status(rules, b"Bearer grun") == 401
    assert _status(rules, b"Bearer " + b"?" * len(token)) == 401


def _status(rules: Rules, authorization: bytes) -> int:
    return ask(rules, {**HOST, "authorization": authorization})[0]


@pytest.mark.parametrize("token", ["", " ", "\n", "\t "])
def test_an_empty_token_is_none(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELIGHT_TOKEN", raising=False)
    assert tokens.read_token(token, None) == (None, False)
    with pytest.raises(SafelightError, match="token"):
        listen("0.0.0.0", 0, tokens.read_token(token, None)[0])


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("of the file\n")
    monkeypatch.setenv("SAFELIGHT_TOKEN", "of the environment")
    assert tokens.read_token("argument", file) == ("of the file", False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokens.read_token(None, Path("~/token")) == ("of the file", False)
    assert tokens.read_token("argument", None) == ("argument", False)
    monkeypatch.setenv("SAFELIGHT_TOKEN", "of the environment")
    assert tokens.read_token(None, None) == ("of the environment", False)
    assert tokens.read_token(None, None) == (None, False)  # children do not inherit it
    file.write_text("auto\n")
    monkeypatch.setenv("SAFELIGHT_TOKEN", "auto")
    for given in (
        {"argument": None, "file": None},
        {"argument": "auto", "file": None},
        {"argument": None, "file": file},
    ):
        token, made = tokens.read_token(**given)
        assert len(token or "") >= 32
        assert made  # else nobody could know it
    file.write_text("\n")
    for bad in (file, tmp_path / "nowhere", tmp_path):
        with pytest.raises(SafelightError):
            tokens.read_token(None, bad)
    for bad in ("two\nlines", " around ", "x" * 2000, "nul\0"):
        with pytest.raises(SafelightError):
            tokens.read_token(bad, None)


def test_the_token_leaves_the_arguments() -> None:
    for given in (["--token", "a b"], ["--token=a b"]):
        kept, token = tokens.without_token(["python", "-m", "safelight", "serve", *given, "-x"])
        assert (kept, token) == (["python", "-m", "safelight", "serve", "-x"], "a b")


def test_wrong_tokens_are_slowed_and_right_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(limits.asyncio, "sleep", sleep)

    async def run() -> None:
        guesses = Guesses()
        guesses.right("1.2.3.4", b"right")
        for _ in range(limits.FREE_GUESSES + 5):
            await guesses.wait("1.2.3.4", b"wrong")
            guesses.wrong("1.2.3.4")
        assert len(slept) == 5
        await guesses.wait("1.2.3.4", b"right")
        await guesses.wait("5.6.7.8", b"wrong")
        assert len(slept) == 5
        for number in range(3 * limits.MAX_KNOWN):
            guesses.wrong(str(number))
        assert len(guesses._wrong) <= limits.MAX_KNOWN

    asyncio.run(run())


def test_a_share_for_each_client() -> None:
    share = Share()
    held = [share.request("a", stream=True) for _ in range(limits.MAX_STREAMS)]
    for one in held:
        one.__enter__()
    with pytest.raises(RefusedError), share.request("a", stream=True):
        pass
    with share.request("a", stream=False), share.request("b", stream=True):
        pass
    share.add("a", limits.MAX_BYTES)
    with pytest.raises(RefusedError):
        share.add("a", 1)
    share.release("a", limits.MAX_BYTES + 1)
    share.add("a", limits.MAX_BYTES)
    for one in held:
        one.__exit__(None, None, None)
    assert not share._requests
    assert not share._streams


@pytest.mark.parametrize(
    ("told", "forwarded", "trusted", "expected"),
    [
        ("10.0.0.1", None, (), "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6", (), "10.0.0.1"),
        ("127.0.0.1", "6.6.6.6", (), "local"),
        ("127.0.0.1", "6.6.6.6, 7.7.7.7", ("127.0.0.1",), "7.7.7.7"),
        ("10.9.8.7", "7.7.7.7", ("192.0.2.1", "10.0.0.0/8"), "7.7.7.7"),
        ("11.9.8.7", "7.7.7.7", ("10.0.0.0/8",), "11.9.8.7"),
        ("::ffff:10.0.0.1", "7.7.7.7", ("10.0.0.1",), "7.7.7.7"),
        ("10.0.0.1", "7.7.7.7", ("::ffff:10.0.0.1",), "7.7.7.7"),
        ("2001:db8::1", "7.7.7.7", ("2001:0DB8:0::1",), "7.7.7.7"),
        ("::1", None, (), "local"),
        ("::ffff:10.0.0.1", None, (), "10.0.0.1"),
        ("2001:db8::1:2:3:4", None, (), "2001:db8::"),
        ("fe80::1%eth0", None, (), "fe80::"),
        ("nonsense", None, (), "unknown"),
    ],
)
def test_addresses(told: str, forwarded: str | None, trusted: Any, expected: str) -> None:
    headers = [] if forwarded is None else [(b"x-forwarded-for", forwarded.encode())]
    proxies = [network(one) for one in trusted]
    assert address_of({"client": (told, 1), "headers": headers}, proxies) == expected
    assert shortened("192.0.2.77") == "192.0.2.0"


@pytest.mark.parametrize(
    "given", ["proxy.lan", "10.0.0.1:80", "*", "", "10.0.0.0/99", "::ffff:0:0/96"]
)
def test_a_proxy_is_an_address_or_a_network(given: str) -> None:
    with pytest.raises(SafelightError, match="expected an address or a network"):
        network(given)


def test_who_sees_whose_jobs() -> None:
    assert Caller("local").sees is None
    assert Caller("10.0.0.1", "admin").sees is None
    ann, bob = Caller("10.0.0.1", "ann"), Caller("10.0.0.1", "bob")
    assert ann.sees == ann.owner != bob.owner
    assert Caller("10.0.0.1").sees == Caller("10.0.0.1").owner != Caller("10.0.0.2").owner
    assert len(Caller("x" * 99, "k" * 99).owner) <= 64


def test_the_log_is_limited_in_rate() -> None:
    spare, passed = Sparing(), 0
    for number in range(10_000):
        record = logging.LogRecord("safelight.http", 20, "", 0, "request", None, None)
        record.created = 5.0 if number < 9_999 else 6.0
        passed += spare.filter(record)
    assert passed == limits.LINES + 1
    assert record.left_out == 9_999 - limits.LINES  # pyright: ignore[reportPossiblyUnbound]


def test_no_delay_and_both_families() -> None:
    with listen("127.0.0.1", 0, None) as listening:
        assert listening.proto == socket.IPPROTO_TCP
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        both = listen("::", 0, "token")
    except SafelightError:
        pytest.skip("no IPv6 here")
    with both:
        assert both.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


@pytest.mark.parametrize(
    ("server", "host", "code"),
    [
        ("::ffff:192.0.2.7", "192.0.2.7:7860", 200),
        ("2001:db8::7", "[2001:db8:0:0::7]:7860", 200),
        ("::ffff:192.0.2.7", "192.0.2.8", 400),
        ("::ffff:127.0.0.1", "127.0.0.1", 200),
        ("::", "[::ffff:127.0.0.1]", 200),
    ],
)
def test_the_host_of_a_dual_stack(server: str, host: str, code: int) -> None:
    assert sites._known_host(host, {"server": (server, 7860)}, frozenset()) is (code == 200)


def test_errors_are_short_and_have_no_path(tmp_path: Path) -> None:
    hide(tmp_path)
    assert (
        public(f"'{tmp_path}/inputs/x.png' cannot be written")
        == "'…/inputs/x.png' cannot be written"
    )
    assert len(public("x" * 10**6)) < 1100
    assert len(clipped("k" * (5 << 20))) <= 101
    assert "\n" not in clipped("a\nb")
