"""A server that takes in one job and kills itself at one of its writes; test_killed.py runs it."""

import os
import signal
import sys
from pathlib import Path

import pytest
from inside import Inside
from test_storage import QUICK, Fault, png


class Kill(Fault):
    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    strike_database = strike


def main(folder: str, site: str) -> None:
    with Inside(Path(folder), dtype="float32", exact=True) as server:
        Kill(pytest.MonkeyPatch(), site, 0)
        answer = server.ask("POST", "/api/jobs", QUICK | {"seed": 7, "image": png()})
        (Path(folder) / "acknowledged").open("a").write(answer.json()["id"] + "\n")
        server.finished(answer.json()["id"])


if __name__ == "__main__":
    main(*sys.argv[1:])
