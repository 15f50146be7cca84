"""An S3 on this machine (moto), behind a door that counts requests, fails some, slows all, and can kill who asks."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

BUCKET = "bucket"
_HOP = ("connection", "transfer-encoding", "keep-alive", "date", "server", "content-length")


class Door:
    """A proxy before the emulator. What passes it is written down; `fails` is a share of the requests."""

    def __init__(self, port: int) -> None:
        """`port`: of the emulator."""
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.fails, self.slow, self.before = 0.0, 0.0, None
        self._chance, self._lock = random.Random(0), threading.Lock()
        door = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with door._lock:
                    door.requests.append((self.command, self.path))
                    number, fails = len(door.requests), door._chance.random() < door.fails
                if door.before is not None:
                    door.before(number)
                time.sleep(door.slow)
                if fails:  # half of them after it was done: the client cannot tell
                    if number % 2:
                        self.forward(body)
                    self.reply(503, [], b"<Error><Code>SlowDown</Code></Error>")
                else:
                    self.reply(*self.forward(body))

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

            def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
                connection.close()
                return answer.status, [*headers, ("Content-Length", length)], data

            def reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                with contextlib.suppress(OSError):  # who asked was killed
                    self.send_response(status)
                    for name, value in headers or [("Content-Length", str(len(data)))]:
                        self.send_header(name, value)
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # of those who were killed
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
        }

    @contextlib.contextmanager
    def kills(self, at: int, process: Callable[[], subprocess.Popen]) -> Iterator[None]:
        """Kill a process when it asks for the `at`-th time from now on, before the request is carried out."""
        first = len(self.requests)

        def look(number: int) -> None:
            if number == first + at:
                os.kill(process().pid, signal.SIGKILL)

        self.before = look
        try:
            yield
        finally:
            self.before = None

    def close(self) -> None:
        """End the door."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def emulator() -> Iterator[int]:
    """The port of an S3 with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                url = f"http://127.0.0.1:{port}/{BUCKET}"
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10)
                break
            except OSError:
                assert time.monotonic() < until, "the emulator does not start"
                assert process.poll() is None, "the emulator has ended"
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()
