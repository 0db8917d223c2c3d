"""Serving without a network: test_network.py runs it where only loopback exists."""

import base64
import fcntl
import io
import socket
import struct
import sys
from pathlib import Path

from PIL import Image
from serving import Serving

SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def main(folder: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    with Serving(Path(folder)) as server:
        server.ready()
        out = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(out, "PNG")
        picture = base64.b64encode(out.getvalue()).decode()
        wish = {"prompt": "a cat", "steps": 2}
        job = server.finished(server.submit(**wish, sampler="euler", image=picture))
        assert job["status"] == "succeeded", job
        for path, body in (
            ("/v1/images/generations", wish),
            ("/sdapi/v1/txt2img", wish),
            ("/sdapi/v1/img2img", wish | {"init_images": [picture]}),
        ):
            answer = server.client.post(path, json=body)
            assert answer.status_code == 200, answer.text
        answer = server.client.post("/api/jobs", json=wish | {"image": "https://example.org/a.png"})
        assert answer.status_code == 422, answer.text
        assert '"error"' not in server.log(), server.log()
    sys.stdout.write("all of it worked\n")


if __name__ == "__main__":
    main(sys.argv[1])
