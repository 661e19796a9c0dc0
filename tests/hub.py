"""A Hugging Face Hub on localhost: as much of it as models are fetched from and uploaded to."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as folders of a folder; `asked` lists the requests, method and path."""

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, []
        self.made: list[dict] = []  # what was asked for of new repositories
        self.cut_after: int | None = None  # bytes, of the next file's content
        self.token: str | None = None  # which uploads need

    def files(self, name: str) -> list[str]:
        place = self.folder / name
        return sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())

    def tree(self, name: str) -> list[dict]:
        """Files and folders of a repository, as the hub lists them."""
        place, entries = self.folder / name, []
        for path in sorted(place.rglob("*")):
            kind = "file" if path.is_file() else "directory"
            entry = {"type": kind, "path": str(path.relative_to(place)), "oid": "0" * 40}
            entries.append({**entry, "size": path.stat().st_size if path.is_file() else 0})
        return entries


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *given):
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        """What came with the request, in one piece or in chunks."""
        if length := self.headers["Content-Length"]:
            return self.rfile.read(int(length))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.asked.append((self.command, self.path))
        if match := re.match(r"/api/models/([^/]+/[^/?]+)(/revision/[^?]+)?", self.path):
            if not (self.hub.folder / match[1]).is_dir():
                return self.refuse(404, "RepoNotFound")
            if "/tree/" in self.path:
                return self.answer(self.hub.tree(match[1]))
            siblings = [{"rfilename": file} for file in self.hub.files(match[1])]
            return self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings})
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        path = self.hub.folder / match[1] / match[2] if match else None
        if path is None or not path.is_file():
            return self.refuse(404, "EntryNotFound")
        return self.file(path)

    def file(self, path: Path) -> None:
        content = path.read_bytes()
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        start = 0
        if given := self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", given)[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.hub.cut_after and path.suffix == ".safetensors":
            end, self.hub.cut_after = start + self.hub.cut_after, None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:end])
            self.close_connection = True
            return
        self.answer(content[start:], 206 if start else 200, Accept_Ranges="bytes", **headers)

    def do_POST(self):
        self.hub.asked.append((self.command, self.path))
        body = self.body()
        wanted = self.hub.token and f"Bearer {self.hub.token}"
        if wanted and self.headers.get("Authorization") != wanted:
            return self.refuse(401, "Unauthorized")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization')}/{asked['name']}"
            (self.hub.folder / name).mkdir(parents=True, exist_ok=True)
            self.hub.made.append(asked)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer({"files": told})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = self.hub.folder / name / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))
        url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
        return self.answer({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[Hub, str]]:
    """A hub of the repositories in `folder`, and its address."""
    hub = Hub(folder)
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
