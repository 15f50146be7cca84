"""Does a harvest of a streamed dataset that is killed again and again end with the bytes of one that nothing disturbed?

Question: a dataset comes from a server that answers as the hub does, but breaks off in the middle of every other file.
Two workers make the four shards of a set; at random moments, 20 times, one of them is killed and started again. Is the
set the same as that of a single harvest from a server that never breaks off? (The revision is named, so a worker that
starts again reads on from where its shard began.)
Guess: yes. A shard is a function of the settings and its number, and the client asks again.
Command: python experiments/faults/streams.py --out OUT
Answer: yes. 20 kills, 77 answers broken off, 400,000 tokens in four shards: every file is the same, byte for byte.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import tyro
from contents import content
from rich.console import Console

NAME, REVISION = "owner/data", "0123456789abcdef0123456789abcdef01234567"
CONTEXT = 64
HUNG_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Config:
    """What is harvested, and how often its workers are killed."""

    out: Path = Path("build/streams")
    """Folder for the sets, what was said, and result.json."""
    kills: int = 20
    """How often."""
    tokens: int = 400_000
    """Of the set."""
    seed: int = 0
    """Of the moments."""
    smoke: bool = False
    """Two kills, few tokens: does it run?"""


def main(config: Config) -> None:
    """Harvest undisturbed, then with kills from a server that breaks off; compare; write OUT/result.json."""
    if config.smoke:
        config = dataclasses.replace(config, kills=2, tokens=20_000)
    out = config.out.absolute()
    for name in ("alone", "killed", "cache"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    files = {f"train-{i}.jsonl": lines(i, config.tokens) for i in range(3)}
    began = time.monotonic()
    with Hub(files, breaks_off=False) as hub:
        ended(start(config, hub, out, "alone", (0, 1)))
    seconds = time.monotonic() - began
    moments, kills = random.Random(config.seed), 0
    with Hub(files, breaks_off=True) as hub:
        workers = [start(config, hub, out, "killed", (i, 2)) for i in range(2)]
        while kills < config.kills:
            time.sleep(moments.uniform(0, seconds))
            i = moments.randrange(2)
            if workers[i].poll() is None:
                workers[i].kill()
                workers[i].wait()
                kills += 1
                Console(stderr=True).print(f"{kills} of {config.kills} kills", markup=False)
            elif workers[1 - i].poll() is not None:  # all is made: begin again
                shutil.rmtree(out / "killed")
            workers[i] = start(config, hub, out, "killed", (i, 2))
        for i, worker in enumerate(workers):
            worker.wait()
            ended(start(config, hub, out, "killed", (i, 2)))
        n_broken = hub.n_broken
    equal = content(out / "alone") == content(out / "killed")
    result = {"kills": kills, "answers_broken_off": n_broken, "seconds_alone": seconds, "equal": equal}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    Console(width=100).print(result)
    if not equal:
        raise SystemExit("the set is another one")


def lines(seed: int, n_tokens: int) -> bytes:
    """A file of the dataset: records whose texts differ, with more tokens in all files than are asked for."""
    words = random.Random(seed)
    texts = (
        " ".join(f"name{words.randrange(999)} = {words.random()}" for _ in range(40)) for _ in range(n_tokens // 600)
    )
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def start(config: Config, hub: Hub, out: Path, name: str, shard: tuple[int, int]) -> subprocess.Popen:
    """A worker on its shards of the set OUT/name; what it says is added to OUT/name-i.txt."""
    words = ["harvest", f"--out={out / name}", f"--shard={shard[0]}/{shard[1]}", f"--harvest.text=hf:{NAME}@{REVISION}"]
    words += [f"--harvest.tokens={config.tokens}", f"--harvest.context={CONTEXT}"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(out / "cache"), "NO_PROXY": "127.0.0.1"}
    with (out / f"{name}-{shard[0]}.txt").open("ab") as said:
        command = [sys.executable, "-m", "sae_jax.commands.main", *words]
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said)


def ended(worker: subprocess.Popen) -> None:
    """Wait until a worker has ended well."""
    assert worker.wait(HUNG_SECONDS) == 0, f"{worker.args}: exit code {worker.returncode}"


class Hub:
    """A server on this machine that answers for one dataset as the hub does. A context manager."""

    def __init__(self, files: dict[str, bytes], breaks_off: bool) -> None:
        self.files, self.breaks_off, self.n_answers, self.n_broken = files, breaks_off, 0, 0
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.answer(hub)

            do_HEAD = do_GET  # noqa: N815

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, hub: Hub) -> None:
        """The pages that the client of `datasets` asks for."""
        path = self.path.partition("?")[0]
        sizes = [{"type": "file", "path": name, "size": len(data), "oid": REVISION} for name, data in hub.files.items()]
        if re.fullmatch(rf"/api/datasets/{NAME}(/revision/\w+)?", path):
            self._json({"id": NAME, "sha": REVISION, "siblings": [{"rfilename": name} for name in hub.files]})
        elif re.fullmatch(rf"/api/datasets/{NAME}/tree/\w+", path):
            self._json(sizes)
        elif (match := re.fullmatch(rf"/datasets/{NAME}/resolve/\w+/(.+)", path)) and match[1] in hub.files:
            self._file(hub, hub.files[match[1]])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, hub: Hub, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), int(asked[2] or len(data) - 1)) if asked else (0, len(data) - 1)
        part = data[first : last + 1]
        headers = {"ETag": f'"{REVISION}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        hub.n_answers += self.command == "GET"
        is_broken = hub.breaks_off and self.command == "GET" and hub.n_answers % 2 == 1
        hub.n_broken += is_broken
        self._send(206 if asked else 200, part, headers, len(part) // 2 if is_broken else len(part))

    def _send(self, code: int, body: bytes, headers: dict[str, str], n_bytes: int | None = None) -> None:
        """An answer, of which `n_bytes` are sent before the connection is closed."""
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body[:n_bytes])
        except OSError:  # the client was killed
            self.close_connection = True
        self.close_connection |= n_bytes not in (None, len(body))


if __name__ == "__main__":
    main(tyro.cli(Config))
