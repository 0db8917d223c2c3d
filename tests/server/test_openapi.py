"""The OpenAPI document describes what the routes do.

schemathesis sends requests that it allows, and requests that it does not.
"""

import subprocess
import sys
from pathlib import Path

from serving import Serving


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with Serving(tmp_path, "--exact") as server:  # no time for measuring rows
        server.ready()
        done = subprocess.run(
            [
                *(
                    Path(sys.executable).parent / "schemathesis",
                    "run",
                    f"{server.url}/openapi.json",
                ),
                *("--max-examples", "3", "--phases", "fuzzing", "--seed", "1", "--no-color"),
                # Not all that a picture must be can be said in a schema.
                *("--exclude-checks", "positive_data_acceptance"),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout[-3000:]
