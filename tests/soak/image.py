"""The steps of deploy/Dockerfile, run in a clean Debian, and the image, run without a network.

    python tests/soak/image.py [--debian bookworm] [--volume PATH ...] [--keep FOLDER]

Needs root, and Debian's packages buildah, debootstrap and bubblewrap. debootstrap makes the base
image, so that no registry of images is used. --volume: a file of this machine that pip needs to
find its packages, such as /etc/pip.conf, also as pip.conf:/etc/pip.conf for another path there; it
exists while the image is built, and is not in it. --keep: a folder that keeps base and layers for
the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
BASE = "docker.io/library/debian:12-slim"

CHECK = """
import io, json, os, pathlib, signal, subprocess, sys, time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

command, health = json.loads(sys.argv[1]), json.loads(sys.argv[2])
try:
    pathlib.Path("/opt/safelight/written").write_text("x")
except OSError:
    pass
else:
    sys.exit("the system's files can be written")
assert os.getuid() == 10001, os.getuid()
began = time.monotonic()
server = subprocess.Popen(command)

def ask(path, body=None):
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    return urlopen(Request("http://127.0.0.1:7860" + path, data, headers), timeout=60).read()

while subprocess.run(health, stderr=subprocess.DEVNULL).returncode:
    assert server.poll() is None, "the server ended"
    time.sleep(0.2)
print("healthy after", round(time.monotonic() - began, 1), "s", flush=True)
settings = {"prompt": "a red apple", "steps": 4, "sampler": "euler"}
job = json.loads(ask("/api/jobs", settings))
while job["status"] in ("queued", "running"):
    time.sleep(0.2)
    job = json.loads(ask("/api/jobs/" + job["id"]))
assert job["status"] == "succeeded", job
assert ask("/api/pictures/" + job["pictures"][0]["id"])[:4] == bytes([137]) + b"PNG"
while True:
    try:
        assert b"gradio" in ask("/studio").lower()
        break
    except HTTPError as error:  # the page is still being made
        assert error.code == 503, error
        time.sleep(0.5)
print("the page after", round(time.monotonic() - began, 1), "s", flush=True)
print("a picture after", round(time.monotonic() - began, 1), "s", flush=True)
server.send_signal(signal.SIGTERM)
assert server.wait(30) == 0
print("SIGTERM: exit code 0", flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debian", default="bookworm")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap", "bwrap") if shutil.which(name) is None]
    if missing or os.geteuid():
        sys.exit(f"image.py needs root, and {', '.join(missing) or 'nothing else'}")
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        work(given.keep.resolve(), given)
        return
    with tempfile.TemporaryDirectory() as folder:
        work(Path(folder), given)


def work(folder: Path, given: Any) -> None:
    def buildah(*arguments: str | Path) -> str:
        stored = ("--root", folder / "store", "--runroot", folder / "run")
        done = subprocess.run(
            ["buildah", *stored, *arguments], stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    root = folder / "debian"
    if not (root / "etc/debian_version").exists() or (root / "debootstrap").exists():
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", given.debian, root, given.mirror]
        subprocess.run(command, check=True, stdout=sys.stderr)
        # As in Debian's image: dpkg does not sync each file.
        (root / "etc/dpkg/dpkg.cfg.d/speed").write_text("force-unsafe-io\n")
    if "debian" not in buildah("images", "--format", "{{.Name}}"):
        base = buildah("from", "scratch")
        buildah("add", base, root, "/")
        buildah("commit", "--rm", base, BASE)
    began = time.monotonic()
    volumes = []
    for path in given.volume:
        place, _, name = path.partition(":")
        volumes += ["--volume", f"{place}:{name or place}:ro"]
    buildah(
        *("bud", "--isolation", "chroot", "--pull=never", "--format", "docker", "--layers"),
        *(*volumes, "--file", REPOSITORY / "deploy/Dockerfile", "--tag", "safelight", REPOSITORY),
    )
    sys.stdout.write(f"built in {time.monotonic() - began:.0f} s\n")
    about = json.loads(buildah("inspect", "--type", "image", "safelight"))["Docker"]["config"]
    assert about["User"] == "10001", about
    assert about["Healthcheck"]["Test"][0] == "CMD", about
    container = buildah("from", "--pull-never", "safelight")
    try:
        run(Path(buildah("mount", container)), about, folder)
    finally:
        buildah("rm", container)


def run(root: Path, about: dict[str, Any], folder: Path) -> None:
    """Run the image's command as its user, without a network, on files that it cannot write."""
    size = subprocess.run(["du", "-s", "--bytes", root], capture_output=True, text=True)
    sys.stdout.write(f"the image has {int(size.stdout.split()[0]) / 1e9:.2f} GB\n")
    with tempfile.TemporaryDirectory(dir=folder) as data:
        environment = [part for one in about["Env"] for part in ("--setenv", *one.split("=", 1))]
        subprocess.run(
            [
                *("bwrap", "--unshare-all", "--uid", about["User"], "--gid", about["User"]),
                *("--clearenv", *environment, "--setenv", "SAFELIGHT_TOKEN", "secret"),
                *("--setenv", "HOME", "/home/safelight"),
                *("--ro-bind", root, "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
                *("--tmpfs", "/home/safelight", "--bind", data, "/data", "--chdir", "/"),
                *("--die-with-parent", "python3", "-c", CHECK),
                json.dumps([*about["Entrypoint"], *about["Cmd"]]),
                json.dumps(about["Healthcheck"]["Test"][1:]),
            ],
            check=True,
        )


if __name__ == "__main__":
    main()
