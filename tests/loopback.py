"""As much of the Hub's protocol as reading needs, on this machine, with switches for what can go wrong."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Repo:
    """The commits of one repository: name of a branch or commit -> commit, and commit -> files."""

    revisions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """The new commit, now also ``main``."""
        commit = hashlib.sha1(repr((len(self.files), files)).encode()).hexdigest()
        self.files[commit] = files
        self.revisions |= {"main": commit, commit: commit}
        return commit


@dataclass
class Hub:
    """A running server: its address, its repositories, what is wrong with it, and what it was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    fault: str = ""  # corrupt | truncate | gated | denied | hidden | broken
    requests: list[str] = field(default_factory=list)

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of the loopback interface."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            match = RESOLVE.fullmatch(self.path)
            repo = hub.repos.get(match["repo"]) if match else None
            fault = {
                "gated": (403, "GatedRepo"),
                "denied": (403, ""),
                "hidden": (401, "RepoNotFound"),
                "broken": (500, ""),
            }
            if hub.fault in fault:
                self.refuse(*fault[hub.fault])
            elif match is None or repo is None:
                self.refuse(404, "RepoNotFound")
            elif (commit := repo.revisions.get(match["revision"])) is None:
                self.refuse(404, "RevisionNotFound")
            elif (content := repo.files[commit].get(match["file"])) is None:
                self.refuse(404, "EntryNotFound", commit)
            else:
                self.send(content, commit)

        def refuse(self, status: int, code: str, commit: str = "") -> None:
            self.send_response(status)
            for name, value in (("X-Error-Code", code), ("X-Repo-Commit", commit), ("Content-Length", "0")):
                if value:
                    self.send_header(name, value)
            self.end_headers()

        def send(self, content: bytes, commit: str) -> None:
            self.send_response(200)
            digest = hashlib.sha256(content).hexdigest()
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", commit)
            if hub.fault == "corrupt":
                content = content[:-1] + bytes([content[-1] ^ 1])
            if hub.fault == "truncate" and self.command == "GET":
                content = content[:-8]
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
