"""A stand-in for the Hugging Face hub: as much of its HTTP interface as its library asks for a repository's files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # which the hub keeps elsewhere, and answers with a redirect


@dataclass
class HubRepository:
    """A folder that is served as a repository."""

    folder: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    library: str | None = None
    tags: tuple[str, ...] = ()
    is_gated: bool = False

    def files(self) -> dict[str, Path]:
        """Each by its name in the repository."""
        return {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*")) if path.is_file()}


class Hub:
    """Serves `repositories`, by ORG/NAME, from a port of its own; remembers what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.requests: list[tuple[str, str]] = []  # method, path
        self.tokens: set[str | None] = set()
        self.status: int | None = None  # of every answer, where it is set
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def fetched(self) -> set[str]:
        """The files whose contents were sent."""
        return {
            match[1]
            for method, path in self.requests
            if method == "GET" and (match := re.search(r"/(?:resolve/[^/]+|blobs)/(.*)", path))
        }

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Nobody answers there any more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.0"  # a connection each, so that none outlives `stop`

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.status is not None:
            return self._send(self.hub.status)
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self._send(401, error="RepoNotFound")
        rest = parts[2:]
        if is_api and rest[:1] == ["tree"]:
            return self._tree(repository)
        if is_api:
            return self._listing(repository, "/".join(rest[1:]) or "main")
        if rest[0] == "blobs":
            return self._send(200, repository.files()["/".join(rest[1:])].read_bytes())
        return self._file(repository, rest[1], "/".join(rest[2:]), "/".join(parts[:2]))

    def _listing(self, repository: HubRepository, revision: str) -> None:
        commit = repository.revisions.get(revision, revision if revision in repository.revisions.values() else None)
        if commit is None:
            return self._send(404, error="RevisionNotFound")
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in repository.files().items()]
        told = {"id": "x/y", "sha": commit, "siblings": siblings, "tags": list(repository.tags)}
        told |= {"library_name": repository.library} if repository.library else {}
        return self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _tree(self, repository: HubRepository) -> None:
        files = repository.files().items()
        entries = [
            {
                "type": "file",
                "path": name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for name, path in files
        ]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: HubRepository, commit: str, name: str, repo: str) -> None:
        if repository.is_gated:
            return self._send(403, error="GatedRepo")
        commit = repository.revisions.get(commit, commit)
        if commit not in repository.revisions.values():
            return self._send(404, error="RevisionNotFound")
        if name not in repository.files():
            return self._send(404, error="EntryNotFound")
        content = repository.files()[name].read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag}
        if not name.endswith(LARGE):
            return self._send(200, content, headers)
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # the library follows redirects within a host
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        return self._send(302, b"", headers | {"Location": f"{elsewhere}/{repo}/blobs/{name}"})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, error: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
