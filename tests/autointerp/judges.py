"""A judge that follows a rule: a latent stands for the token at which it is strongest. And one that misbehaves."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable


def by_rule(prompt: str) -> str:
    """What an honest judge answers whose explanations are single tokens, in quotes of JSON."""
    if "What do the tokens have in common" in prompt:
        marked = re.findall(r"<<(.*?)>>\((\d+)\)", prompt.partition("(strength).")[2], re.S)
        strongest = max((int(n) for _, n in marked), default=0)
        token, _ = Counter(token for token, n in marked if int(n) == strongest).most_common(1)[0]
        return f"the token {json.dumps(token)}"
    token = json.loads(re.search(r'the token ("(?:[^"\\]|\\.)*")', prompt)[1])
    passages = re.findall(r"^Passage (\d+):\n(.*?)(?=\n\n)", prompt, re.S | re.M)
    if "strengths from 1" in prompt.rpartition("Answer with")[2]:
        predicted = {}
        for number, lines in passages:
            listed = (line.partition(" ") for line in lines.split("\n"))
            predicted[number] = {t: 10 for t, _, quoted in listed if json.loads(quoted) == token}
        return f"Here it is:\n```json\n{json.dumps(predicted)}\n```"
    return json.dumps([int(number) for number, text in passages if token in json.loads(text)])


class JudgeServer:
    """An endpoint on this machine. `behave(prompt)` gives what to do instead of an honest answer, or None."""

    def __init__(self, behave: Callable[[str], object] = lambda prompt: None) -> None:
        self.behave = behave
        self.prompts: list[str] = []
        self.keys: list[str | None] = []
        self.arrived: list[float] = []
        self.closing = threading.Event()

    def __enter__(self) -> JudgeServer:
        judge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                judge.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.arrived.append(time.monotonic())
        self.prompts.append(prompt)
        self.keys.append(handler.headers["Authorization"])
        assert handler.path == "/v1/chat/completions"
        what = self.behave(prompt)
        if what == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif what == "cut":
            self.send(handler, 200, b'{"choices": [', {"Content-Length": "999"})
        elif what in ("stream", "headers"):
            self.dribble(handler, b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if what == "stream" else b""))
        elif isinstance(what, tuple):
            status, headers, text = what
            self.send(handler, status, json.dumps({"error": {"message": text}}).encode(), headers)
        elif isinstance(what, bytes):
            self.send(handler, 200, what, {})
        else:
            text = by_rule(prompt) if what is None else what
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            reply = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}
            self.send(handler, 200, json.dumps(reply).encode(), {})

    @staticmethod
    def send(handler, status: int, content: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            handler.send_header(name, value)
        with contextlib.suppress(OSError):  # nobody waits any more
            handler.end_headers()
            handler.wfile.write(content)

    def dribble(self, handler, head: bytes) -> None:
        """A byte now and then, for ever."""
        with contextlib.suppress(OSError):
            handler.wfile.write(head)
            while not self.closing.wait(0.02):
                handler.wfile.write(b"x")
