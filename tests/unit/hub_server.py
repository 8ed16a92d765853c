"""A hub on this machine that plays the few endpoints a push uses: what arrives is what a real client sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """What the hub holds, and what it was asked."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    commits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By repository and branch: each commit's added and deleted files, and its message."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Weights by their sha256."""
    asked: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    """Part of an address → the status with which it answers."""

    def files(self, place: str) -> dict[str, str]:
        """Name → text, or sha256 of weights."""
        found: dict[str, str] = {}
        for commit in self.commits.get(place, []):
            found |= commit["added"]
            found = {name: value for name, value in found.items() if name not in commit["deleted"]}
        return found


@contextmanager
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{method} {path}")
        status = next((code for part, code in self.hub.refuse.items() if part in path), None)
        if status is None and method != "PUT" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            return self._send({"error": f"refused with {status}"}, status)
        if method == "PUT":
            self.hub.objects[path.rpartition("/")[2]] = body
            return self._send({})
        if "/commit/" in path:
            return self._commit(path, [json.loads(line) for line in body.splitlines()])
        self._send(*self._found(path, json.loads(body or b"{}")))

    def _found(self, path: str, asked: Any) -> tuple[Any, int]:
        if path == "/api/whoami-v2":
            return {"name": "me"}, 200
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if path == "/api/repos/create":
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = repo in self.hub.private
            self.hub.private.setdefault(repo, asked.get("visibility") == "private")
            return {"url": f"{self.hub.url}/{repo}"}, 409 if known else 200
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._upload(one) for one in asked["objects"]]}, 200
        repo, _, rest = path.removeprefix("/api/models/").partition("/")
        owner, (name, _, rest) = repo, rest.partition("/")
        repo = f"{owner}/{name}"
        if rest.startswith("preupload/"):
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular", f["path"]) for f in asked["files"]]
            return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]}, 200
        if rest.startswith("branch/"):
            return {}, 200
        if rest.startswith("tree/"):
            listed = self.hub.files(f"{repo}@{rest.removeprefix('tree/')}")
            return [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in listed], 200
        if repo not in self.hub.private:
            return {"error": "no such repository"}, 404
        return {"id": repo, "private": self.hub.private[repo], "siblings": [], "sha": "0" * 40}, 200

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.objects:
            return one
        return one | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}

    def _commit(self, path: str, lines: list[dict[str, Any]]) -> None:
        place = path.removeprefix("/api/models/").replace("/commit/", "@")
        made: dict[str, Any] = {"added": {}, "deleted": [], "message": ""}
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                made["message"] = value["summary"]
            elif key == "file":
                made["added"][value["path"]] = value["content"]
            elif key == "lfsFile":
                made["added"][value["path"]] = value["oid"]
            elif key == "deletedFile":
                made["deleted"].append(value["path"])
        self.hub.commits.setdefault(place, []).append(made)
        self._send({"commitUrl": f"{self.hub.url}/{place}", "commitOid": "1" * 40, "pullRequestUrl": None})

    def _send(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
