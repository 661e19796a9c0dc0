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
    """Repositories as folders of a folder; `asked` lists what was read, by method and path."""

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, []
        self.private: dict[str, bool] = {}  # of the repositories that were made here
        self.token: str | None = None  # which uploads need

    def files(self, name: str) -> list[str]:
        place = self.folder / name
        return sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())

    def fetched(self) -> set[str]:
        """The names of the files whose content was asked for."""
        paths = [path for method, path in self.asked if method == "GET" and "/resolve/" in path]
        return {path.split("?")[0].rsplit("/", 1)[1] for path in paths}

    def tree(self, name: str) -> list[dict]:
        """Files and folders of a repository, as the hub lists them."""
        place, entries = self.folder / name, []
        for path in sorted(place.rglob("*")):
            kind = "file" if path.is_file() else "directory"
            entry = {"type": kind, "path": str(path.relative_to(place)), "oid": "0" * 40}
            entries.append({**entry, "size": path.stat().st_size if path.is_file() else 0})
        return entries

    def commit(self, name: str, lines: list[str]) -> None:
        """Take over the files of a commit."""
        for entry in map(json.loads, lines):
            if entry["key"] == "file":
                path = self.folder / name / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *given):
        pass

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

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
            told = {"private": self.hub.private.get(match[1], False), "siblings": siblings}
            return self.answer({"id": match[1], "sha": COMMIT, **told})
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        path = self.hub.folder / match[1] / match[2] if match else None
        if path is None or not path.is_file():
            return self.refuse(404, "EntryNotFound")
        content = path.read_bytes()
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(content, X_Repo_Commit=COMMIT, ETag=tag)

    def do_POST(self):
        body = self.body()
        wanted = self.hub.token and f"Bearer {self.hub.token}"
        if wanted and self.headers.get("Authorization") != wanted:
            return self.refuse(401, "Unauthorized")
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]
        if "/preupload/" in self.path:
            told = {"uploadMode": "regular", "shouldIgnore": False}  # all within the commit
            files = [{"path": one["path"], **told} for one in json.loads(body)["files"]]
            return self.answer({"files": files})
        self.hub.commit(name, body.decode().splitlines())
        url = f"{self.address}/{name}/commit/{COMMIT}"
        return self.answer({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization')}/{asked['name']}"
        if (self.hub.folder / name).is_dir():
            return self.answer({"error": "exists", "url": f"{self.address}/{name}"}, 409)
        (self.hub.folder / name).mkdir(parents=True)
        self.hub.private[name] = asked.get("visibility") == "private"
        return self.answer({"url": f"{self.address}/{name}"})


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[Hub, str]]:
    """A hub of the repositories in `folder`, and its address."""
    hub = Hub(folder)
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
