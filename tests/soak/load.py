"""A server under load by Locust: how long answers take, and what fails. `make load` runs it.

    python tests/soak/load.py --locust PATH [--users 20] [--seconds 180] [--keep 100]

Jobs are drawn and deleted at the same time: --keep is passed to the server, with a grace period of
10 seconds and a look each second. Prints a row for each kind of request.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from serving import Serving

BETWEEN = """
from safelight.server import retention
retention.GRACE, retention.PAUSE = 10.0, 1.0
from safelight.__main__ import main
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--locust", default="locust")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--keep", default="100")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(Path(folder), "--keep", given.keep)
        serving._command = ["-c", BETWEEN]
        with serving:
            serving.ready()
            before = memory(serving.process.pid)
            ended = subprocess.run(
                [
                    *(given.locust, "--headless", "--only-summary", "--csv", f"{folder}/figures"),
                    *("--locustfile", Path(__file__).with_name("locustfile.py")),
                    *("--host", serving.url, "--users", str(given.users), "--spawn-rate", "5"),
                    *("--run-time", f"{given.seconds}s", "--stop-timeout", "30"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ).returncode
            after = memory(serving.process.pid)
            figures = serving.client.get("/metrics").text
            restarts = serving.log().count("the worker ended")
        with Path(folder, "figures_stats.csv").open() as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            sys.stdout.write(
                f"{row['Type']:4} {row['Name']:28} {row['Request Count']:>6} "
                f"failed {row['Failure Count']:>3}  "
                f"{float(row['Requests/s']):6.1f} a second  ms: median {row['50%']:>5}, "
                f"95 % {row['95%']:>5}, 99 % {row['99%']:>6}\n"
            )
        deleted = [line for line in figures.splitlines() if line.startswith("safelight_expired")]
        sys.stdout.write("\n".join(deleted) + "\n")
        sys.stdout.write(f"the server has {before} MB, then {after} MB; {restarts} workers ended\n")
        kept = list((serving.data / "quarantine").rglob("*.png"))
        assert not kept, "files were orphaned"
    sys.exit(ended)


def memory(pid: int) -> int:
    """Return a process's memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


if __name__ == "__main__":
    main()
