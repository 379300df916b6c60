"""Servers on 127.0.0.1 in the place of the world's: a host of files, and as much of the Hugging Face Hub as a test needs."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import httpx
import pytest

CONTENT = bytes(range(256)) * 1000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """A host of files; `cuts` says after how many bytes of content each next connection breaks off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/model.pt": CONTENT}
        self.etags = {"/model.pt": '"first"'}
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        wanted = self.headers["Range"]
        server.requests.append((path, wanted))
        if server.statuses or path not in server.files:
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        content, etag = server.files[path], server.etags.get(path)
        start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges else 0
        if start and self.headers["If-Range"] != etag:
            start = 0
        if start > len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:end])


class Forwarding(BaseHTTPRequestHandler):
    """Forwards requests to `target`, an address of the server that it belongs to."""

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        headers = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
        url = f"{self.server.target}{self.path}"
        answer = httpx.request(self.command, url, content=body, headers=headers, trust_env=False)
        self.answer(answer.status_code, answer.content)

    do_GET = do_POST = do_PATCH = forward  # noqa: N815  (the base class calls them so)

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(made):
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def write_cache(root, name, files, commit=COMMIT):
    """Build what the Hub's client leaves on disk."""
    repository = root / f"models--{name.replace('/', '--')}"
    for file, content in files.items():
        path = repository / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


class UploadHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as an upload of small files needs; remembers what it was sent."""

    requests: ClassVar[list[tuple[str, str, dict]]] = []
    files: ClassVar[dict[str, bytes]] = {}
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers.get("Authorization", ""), {}))
        if self.status != 200:
            self.reply({"error": "no"}, self.status)
        elif self.path.endswith("/repos/create"):
            self.requests[-1] = (*self.requests[-1][:2], json.loads(body))
            self.reply({"url": f"{self.address}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.reply(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
            )
        elif "/commit/" in self.path:
            self.store(body)
            commit = {"commitUrl": f"{self.address}/me/model/commit/abc", "commitOid": "abc", "success": True}
            self.reply(commit)
        else:
            self.reply({"license": None})

    def store(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization", ""), {}))
        self.reply({"id": "me/model", "sha": "abc", "siblings": []}, self.status)

    def reply(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def upload_hub(monkeypatch: pytest.MonkeyPatch):
    """Run a Hub, which huggingface_hub takes for the real one; gives its handler's class and its address."""
    handler = type("OneHub", (UploadHub,), {"requests": [], "files": {}})
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield handler, address
