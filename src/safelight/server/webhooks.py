"""Webhooks: a signed POST that a job has ended, repeated until the receiver accepts it.

The form is that of Standard Webhooks (standardwebhooks.com): the headers webhook-id,
webhook-timestamp and webhook-signature, which is an HMAC-SHA256 of id.timestamp.body.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import random
import socket
import time
from collections import Counter
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from safelight import __version__
from safelight.errors import SafelightError, StorageError
from safelight.server.jobs import Job
from safelight.server.outbox import Notice, Outbox

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger("safelight.server")

WAITS = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
"""Seconds before each further try, as the standard advises; three days in all."""

PATIENCE = 20.0
"""Seconds that a receiver has to answer, including the look-up of its name and the connection."""

MOST, EACH = 16, 2
"""The most webhooks under way, of all owners and of one: slow receivers delay only their own."""

LOOK = 30.0
"""Seconds after which the database is searched for ended jobs that nobody reported."""

MAX_URL = 2000

_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
"""A network's own translation to IPv4 (RFC 8215), which older Pythons count as public."""

_IPV4_INSIDE = [ipaddress.ip_network(one) for one in ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96")]
"""Networks whose addresses end with an IPv4 address that they stand for."""


class BlockedError(Exception):
    """The address is one that webhooks are not sent to."""


def check_url(url: Any, *, private: bool) -> str:
    """Return a webhook's URL. Raises SafelightError for a URL that nothing can be sent to.

    private: whether addresses of this machine and its networks are allowed. A host's name is looked
    up only when the webhook is sent.
    """

    def wrong(why: str) -> SafelightError:
        return SafelightError(f"webhook must be an http or https URL: {why}", field="webhook")

    if not isinstance(url, str) or len(url) > MAX_URL or not url.isascii() or not url.isprintable():
        raise wrong(f"expected at most {MAX_URL} ASCII characters")
    try:
        parts = urlsplit(url)
        _ = parts.port
        host = parts.hostname
    except ValueError:
        raise wrong("this one cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or " " in url:
        raise wrong("as https://example.com/done")
    if parts.username is not None or parts.password is not None:
        raise wrong("without a name and a password in it")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if "[" in parts.netloc:
            raise wrong("this one cannot be read") from None
        return url  # it has a name
    if not (private or is_public(address)):
        raise wrong("addresses of private networks are not served (--webhooks-to-private)")
    return url


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is public, and the IPv4 address that it stands for, if any, too."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _LOCAL_NAT64:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if any(address in network for network in _IPV4_INSIDE):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


def look_up(host: str, port: int, threads: Executor | None = None) -> asyncio.Future[list[Any]]:
    """Begin to look up a host's addresses in a thread, which nothing can end."""
    call = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    return asyncio.get_running_loop().run_in_executor(threads, call)


async def resolve(
    host: str, port: int, *, private: bool, found: asyncio.Future[list[Any]] | None = None
) -> list[str]:
    """Return the addresses of a host. Raises BlockedError if one of them is not allowed.

    found: its look-up, if it was begun; it goes on if the caller is cancelled. The caller connects
    to one of these checked addresses: a second look-up of the name could lead elsewhere (DNS
    rebinding).
    """
    entries = await asyncio.shield(found or look_up(host, port))
    addresses = list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in entries))
    if not private and not all(is_public(ipaddress.ip_address(one)) for one in addresses):
        raise BlockedError
    return addresses


def body_of(job: Job) -> bytes:
    """Return the body of a job's webhook: how the job ended, and where its pictures are.

    It has no word of the prompt, which warnings and errors may quote.
    """
    secret = {"settings", "warnings", "error"}
    told = job.model_dump(mode="json", exclude={*secret, "progress", "pictures"})
    told["pictures"] = [
        {**one.model_dump(mode="json", exclude={"recipe"}), "url": f"/api/pictures/{one.id}"}
        for one in job.pictures
    ]
    at = (job.finished_at or job.created_at).isoformat()
    return json.dumps({"type": f"job.{job.status}", "timestamp": at, "data": told}).encode()


def signed(job: Job, body: bytes, secret: str, now: float) -> dict[str, str]:
    """Return the headers of a webhook. Its id is the same at each try."""
    ended = job.finished_at or job.created_at
    name, at = f"msg_{job.id}_{ended.timestamp():.6f}".replace(".", "_"), str(int(now))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mark = hmac.new(key, f"{name}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": name,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(mark).decode()}",
        "content-type": "application/json",
        "user-agent": f"Safelight/{__version__}",
    }


class Webhooks:
    """Sends the webhooks of an outbox. For use in the event loop.

    private: whether they may go to addresses of this machine and its networks. Failures are logged
    without the URL, which may contain a secret.
    """

    def __init__(self, outbox: Outbox, *, private: bool = False) -> None:
        self._outbox, self.private = outbox, private
        self._ended: set[str] = set()
        self._wake = asyncio.Event()
        self._sending: dict[asyncio.Task[None], str] = {}
        # A slow look-up must not take a thread of the server's, which are few.
        self._threads = ThreadPoolExecutor(MOST, "names")
        self._client: httpx2.AsyncClient | None = None
        self._task: asyncio.Task[None] | None = None
        self.sent: Counter[str] = Counter()

    def start(self) -> None:
        """Begin, within the event loop."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """End; webhooks under way are sent again after the next start."""
        tasks = [task for task in (self._task, *self._sending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            await self._client.aclose()

    def ended(self, job_id: str) -> None:
        """Note that a job may have ended. Unreported ends are found within LOOK seconds."""
        self._ended.add(job_id)
        self._wake.set()

    async def _run(self) -> None:
        look = 0.0
        while True:
            self._wake.clear()
            try:
                now = await asyncio.to_thread(self._outbox.now)
                if time.monotonic() >= look:
                    while await asyncio.to_thread(self._outbox.ended, now, None):
                        pass
                    look = time.monotonic() + LOOK
                elif self._ended:
                    ids, self._ended = list(self._ended)[:100], set(list(self._ended)[100:])
                    await asyncio.to_thread(self._outbox.ended, now, ids)
                await self._begin(now)
            except StorageError:  # tried again
                look = 0.0
            except Exception:  # this task must go on: no other one sends
                log.exception("webhooks cannot be sent")
            wait = 0.0 if self._ended else 1.0
            # Python 3.11's wait_for loses a cancellation that comes at the same moment.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait or 0.01):
                    await self._wake.wait()

    async def _begin(self, now: float) -> None:
        """Begin to send the webhooks that are due, up to the most under way at once."""
        while len(self._sending) < MOST:
            counts = Counter(self._sending.values())
            busy = [owner for owner, count in counts.items() if count >= EACH]
            until = now + 3 * PATIENCE
            notice = await asyncio.to_thread(self._outbox.next_notice, now, busy, until)
            if notice is None:
                return
            task = asyncio.ensure_future(self._send(notice))
            self._sending[task] = notice.owner
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._sending.pop(task, None)
        self._wake.set()

    async def _send(self, notice: Notice) -> None:
        looks: list[asyncio.Future[Any]] = []
        try:
            await self._try(notice, looks)
            if looks:  # a slow look-up keeps its thread, and so its owner's place
                await asyncio.wait(looks)
        finally:
            for look in looks:
                look.cancel()

    async def _try(self, notice: Notice, looks: list[asyncio.Future[Any]]) -> None:
        """Send a webhook and store the result. looks: gets the look-up of its name."""
        status = await self._status(notice, looks)
        over = notice.tries > len(WAITS)
        taken = status.isdigit() and 200 <= int(status) < 300
        self.sent["taken" if taken else "refused"] += 1
        wait = None
        if not (taken or over or status in ("410", "blocked")):
            wait = WAITS[notice.tries - 1] * random.uniform(0.9, 1.1)
        if not taken:
            log.warning(
                "a webhook was not taken (%s)%s",
                status,
                "" if wait else ": it is given up",
                extra={"job": notice.job.id},
            )
        with contextlib.suppress(StorageError):  # it is sent once more
            now = await asyncio.to_thread(self._outbox.now)
            due = None if wait is None else now + wait
            await asyncio.to_thread(self._outbox.noticed, notice, now, due)

    async def _status(self, notice: Notice, looks: list[asyncio.Future[Any]]) -> str:
        """Send a webhook; return the status of the answer, or what prevented one."""
        try:
            async with asyncio.timeout(PATIENCE):
                return str(await self._post(notice, looks))
        except BlockedError:
            return "blocked"
        except TimeoutError:
            return "no answer"
        except StorageError:
            return "no secret"
        except Exception as error:  # of the look-up, the connection, TLS or the answer
            return type(error).__name__

    async def _post(self, notice: Notice, looks: list[asyncio.Future[Any]]) -> int:
        import httpx2

        if self._client is None:
            # Connections are not kept: several names may share one address.
            self._client = await asyncio.to_thread(
                lambda: httpx2.AsyncClient(
                    trust_env=False,
                    follow_redirects=False,
                    timeout=PATIENCE,
                    limits=httpx2.Limits(max_keepalive_connections=0),
                )
            )
        secret = await asyncio.to_thread(self._outbox.webhook_secret, notice.owner)
        url = httpx2.URL(check_url(notice.url, private=self.private))
        host = url.raw_host.decode("ascii").strip("[]")
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        looks.append(look_up(host, port, self._threads))
        addresses = await resolve(host, port, private=self.private, found=looks[0])
        body = body_of(notice.job)
        headers = {"host": url.netloc.decode("ascii"), "connection": "close"}
        now = await asyncio.to_thread(self._outbox.now)  # this machine's clock may be wrong
        headers |= signed(notice.job, body, secret, now)
        address = addresses[(notice.tries - 1) % len(addresses)]  # another address at the next try
        # The certificate must be valid for the name, not for the address.
        request = self._client.build_request(
            "POST",
            url.copy_with(host=address),
            headers=headers,
            content=body,
            extensions={"sni_hostname": host},
        )
        answer = await self._client.send(request, stream=True)
        await answer.aclose()  # only the status is read
        return answer.status_code
