"""A model hub on a real socket: the endpoints that the hub's own client uses to publish and to read."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.reward_services import running

Tree = dict[str, bytes]
LARGE = (".safetensors", ".png")  # stored by their hash, as the hub's .gitattributes has it
LICENSES = {"apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "other"}
TEXTS = {"license": str, "library_name": str, "pipeline_tag": str, "base_model": str, "base_model_relation": str}


@dataclass
class Repository:
    """Branches with their files."""

    private: bool
    branches: dict[str, Tree] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Users with their rights, repositories, and a log of requests."""

    tokens: dict[str, dict[str, Any]]  # what whoami-v2 answers to each
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256
    failing: dict[str, int] = field(
        default_factory=dict
    )  # the status with which a path that contains the text is answered
    asked: list[tuple[str, str]] = field(default_factory=list)

    def files(self, repository: str, branch: str = "main") -> Tree:
        """Return the files of a branch without those that the hub adds itself."""
        tree = self.repositories[repository].branches[branch]
        return {place: data for place, data in tree.items() if place != ".gitattributes"}


class Refused(Exception):
    """An error response."""

    def __init__(self, status: int, says: str, **more: Any) -> None:
        super().__init__(says)
        self.status, self.answer = status, {"error": says, **more}


def user(name: str, role: str = "write", orgs: dict[str, str] | None = None) -> dict[str, Any]:
    """Return whoami-v2's answer for a token."""
    member_of = [{"name": org, "roleInOrg": in_org} for org, in_org in (orgs or {}).items()]
    return {"name": name, "orgs": member_of, "auth": {"accessToken": {"role": role}}}


@contextmanager
def hub(tokens: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Hub]]:
    """Serve a hub. Return its URL and its contents."""
    held = Hub(tokens)
    handler = type("Handler", (Handler,), {"hub": held, "lock": threading.Lock()})
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield url, held


class Handler(http.server.BaseHTTPRequestHandler):
    """A handler that answers one request after the other."""

    hub: Hub
    lock: threading.Lock
    commit = ""  # that the answer is of

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        with self.lock:
            self.hub.asked.append((self.command, path))
            try:
                failing = [status for text, status in self.hub.failing.items() if text in path]
                if failing:
                    raise Refused(failing[0], "not today")
                self._reply(200, self._route(path, body))
            except Refused as refused:
                self._reply(refused.status, refused.answer)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _route(self, path: str, body: bytes) -> Any:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return answer(self, body, *(unquote(part) for part in match.groups()))
        raise Refused(404, f"no such endpoint: {self.command} {path}")

    def _reply(self, status: int, answer: Any) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep requests out of the tests' output."""

    def who(self) -> dict[str, Any]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refused(401, "Invalid username or password.")
        return self.hub.tokens[token]

    def may_write(self, repository: str) -> None:
        known, namespace = self.who(), repository.partition("/")[0]
        roles = {known["name"]: "admin"} | {org["name"]: org["roleInOrg"] for org in known["orgs"]}
        if roles.get(namespace, "read") == "read" or known["auth"]["accessToken"]["role"] == "read":
            raise Refused(403, f"You don't have the rights to write in {namespace}")

    def writer(self, repository: str) -> Repository:
        """Return the repository if the user may write to it."""
        self.may_write(repository)
        if repository not in self.hub.repositories:
            raise Refused(404, "Repository not found")
        return self.hub.repositories[repository]

    def tree(self, repository: str, revision: str) -> Tree:
        found = self.hub.repositories.get(repository)
        for branch, tree in found.branches.items() if found else ():
            if revision in (branch, commit_of(branch)):
                self.commit = commit_of(branch)
                return tree
        raise Refused(404, "not found")


def commit_of(branch: str) -> str:
    """Return the newest commit of a branch. This hub knows no other."""
    return hashlib.sha1(branch.encode()).hexdigest()


def _create(handler: Handler, body: bytes) -> Any:
    asked = json.loads(body)
    name, repositories = f"{asked['organization'] or handler.who()['name']}/{asked['name']}", handler.hub.repositories
    url = f"http://{handler.headers['Host']}/{name}"
    if name in repositories:
        raise Refused(409, "You already created this model repo", url=url)
    handler.may_write(name)
    repositories[name] = Repository(asked.get("visibility") == "private")
    return {"url": url}


def _validate(handler: Handler, body: bytes) -> Any:
    """Check the card's metadata, as far as this hub knows the rules."""
    text = json.loads(body)["content"]
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        raise Refused(400, "no metadata")
    wrong = [key for key, value in data.items() if not isinstance(value, TEXTS.get(key, list))]
    wrong += [] if data["license"] in LICENSES else ["license"]
    if wrong or not all(isinstance(tag, str) for tag in data["tags"]):
        raise Refused(400, f"{wrong} is not allowed", errors=[{"message": f"{wrong} is not allowed"}])
    return {"errors": [], "warnings": []}


def _preupload(handler: Handler, body: bytes, repository: str, revision: str) -> Any:
    handler.writer(repository)
    handler.tree(repository, revision)
    modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in json.loads(body)["files"]}
    return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}


def _batch(handler: Handler, body: bytes, repository: str) -> Any:
    handler.writer(repository)
    objects = json.loads(body)["objects"]
    for asked in objects:
        asked["actions"] = {"upload": {"href": f"http://{handler.headers['Host']}/lfs/{asked['oid']}"}}
    return {"objects": objects, "transfer": "basic"}


def _store(handler: Handler, body: bytes, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, "other bytes than announced")
    handler.hub.objects[oid] = body
    return {}


def _commit(handler: Handler, body: bytes, repository: str, revision: str) -> Any:
    there, tree = handler.writer(repository), handler.tree(repository, revision)
    for line in body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            there.messages.append(value["summary"])
        elif key == "deletedFile":
            del tree[value["path"]]
        else:
            tree[value["path"]] = (
                handler.hub.objects[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
            )
    url = f"http://{handler.headers['Host']}/{repository}/commit/{handler.commit}"
    return {"commitUrl": url, "commitOid": handler.commit}


def _branch(handler: Handler, body: bytes, repository: str, branch: str) -> Any:
    there = handler.writer(repository)
    if branch in there.branches:
        raise Refused(409, "exists")
    there.branches[branch] = dict(there.branches["main"])
    return {}


def _info(handler: Handler, body: bytes, repository: str) -> Any:
    handler.tree(repository, "main")
    there = handler.hub.repositories[repository]
    return {"id": repository, "private": there.private, "tags": [], "siblings": []}


def _list(handler: Handler, body: bytes, repository: str, revision: str) -> Any:
    tree = handler.tree(repository, revision)
    return [{"type": "file", "path": place, "size": len(data), "oid": "0" * 40} for place, data in tree.items()]


def _resolve(handler: Handler, body: bytes, repository: str, revision: str, place: str) -> Any:
    tree = handler.tree(repository, revision)
    if place not in tree:
        raise Refused(404, "no such file")
    return tree[place]


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", lambda handler, body: handler.who()),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate),
    ("GET", f"/api/models/{NAME}/auth-check/write", lambda handler, body, name: bool(handler.writer(name)) and {}),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", _preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", _commit),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", _branch),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", _list),
    ("GET", f"/api/models/{NAME}", _info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _store),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", _resolve),
]
