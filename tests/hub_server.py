"""A hub on this machine: the few addresses of it that huggingface_hub asks for a model.

The answers are those of https://huggingface.co/docs/hub/api and of its `resolve` addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAIN, OTHER = "a1" * 20, "b2" * 20
"""Commits."""


class Hub:
    """Models by name; what is asked is kept in `asked` as (method, path, Range)."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.gated = self.broken = False
        self.cut_after: int | None = None
        """Bytes after which the next large file is cut; the hub is broken from then on."""
        self.spoilt: set[str] = set()
        """Files that are sent with other bytes than promised."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, files: dict[str, bytes], commit: str = MAIN, branch="main") -> None:
        self.commits.setdefault(name, {})[commit] = files
        self.branches.setdefault(name, {})[branch] = commit

    def fetched(self) -> list[str]:
        """Names of the files whose content was sent."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return [path.rpartition("/")[2] for path in paths]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".gguf"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers["Range"]))
        self.hub.tokens.add(self.headers["Authorization"])
        if self.hub.broken:
            self.refuse(500, "", f"internal error for {self.headers['Authorization']}")
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse(404, "", "nothing here")

    def api(self, name: str, rest: list[str]) -> None:
        if name not in self.hub.commits:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return
        commit = self.commit(name, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        files = self.hub.commits[name][commit]
        if rest[:1] == ["tree"]:
            self.send_json([self.entry(path, data) for path, data in files.items()])
            return
        siblings = []
        for path, data in files.items():
            entry = self.entry(path, data)
            sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {
                    "sha256": entry["lfs"]["oid"], "size": len(data), "pointerSize": 134
                }  # fmt: skip
            siblings.append(sibling)
        self.send_json({"id": name, "sha": commit, "siblings": siblings, "private": False})

    def commit(self, name: str, revision: str) -> str | None:
        found = self.hub.branches[name].get(revision, revision)
        if found not in self.hub.commits[name]:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return None
        return found

    @staticmethod
    def entry(path: str, data: bytes) -> dict:
        entry = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        if _is_large(path):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return entry

    def file(self, name: str, revision: str, path: str) -> None:
        if self.hub.gated:
            said = f"Access to model {name} is restricted, {self.headers['Authorization']}"
            self.refuse(403, "GatedRepo", said)
            return
        commit = self.commit(name, revision)
        if commit is None:
            return
        data = self.hub.commits[name][commit].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        entry = self.entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        start = 0
        if (wanted := self.headers["Range"]) is not None:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if path in self.hub.spoilt:
            data = bytes(len(data))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if _is_large(path) and self.hub.cut_after is not None:
            data, self.hub.broken = data[: start + self.hub.cut_after], True
            self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(data[start:])

    def send_json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str, said: str) -> None:
        data = json.dumps({"error": said}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", said)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def hub_here(monkeypatch, cache: Path):
    """A hub, and huggingface_hub asking it, with a cache of its own."""
    import types

    from huggingface_hub import constants, file_download

    hub = Hub()
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1024,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    try:
        yield hub
    finally:
        hub.close()
