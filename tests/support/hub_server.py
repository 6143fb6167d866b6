"""A hub of a few repositories on this machine, with the parts that a fetch needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")


@dataclass
class Hub:
    """Folders by repository, each at one commit.

    Files of `gated` repositories need `token`. The file `stops`, with its repository, is sent half,
    once, until `go_on`.
    """

    folders: dict[str, Path]
    commits: dict[str, str]
    token: str = "accepted"
    gated: set[str] = field(default_factory=set)
    stops: str = ""
    go_on: threading.Event = field(default_factory=threading.Event)
    sent: list[str] = field(default_factory=list)
    address: str = ""

    def files(self, repository: str) -> dict[str, Path]:
        folder = self.folders[repository]
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, answering at `address`."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def described(path: Path, name: str, key: str) -> dict[str, Any]:
    """A file as the hub lists it."""
    body = path.read_bytes()
    size, sha256 = len(body), hashlib.sha256(body).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % size + body).hexdigest()  # noqa: S324 - as git names it.
    entry: dict[str, Any] = {key: name, "size": size, "blobId": blob, "oid": blob}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 100}
    return entry


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed while they read."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        about = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if about else parts[:2])
        if repository not in self.hub.folders:
            return self._refuse(404, "RepoNotFound")
        verb, revision, *name = parts[4:] if about else parts[2:]
        commit = self.hub.commits[repository]
        if revision not in (commit, "main"):
            return self._refuse(404, "RevisionNotFound")
        if about:
            return self._about(repository, commit, verb)
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository in self.hub.gated and not allowed:
            return self._refuse(403, "GatedRepo")
        path = self.hub.files(repository)["/".join(name)]
        return self._file(path, "/".join([repository, *name]), commit)

    def _about(self, repository: str, commit: str, verb: str) -> None:
        files = self.hub.files(repository).items()
        if verb == "tree":
            listed = [{"type": "file", **described(path, name, "path")} for name, path in files]
            return self._answer(json.dumps(listed).encode())
        siblings = [described(path, name, "rfilename") for name, path in files]
        about = {"id": repository, "sha": commit, "siblings": siblings}
        return self._answer(json.dumps(about).encode())

    def _file(self, path: Path, name: str, commit: str) -> None:
        body = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if self.command == "GET":
            self.hub.sent.append(name)
        stops = self.command == "GET" and name == self.hub.stops
        if stops:
            self.hub.stops = ""
        self._answer(body, headers, stops=stops)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _answer(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        status: int = 200,
        *,
        stops: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if stops else body)
            self.wfile.flush()
        if stops:
            self.hub.go_on.wait(60)
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Discard the message."""
