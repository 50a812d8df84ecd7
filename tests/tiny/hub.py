"""A hub of one process: as much of the hub's protocol as uploading a model and loading it again need."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
TOKEN = "hf_a_token_that_may_write"


@dataclass
class Hub:
    """`repositories`: hub id -> file -> content. `private` names those that were made private."""

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What makes huggingface_hub talk to this hub."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        return variables | {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token or "", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return self._json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repositories[repository][line["value"]["path"]] = content
            url = f"{self.hub.endpoint}/{repository}/commit/{COMMIT}"
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        return self._json({"error": path}, 404)

    def _create(self, asked: dict) -> None:
        repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repository}", "id": repository}
        if repository in self.hub.repositories:
            return self._json({**url, "error": "You already created this model repo"}, 409)
        self.hub.repositories[repository] = {".gitattributes": b""}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repository)
        return self._json(url)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.hub.repositories.get("/".join(parts[2:4]))
            if files is None:
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:  # .../tree/REVISION[/FOLDER]
                folder = "/".join(parts[parts.index("tree") + 2 :])
                inside = {name: content for name, content in files.items() if name.startswith(folder and f"{folder}/")}
                if not inside:
                    return self._json({"error": folder}, 404, {"X-Error-Code": "EntryNotFound"})
                return self._json([self._entry(name, content) for name, content in inside.items()])
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings})
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), "/".join(parts[4:]))
        return self._json({"error": self.path}, 404)

    @staticmethod
    def _entry(name: str, content: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, repository: str, name: str) -> None:
        files = self.hub.repositories.get(repository)
        if files is None or name not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self._json({"error": name}, 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self._send(files[name], 200, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"})

    def _json(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
