"""A hub on this machine: an HTTP server that speaks as much of the Hugging Face hub's API as pushes and downloads need.

    with serve() as hub:
        HfApi(endpoint=hub.address, token=TOKEN).create_repo("ann/student")
        hub.repos["ann/student"].files                     # {"README.md": b"..."}

`hub.fail["lfs"] = 403` makes the route of that name answer 403.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import yaml

TOKEN = "hf_test"
OWNER = "ann"


@dataclass
class Repo:
    """A repository: files by name, whether it is private, commit messages; states to download, by revision.

    A state is a commit's hash and its files.
    """

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    states: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)


@dataclass
class Hub:
    """What the server holds, what it was asked, and which routes are to fail."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    requests: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    cards: dict[str, dict] = field(default_factory=dict)  # of models that others have published


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        path = urlsplit(self.path).path
        if "/resolve/" in path:
            return self.download(path)
        name, action = self.route(path)
        self.hub.requests.append(name)
        if name in self.hub.fail:
            return self.send(self.hub.fail[name], {"error": f"{name} is told to fail"})
        public = name in ("model", "upload")
        if not public and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        status, answer = action(path, body)
        return self.send(status, answer)

    def chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def send(self, status: int, answer: dict) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", answer.get("code", "RepoNotFound"))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def download(self, path: str) -> None:
        """A file of a state: `/ann/tiny/resolve/v1/config.json`."""
        self.hub.requests.append("download")
        name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        states = self.hub.repos[name].states if name in self.hub.repos else {}
        if revision not in states:
            return self.send(404, {"error": "Revision not found", "code": "RevisionNotFound"})
        commit, files = states[revision]
        if file not in files:
            return self.send(404, {"error": "Entry not found", "code": "EntryNotFound"})
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(files[file]).hexdigest()}"')
        self.send_header("Content-Length", str(len(files[file])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(files[file])
        return None

    def route(self, path: str):
        known = {
            "/api/whoami-v2": ("whoami", self.whoami),
            "/api/repos/create": ("create", self.create),
            "/api/validate-yaml": ("yaml", self.validate),
        }
        if path in known:
            return known[path]
        if path.startswith("/blobs/"):
            return "upload", self.upload
        if path.endswith("/info/lfs/objects/batch"):
            return "lfs", self.batch
        if "/preupload/" in path:
            return "preupload", self.preupload
        if "/commit/" in path:
            return "commit", self.commit
        if "/tree/" in path:
            return "tree", self.tree
        return "model", self.model

    def tree(self, path: str, body: bytes):
        """Folders of a repository: there are none."""
        return 404, {"error": "Entry not found", "code": "EntryNotFound"}

    def whoami(self, path: str, body: bytes):
        return 200, {"type": "user", "name": OWNER, "orgs": []}

    def create(self, path: str, body: bytes):
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        answer = {"url": f"{self.hub.address}/{name}", "name": name}
        if not name.startswith(f"{OWNER}/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if name in self.hub.repos:
            return 409, {**answer, "error": "You already created this model repo"}
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, answer

    def validate(self, path: str, body: bytes):
        head = json.loads(body)["content"].split("---\n")[1]
        facts = yaml.safe_load(head)
        if facts.get("license") not in ("apache-2.0", "mit", "other"):
            return 400, {"errors": [{"message": '"license" must be one of: apache-2.0, ...'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def model(self, path: str, body: bytes):
        name = "/".join(path.split("/")[3:5])
        if name in self.hub.cards:
            return 200, {"id": name, "siblings": [], "tags": [], "private": False, "cardData": self.hub.cards[name]}
        if name not in self.hub.repos:
            return 404, {"error": "Repository not found"}
        repo = self.hub.repos[name]
        if "/tree/" in path:  # a folder in a state: all files are at the top
            return 404, {"error": "Entry not found", "code": "EntryNotFound"}
        _, _, revision = path.partition("/revision/")
        if revision and repo.states and revision not in repo.states:
            return 404, {"error": "Revision not found", "code": "RevisionNotFound"}
        state = repo.states.get(revision or "main")
        config = json.loads(repo.files.get("config.json", b"{}"))
        return 200, {
            "id": name,
            "sha": state[0] if state else hashlib.sha1(repr(repo.commits).encode()).hexdigest(),
            "private": repo.private,
            "tags": [],
            "config": {"model_type": config.get("model_type")},
            "siblings": [{"rfilename": file} for file in repo.files],
        }

    def preupload(self, path: str, body: bytes):
        repo = self.hub.repos["/".join(path.split("/")[3:5])]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            there = repo.files.get(file["path"])
            if there is not None:
                blob = b"blob %d\0" % len(there)
                sums = hashlib.sha256(there) if large else hashlib.sha1(blob + there)
                answer["oid"] = sums.hexdigest()
            answers.append(answer)
        return 200, {"files": answers}

    def batch(self, path: str, body: bytes):
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/blobs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}

    def upload(self, path: str, body: bytes):
        oid = path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content is not what was announced"}
        self.hub.blobs[oid] = body
        return 200, {}

    def commit(self, path: str, body: bytes):
        name = "/".join(path.split("/")[3:5])
        repo = self.hub.repos[name]
        after, message = dict(repo.files), ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                after[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del after[value["path"]]
            else:
                return 400, {"error": f"unknown operation {key}"}
        repo.files = after
        repo.commits.append(message)
        oid = hashlib.sha1(repr(repo.commits).encode()).hexdigest()
        return 200, {"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid, "success": True}


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub on a free port of 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
