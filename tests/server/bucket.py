"""An object store to test against: moto's server, which speaks S3."""

from __future__ import annotations

import itertools
import logging
import socket
from typing import Any

import pytest

SECRET = "a-secret-that-nobody-should-read"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "an-access-key",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Bucket:
    """An S3 on a free port, with a bucket of its own. It can be made unreachable for a while."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
        self._kind: Any = ThreadedMotoServer
        self._server = self._kind("127.0.0.1", 0, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self._silent: socket.socket | None = None
        self._count = itertools.count()
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{self._port}")
        import s3fs

        self.fs = s3fs.S3FileSystem(use_listings_cache=False)
        self.fs.mkdir("pictures-of-all")

    def url(self) -> str:
        """Return the URL of an empty place in the bucket."""
        return f"s3://pictures-of-all/{next(self._count)}"

    def leave(self, *, silent: bool = False) -> None:
        """Become unreachable. silent: whether it still accepts connections, but does not answer."""
        self._server.stop()
        if silent:
            self._silent = socket.create_server(("127.0.0.1", self._port))

    def come_back(self) -> None:
        """Become reachable again, with its old content."""
        if self._silent is not None:
            self._silent.close()
            self._silent = None
        self._server = self._kind("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def names(self, url: str) -> set[str]:
        root = url.removeprefix("s3://")
        return {name.removeprefix(f"{root}/") for name in self.fs.find(root)}
