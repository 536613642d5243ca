"""A model hub on loopback: repositories that are folders, over the routes that huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `{"models/ORG/NAME": folder, "datasets/ORG/NAME": folder}` at one commit; `gated` ones refuse everybody.

    With `root`, new repositories are made there and commits written to them, for those who have the `token`; `created`
    holds what was asked of new ones.

    `requests` holds the method and path of all that was asked, `authorizations` the headers that came with it, `sent`
    the bytes of the contents of files that went out, by path in the repository.

    With `password`, nothing is answered to those who do not have it, as if it were private.
    """

    def __init__(
        self,
        repositories: Mapping[str, Path],
        gated: frozenset[str] = frozenset(),
        *,
        root: Path | None = None,
        token: str = "",
        password: str = "",
    ) -> None:
        self.repositories = dict(repositories)
        self.gated = gated
        self.root, self.token = root, token
        self.created: list[dict[str, Any]] = []
        self.password = password
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.authorizations: set[str | None] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of what a path names."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        listed = parts[0] == "api"
        parts = parts[1:] if listed else parts
        if parts[0] not in ("models", "datasets"):
            parts = ["models", *parts]
        name, rest = "/".join(parts[:3]), parts[3:]
        folder = self.repositories.get(name)
        if name in self.gated:
            return _refused(403, "GatedRepo")
        if folder is None:
            return _refused(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return _refused(404, "RevisionNotFound")
        if listed:
            return _listed(name, folder, rest)
        file = folder.joinpath(*rest[2:])
        if rest[:1] != ["resolve"] or not file.is_file():
            return _refused(404, "EntryNotFound")
        body = file.read_bytes()
        return 200, {"ETag": f'"{_blob(body)}"', "X-Repo-Commit": COMMIT}, body

    def take(self, path: str, body: bytes, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Do what a POST asks: make a repository, check a card, say how files are uploaded, write a commit."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if token != f"Bearer {self.token}":
            return _refused(401, "Unauthorized")
        if self.root is None:
            return _refused(403, "Forbidden")
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name.startswith("others/"):
                return _refused(403, "Forbidden")
            said = {"private": True, "public": False}.get(asked.get("visibility"))  # older clients send `private`
            self.created.append({"name": name, "private": asked.get("private", said)})
            folder = self.repositories.setdefault(f"models/{name}", self.root / name)
            folder.mkdir(parents=True, exist_ok=True)
            return _said({"url": f"{self.url}/{name}", "name": name})
        if parts[1:] == ["validate-yaml"]:
            return _said({"errors": [], "warnings": []})
        folder = self.repositories["/".join(parts[1:4])]
        if parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return _said({"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                (folder / line["value"]["path"]).unlink()
        page = f"{self.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
        return _said({"success": True, "commitUrl": page, "commitOid": COMMIT})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                given = self.headers.get("Authorization")
                hub.authorizations.add(given)
                if hub.password and given != f"Bearer {hub.password}":
                    self._send(*_refused(401, "RepoNotFound"))
                    return
                path = urlsplit(self.path).path
                status, headers, body = hub.answer(path)
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if status == 200 and asked is not None:
                    status, body = 206, body[int(asked[1]) : int(asked[2]) + 1]
                if self.command == "GET" and "/resolve/" in path:
                    hub.sent[unquote(path).partition(f"/{COMMIT}/")[2]] += len(body)
                self._send(status, headers, body)

            def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                given = self.headers.get("Authorization")
                hub.authorizations.add(given)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
                self._send(*hub.take(urlsplit(self.path).path, body, given))

            def _chunks(self) -> bytes:
                parts = []
                while self.headers.get("Transfer-Encoding") == "chunked":
                    size = int(self.rfile.readline(), 16)
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                    if size == 0:
                        break
                return b"".join(parts)

            do_HEAD = do_GET  # noqa: N815  # the standard library's name

            def log_message(self, format: str, *args: Any) -> None:
                """Tests read `requests`."""

        return Handler


def connect(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path, token: str = "") -> None:
    """Let this process ask the hub, with a cache of its own; the library reads its constants at each call."""
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)


def _blob(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _large(path: str, body: bytes) -> dict[str, Any]:
    """Return what is said of a file that is not kept by git."""
    if not path.endswith(".parquet"):
        return {}
    return {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 100}}


def _said(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _refused(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"


def _listed(name: str, folder: Path, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
    below = folder.joinpath(*rest[2:]) if rest[:1] == ["tree"] else folder
    if not below.is_dir():
        return _refused(404, "EntryNotFound")
    paths = sorted(below.rglob("*"))
    files = [path for path in paths if path.is_file()]
    names = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if rest[:1] == ["tree"]:
        folders = [str(path.relative_to(folder)) for path in paths if path.is_dir()]
        found: object = [{"type": "directory", "path": path, "size": 0, "oid": _blob(b"")} for path in folders] + [
            {"type": "file", "path": path, "size": len(body), "oid": _blob(body), **_large(path, body)}
            for path, body in names.items()
        ]
    else:
        siblings = [{"rfilename": path} for path in names]
        found = {"_id": "0", "id": name.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "tags": []}
    return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
