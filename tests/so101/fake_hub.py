"""A Hugging Face Hub on this machine: the requests of an upload, repositories in memory, and failures on request."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

TOKEN = "hf_" + "s" * 34


class FakeHub(http.server.ThreadingHTTPServer):
    """A hub with a user "me" who is in the organisation "lab".

    repos: content of each repository by "datasets/NAME" or "models/NAME", files by name.
    tags, private: of each repository.
    failures: HTTP status by a part of the path of a request; 0 drops the connection.
    requests: method and path of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, set[str]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: dict[str, int] = {}
        self.requests: list[str] = []
        self.role = "write"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that go away."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    def answer(self, content: object = None, status: int = 200) -> None:
        body = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        for part, status in hub.failures.items():
            if part in path:
                if status == 0:
                    self.connection.close()
                    return None
                return self.answer({"error": "refused on request"}, status)
        if path.startswith("/blob/"):  # as on the hub, the address of an upload is a secret by itself
            data = hub.blobs[path.removeprefix("/blob/")] = body
            assert hashlib.sha256(data).hexdigest() == path.removeprefix("/blob/")
            return self.answer()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"role": hub.role, "displayName": "test"}}
            return self.answer({"name": "me", "type": "user", "orgs": [{"name": "lab"}], "auth": auth})
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            key = f"{asked.get('type') or 'model'}s/{name}"
            if key in hub.repos:
                return self.answer({"error": "You already created this repo", "url": f"{hub.url}/{name}"}, 409)
            hub.repos[key], hub.tags[key] = {".gitattributes": b""}, set()
            hub.private[key] = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{hub.url}/{key.removeprefix('models/')}", "name": name, "id": "1"})
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            links = [{"upload": {"href": f"{hub.url}/blob/{each['oid']}", "header": {}}} for each in objects]
            listed = [{**each, "authenticated": True, "actions": link} for each, link in zip(objects, links)]
            return self.answer({"transfer": "basic", "objects": listed})
        found = re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)(?:/(\w+))?(?:/([^/]+))?", path)
        if not found or found[1] not in hub.repos:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        key, action, last = found.groups()
        files = hub.repos[key]
        if action in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                {"id": key.partition("/")[2], "private": hub.private[key], "siblings": siblings, "xetEnabled": False}
            )
        if action == "tree":
            return self.answer(
                [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            )
        if action == "refs":
            refs = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": "0" * 40} for tag in hub.tags[key]]
            return self.answer({"branches": [], "converts": [], "tags": refs})
        if action == "preupload":
            large = (".parquet", ".mp4", ".onnx", ".safetensors")
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(large) else "regular") for name in names]
            return self.answer(
                {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
            )
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            address = f"{hub.url}/{key.removeprefix('models/')}/commit/{'0' * 40}"
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": address})
        if action == "tag":
            hub.tags[key].add(json.loads(body)["tag"])
            return self.answer()
        return self.answer({"error": f"the stand-in does not know {path}"}, 501)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that runs in a thread; give its `url` as HF_ENDPOINT, and TOKEN as HF_TOKEN."""
    with FakeHub() as hub:
        hub.daemon_threads = True
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
