"""A server that speaks as much of the hub's protocol as its client asks for: look up, download, upload, commit.

Repositories are dicts in memory; faults are set by the tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the-secret-of-this-test"


@dataclass
class Repository:
    private: bool = False
    licence: str | None = None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def sha(self, branch: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        return next((name for name in self.branches if revision in (name, self.sha(name))), None)


class StubHub(ThreadingHTTPServer):
    """`repositories` is what there is; `faults` {part of a path: a status, or "cut"} what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, int | str] = {}
        self.uploads: dict[str, bytes] = {}  # large files, by sha256
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((method, path))
        fault = next((fault for part, fault in self.server.faults.items() if part in f"{method} {path}"), None)
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half of it")
            self.close_connection = True
            return
        if isinstance(fault, int):
            return self.say(fault, {"error": "as the test wants it"})
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.say(200, {"warnings": [], "errors": []})
        if path.startswith("/upload/"):
            self.server.uploads[hashlib.sha256(body).hexdigest()] = body
            return self.say(200, {})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.is_known()):
            return self.say(404 if self.is_known() else 401, {"error": "?"}, {"X-Error-Code": "RepoNotFound"})
        if parts[:2] == ["api", "models"]:
            return self.api(repository, name, parts[4:], body)
        return self.file(repository, parts[3], "/".join(parts[4:]))

    def api(self, repository: Repository, name: str, parts: list[str], body: bytes) -> None:
        what, *rest = parts or ["revision"]
        if what == "branch":
            repository.branches.setdefault("/".join(rest), dict(repository.branches["main"]))
            return self.say(200, {})
        revision = "/".join(rest) or "main"
        branch = repository.branch(revision)
        if branch is None:
            return self.say(404, {"error": "?"}, {"X-Error-Code": "RevisionNotFound"})
        files = repository.branches[branch]
        if what == "tree":
            entries = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            return self.say(200, entries)
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            modes = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return self.say(200, {"files": modes})
        if what == "commit":
            if not self.is_known():
                return self.say(401, {"error": "?"})
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.uploads[value["oid"]]
            sha = repository.sha(branch)
            return self.say(
                200, {"commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}", "success": True}
            )
        card = {"license": repository.licence} if repository.licence else None
        siblings = [{"rfilename": path} for path in files]
        content = {"id": name, "sha": repository.sha(branch), "private": repository.private, "siblings": siblings}
        return self.say(200, {**content, "cardData": card})

    def file(self, repository: Repository, revision: str, path: str) -> None:
        branch = repository.branch(revision)
        if branch is None or path not in repository.branches[branch]:
            return self.say(404, {"error": "?"}, {"X-Error-Code": "EntryNotFound"})
        data = repository.branches[branch][path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": repository.sha(branch)}
        return self.say(200, data, headers)

    def create(self, request: dict) -> None:
        name = "/".join(filter(None, (request.get("organization"), request["name"])))
        if not self.is_known():
            return self.say(401, {"error": "Invalid username or password."})
        if name in self.server.repositories:
            return self.say(409, {"url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = Repository(
            private=request.get("visibility") == "private" or bool(request.get("private"))
        )
        return self.say(200, {"url": f"{self.server.url}/{name}"})

    def batch(self, request: dict) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/upload/{each['oid']}"}}}
            for each in request["objects"]
        ]
        self.say(200, {"transfer": "basic", "objects": objects})

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def say(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
