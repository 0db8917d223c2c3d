"""The checks before the routes: tokens, hosts, origins, sizes, slowness."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.errors import SafelightError
from safelight.server import bodies, entrance
from safelight.server.callers import network
from safelight.server.guard import Guard, Rules
from safelight.server.limits import Guesses
from safelight.server.listening import host_name, origin_of
from safelight.server.wording import route_of

TOKEN = "s3cret"
SILENCE = b"nothing comes"
BEARER = {"authorization": f"Bearer {TOKEN}"}


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    """Read the whole body and answer with its length."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(
    rules: Rules,
    headers: dict[str, Any] | list[tuple[str, Any]],
    *,
    method: str = "GET",
    path: str = "/api/jobs",
    body: list[bytes] | None = None,
    app: Any = _echo,
    take: Any = None,
    query: bytes = b"",
    client: str = "",
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer."""
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query,
        "server": ("127.0.0.1", 7860),
        "client": (client, 1),
        "headers": [(k.encode(), v if isinstance(v, bytes) else v.encode()) for k, v in pairs],
    }
    parts = list(body or [b""])
    sent: list[Any] = []

    async def receive() -> Any:
        part = parts.pop(0)
        if part is SILENCE:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        if take is not None:
            await take()
        sent.append(message)

    asyncio.run(Guard(app, rules)(scope, receive, send))
    assert not sent[-1].get("more_body", False)  # uvicorn cuts an answer that has no end
    start = sent[0]
    found = {k.decode(): v.decode() for k, v in start["headers"]}
    return start["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def status(rules: Rules, headers: Any, **how: Any) -> int:
    return ask(rules, headers, **how)[0]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD"])
@pytest.mark.parametrize(
    "path", ["/api/jobs", "/v1/models", "/sdapi/v1/options", "/metrics", "/docs", "/nowhere"]
)
def test_without_the_token_nothing_but_liveness(method: str, path: str) -> None:
    rules = Rules(TOKEN)
    host = {"host": "127.0.0.1:7860"}
    code, headers, _ = ask(rules, host, method=method, path=path)
    assert (code, headers["www-authenticate"]) == (401, "Bearer")
    for wrong in ("", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crets", TOKEN, "Basic s3cret"):
        assert status(rules, {**host, "authorization": wrong}, method=method, path=path) == 401
    assert status(rules, {**host, **BEARER}, method=method, path=path) == 200
    assert status(rules, host, method=method, path="/healthz") == 200


def test_a_token_as_the_password_of_basic() -> None:
    value = base64.b64encode(b"anyone:" + TOKEN.encode()).decode()
    headers = {"host": "localhost", "authorization": f"Basic {value}"}
    assert status(Rules(TOKEN), headers) == 200


def test_the_cookie_among_others() -> None:
    """Cookies are shared by all ports: those of every server on this machine are sent along."""
    mine = entrance.set_cookie(TOKEN, "localhost").decode().partition(";")[0]
    rules, host = Rules(TOKEN), {"host": "localhost"}
    for others in ("", 'j={"a": 1}; ', "a[]=1; ", "expires=1; ", "safelight=of another; "):
        assert status(rules, {**host, "cookie": others + mine}) == 200
    for wrong in ("", "safelight=", mine[:-1], f"{mine}0", f"x{mine}", mine.replace("=", "=%")):
        assert status(rules, {**host, "cookie": wrong}) == 401


@pytest.mark.parametrize("host", ["localhost:7860", "[::1]:7860", "localhost"])
def test_a_cookie_of_a_server_on_another_port_is_no_guess(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = (
        entrance.set_cookie(token, at).decode().partition(";")[0]
        for token, at in ((TOKEN, host), ("another", "localhost:7861"))
    )
    monkeypatch.setattr(Guesses, "wrong", lambda *_: pytest.fail("it counts as a guess"))
    assert status(Rules(TOKEN), {"host": host, "cookie": theirs}) == 401
    assert status(Rules(TOKEN), {"host": host, "cookie": f"{theirs}; {mine}"}) == 200


@pytest.mark.parametrize("path", ["/", "/studio"])
def test_a_browser_without_the_token_gets_the_form(path: str) -> None:
    code, headers, body = ask(Rules(TOKEN), {"host": "localhost"}, path=path)
    assert (code, headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert body == entrance.page()


def test_the_form_that_asks_for_the_token() -> None:
    for body in (b"", b"token=", b"token=wrong", b"a&" * 99, b"token=%ff", b"x" * 9999, b"=" * 99):
        code, headers, _ = ask(
            Rules(TOKEN), {"host": "localhost"}, method="POST", path=entrance.ENTER, body=[body]
        )
        assert (code, "set-cookie" in headers) == (401, False)
    code, headers, _ = ask(
        Rules(TOKEN),
        {"host": "localhost"},
        method="POST",
        path=entrance.ENTER,
        body=[b"token=s3cret"],
    )
    assert (code, headers["location"]) == (303, "/")


def test_two_authorizations_are_none() -> None:
    twice = [("host", "localhost"), *[("authorization", f"Bearer {TOKEN}")] * 2]
    assert status(Rules(TOKEN), twice) == 401


GOOD_HOSTS = ["127.0.0.1", "127.0.0.1:7860", "localhost:1", "[::1]:7860", "LOCALHOST", "pics.lan"]
BAD_HOSTS = [
    "",
    "evil.example",
    "evil.example:7860",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "user@127.0.0.1",
    "127.0.0.1/x",
    "127.0.0.1:99999999",
    "[::1",
    "169.254.169.254",
    "0x7f.1",
    "127.0.0.1 evil",
]


def test_hosts() -> None:
    rules = Rules(hosts=frozenset({"pics.lan"}))
    for host in GOOD_HOSTS:
        assert status(rules, {"host": host}) == 200, host
    for host in BAD_HOSTS:
        assert status(rules, {"host": host}) == 400, host
    assert status(rules, {}) == 400
    assert status(rules, [("host", "localhost"), ("host", "evil.example")]) == 400


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("Studio.Example.com", "studio.example.com"),
        ("studio.example.com.", "STUDIO.example.com:8080"),
        ("my_box", "my_box"),
        ("2001:DB8:0::1", "[2001:db8::1]:7860"),
    ],
)
def test_a_name_that_is_allowed_is_known_in_any_spelling(given: str, host: str) -> None:
    rules = Rules(hosts=frozenset({host_name(given)}))
    assert status(rules, {"host": host}) == 200


@pytest.mark.parametrize(
    "given",
    ["http://a.example", "a.example:8080", "*.example", "a.example/x", "", ".", "a b", "ä.de"],
)
def test_what_is_no_name_is_not_allowed(given: str) -> None:
    with pytest.raises(SafelightError, match="expected a name or an address alone"):
        host_name(given)


@pytest.mark.parametrize(
    ("told", "trusted", "scheme"),
    [
        ("https", "127.0.0.0/8", "https"),
        ("http, https", "127.0.0.1", "https"),
        ("https", "10.0.0.1", "http"),
        ("javascript", "127.0.0.1", "http"),
    ],
)
def test_links_have_the_scheme_that_a_trusted_proxy_tells(
    told: str, trusted: str, scheme: str
) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("scheme", "http"))
        await _echo(scope, receive, send)

    headers = {"host": "localhost", "x-forwarded-proto": told}
    ask(Rules(proxies=[network(trusted)]), headers, app=app, client="127.0.0.1")
    assert seen == [scheme]


METHODS = ["GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"]
ORIGINS = {
    None: True,
    "http://localhost:7860": True,
    "http://evil.example": False,
    "null": False,
    "http://localhost:7861": False,
    "http://localhost": False,
    "file://": False,
    "http://localhost:7860.evil.example": False,
}
SITES = {None: True, "none": True, "same-origin": True, "same-site": False, "cross-site": False}


@pytest.mark.parametrize(
    ("method", "origin", "site"), list(itertools.product(METHODS, ORIGINS, SITES))
)
def test_origins_and_sites(method: str, origin: str | None, site: str | None) -> None:
    headers = {"host": "localhost:7860"}
    if origin is not None:
        headers["origin"] = origin
    if site is not None:
        headers["sec-fetch-site"] = site
    expected = 200 if ORIGINS[origin] and SITES[site] else 403
    code, answer, _ = ask(Rules(), headers, method=method)
    assert code == expected
    assert "access-control-allow-origin" not in answer


PAGE = "http://localhost:3000"
OURS = {"host": "localhost:7860"}
SHARED = Rules(TOKEN, origins=frozenset({PAGE}))
PREFLIGHT = {
    **OURS,
    "sec-fetch-site": "same-site",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,x-stainless-os",
}


def test_a_page_of_an_allowed_origin_may_ask() -> None:
    code, headers, _ = ask(SHARED, {**PREFLIGHT, "origin": PAGE}, method="OPTIONS")
    assert (code, headers["access-control-allow-origin"], headers["vary"]) == (204, PAGE, "Origin")
    assert headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert {"GET", "POST", "DELETE"} <= set(headers["access-control-allow-methods"].split(", "))
    asked = {**OURS, "origin": PAGE, "sec-fetch-site": "same-site"}
    for method in ("GET", "POST", "DELETE"):
        for given, expected in (({}, 401), (BEARER, 200)):
            code, headers, _ = ask(SHARED, {**asked, **given}, method=method)
            assert (code, headers["access-control-allow-origin"]) == (expected, PAGE)
            assert headers["access-control-expose-headers"] == "*"
            assert "access-control-allow-credentials" not in headers
            assert "access-control-allow-headers" not in headers
    _, headers, _ = ask(SHARED, {**OURS, **BEARER})
    assert ("access-control-allow-origin" in headers, headers["vary"]) == (False, "Origin")


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost:3001", "https://localhost:3000", f"{PAGE}/", f"{PAGE}.evil.example"),
        *("HTTP://LOCALHOST:3000", "http://localhost", "null", "file://", f"{PAGE} null", ""),
    ],
)
def test_origins_are_compared_exactly(origin: str) -> None:
    for method in ("OPTIONS", "GET", "POST"):
        code, headers, _ = ask(SHARED, {**PREFLIGHT, **BEARER, "origin": origin}, method=method)
        assert code == 403
        assert "access-control-allow-origin" not in headers
    twice = [*OURS.items(), ("origin", PAGE), ("origin", PAGE)]
    assert status(SHARED, twice) == 403


@pytest.mark.parametrize("origin", ["null", "file://"])
def test_pages_without_a_site_only_if_they_are_allowed(origin: str) -> None:
    rules = Rules(origins=frozenset({origin}))
    assert status(rules, {**OURS, "origin": origin, "sec-fetch-site": "cross-site"}) == 200


def test_a_cookie_lets_no_page_of_another_origin_in() -> None:
    cookie = entrance.set_cookie(TOKEN, OURS["host"]).decode().partition(";")[0]
    for method in ("GET", "POST", "DELETE"):
        asked = {**OURS, "cookie": cookie}
        assert status(SHARED, asked, method=method) == 200
        assert status(SHARED, {**asked, "origin": "http://localhost:7860"}, method=method) == 200
        assert status(SHARED, {**asked, "origin": PAGE}, method=method) == 401


def test_an_allowed_origin_makes_no_other_host_known() -> None:
    assert status(SHARED, {"host": "evil.example", "origin": PAGE, **BEARER}) == 400


def test_what_the_page_s_own_server_says_of_origins_does_not_count() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        allowed = [(b"access-control-allow-credentials", b"true")]
        await send({"type": "http.response.start", "status": 200, "headers": allowed})
        await send({"type": "http.response.body", "body": b""})

    for origin in ({}, {"origin": PAGE}):
        _, headers, _ = ask(SHARED, {**OURS, **BEARER, **origin}, app=app)
        assert "access-control-allow-credentials" not in headers


def test_a_refusal_says_what_would_allow_it() -> None:
    _, _, body = ask(Rules(), {**OURS, "origin": PAGE})
    assert f"safelight serve --allow-origin {PAGE} allows" in body.decode()
    _, _, body = ask(Rules(), {"host": "pics.lan:7860"})
    assert "safelight serve --allow-host pics.lan allows" in body.decode()
    for host in ({}, {"host": ""}, {"host": "a/b"}, {"host": "a:b"}):
        _, _, body = ask(Rules(), host)
        assert "the Host must be one name or address" in body.decode()
    _, _, body = ask(SHARED, {**OURS, "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"})
    assert "that name an origin, and this one does not" in body.decode()
    _, _, body = ask(Rules(), {**OURS, "origin": "x" * 9999})
    assert len(json.loads(body)["detail"]) < 250


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://[v1.x]", "//", "http://"])
def test_an_origin_that_cannot_be_read_is_refused(origin: str) -> None:
    assert status(Rules(), {**OURS, "origin": origin}) == 403


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("http://localhost:3000", PAGE),
        ("HTTPS://Chat.Example", "https://chat.example"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://localhost:80", "http://localhost"),
        ("https://[::1]:443", "https://[::1]"),
        ("https://chat.example:80", "https://chat.example:80"),
        ("app://localhost:80", "app://localhost:80"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("null", "null"),
        ("file://", "file://"),
    ],
)
def test_an_origin_is_known_in_any_spelling(given: str, origin: str) -> None:
    assert origin_of(given) == origin


@pytest.mark.parametrize(
    "given",
    [
        *("*", "", "localhost:3000", f"{PAGE}/", "http://", f"{PAGE},x"),
        *("http://localhost:", "http://localhost:x", "http://[::1", "http://:80"),
    ],
)
def test_what_is_no_origin_is_not_allowed(given: str) -> None:
    with pytest.raises(SafelightError, match="expected an origin as browsers send it"):
        origin_of(given)


def test_a_link_from_another_site_may_lead_here() -> None:
    headers = {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert status(Rules(), headers) == 200
    assert status(Rules(), headers, method="POST") == 403


@pytest.mark.parametrize(
    ("path", "base", "route", "told"),
    [
        ("/api/jobs/7", "", "/api/jobs/{job_id}", "/api/jobs/{job_id}"),
        ("/studio/config", "/studio", "/config", "/studio/config"),
        ("/static-offline-docs/a.css", "/static-offline-docs", None, "/static-offline-docs"),
        ("/openapi.json", "", None, "/openapi.json"),
        ("/studio/", "", None, "/studio/"),
        ("/nothing", "", None, ""),
    ],
)
def test_figures_name_a_route_by_its_pattern(
    path: str, base: str, route: str | None, told: str
) -> None:
    found = {} if route is None else {"route": SimpleNamespace(path=route)}
    assert route_of({"path": path, "root_path": base, **found}) == told


def test_what_is_served_is_inert() -> None:
    _, headers, _ = ask(Rules(), {"host": "localhost"})
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert len(headers["x-request-id"]) == 16


def test_large_bodies_are_refused_before_and_while_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY", 1000)
    host = {"host": "localhost"}
    assert status(Rules(), {**host, "content-length": "1001"}, method="POST") == 413
    assert status(Rules(), {**host, "content-length": "x"}, method="POST") == 400
    assert status(Rules(), host, method="POST", body=[b"x" * 600] * 2) == 413
    assert ask(Rules(), host, method="POST", body=[b"x" * 500] * 2)[2] == b"1000"


def test_a_client_that_sends_too_slowly_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SLOW", 0.05)
    code, _, body = ask(Rules(), {"host": "localhost"}, method="POST", body=[b"a", SILENCE])
    assert code == 408
    assert b"too slow" in body


def test_a_client_that_never_reads_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SLOW", 0.05)

    async def never() -> None:
        await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        ask(Rules(), {"host": "localhost"}, take=never)
