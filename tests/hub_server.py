"""A hub on this machine: as much of its API over HTTP as huggingface_hub needs to publish models and fetch them."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml

TOKEN = "hf_" + "t" * 34


@dataclass
class Repository:
    """Branches, each a list of commits, which are files by name."""

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.branches[revision][-1]

    def sha(self, revision: str) -> str:
        return hashlib.sha1(f"{revision} {len(self.branches[revision])}".encode()).hexdigest()


class Hub:
    """What the server knows."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of large files, by their sha256
        self.requests: list[str] = []
        self.endpoint = ""

    def file(self, repository: str, revision: str, name: str) -> bytes | None:
        there = self.repositories.get(repository)
        for branch in there.branches if there else ():
            if there and revision in (branch, there.sha(branch)):
                return there.files(branch).get(name)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self, code: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, header in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refused(self, code: int, kind: str, message: str) -> None:
        self._answer(code, {"error": message}, X_Error_Code=kind, X_Error_Message=message)

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not signed_in:
            return self._refused(401, "", "Invalid username or password.")
        for method, pattern, action in self._routes():
            if self.command == method and (match := re.fullmatch(pattern, path)):
                return action(*map(unquote, filter(None, match.groups())), query=query, body=body)
        return self._refused(501, "", f"{self.command} {path} is not known here")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the names that http.server calls

    def _routes(self) -> list[tuple[str, str, Any]]:
        model = "/api/models/([^/]+/[^/]+)"
        return [
            ("GET", "/api/whoami-v2", self._who),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("GET", f"{model}(?:/revision/([^/]+))?", self._info),
            ("GET", f"{model}/refs", self._refs),
            ("GET", f"{model}/tree/([^/]+)", self._tree),
            ("POST", f"{model}/branch/([^/]+)", self._branch),
            ("POST", f"{model}/preupload/([^/]+)", self._preupload),
            ("POST", f"{model}/commit/([^/]+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", "/objects/(.+)", self._store),
            ("HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]

    def _known(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._refused(404, "RepoNotFound", f"Repository {name} not found")
        return found

    def _who(self, **_: Any) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refused(401, "", "Invalid username or password.")
        return self._answer(200, {"name": "somebody", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def _validate(self, body: bytes, **_: Any) -> None:
        metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        errors = [] if isinstance(metadata.get("tags"), list) else [{"message": '"tags" must be an array'}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self, body: bytes, **_: Any) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if name.startswith("others/"):
            return self._refused(403, "", 'You don\'t have the rights to create a model under the namespace "others"')
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **answer})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=private)
        return self._answer(200, answer)

    def _info(self, name: str, revision: str = "main", *, query: Any, **_: Any) -> None:
        if (there := self._known(name)) is None:
            return None
        if revision not in there.branches:
            return self._refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        card = there.files(revision).get("README.md", b"").decode()
        licence = re.search(r"^license: (.*)$", card, re.MULTILINE)
        return self._answer(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": there.sha(revision),
                "private": there.private,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": own} for own in there.files(revision)],
                "cardData": {"license": licence[1]} if licence else {},
            },
        )

    def _refs(self, name: str, **_: Any) -> None:
        if (there := self._known(name)) is not None:
            refs = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": there.sha(branch)}
                for branch in there.branches
            ]
            self._answer(200, {"branches": refs, "tags": [], "converts": []})

    def _tree(self, name: str, revision: str, **_: Any) -> None:
        if (there := self._known(name)) is not None:
            branch = next(own for own in there.branches if revision in (own, there.sha(own)))
            entries = []
            for own, content in there.files(branch).items():
                oid = hashlib.sha1(content).hexdigest()
                entries.append({"type": "file", "path": own, "size": len(content), "oid": oid})
            self._answer(200, entries)

    def _branch(self, name: str, branch: str, **_: Any) -> None:
        if (there := self._known(name)) is None:
            return None
        if branch in there.branches:
            return self._answer(409, {"error": "Reference already exists"})
        there.branches[branch] = [dict(there.files())]
        return self._answer(201, {})

    def _preupload(self, name: str, revision: str, *, body: bytes, **_: Any) -> None:
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        answer = [
            {"path": own["path"], "uploadMode": modes[own["path"].endswith(".safetensors")], "shouldIgnore": False}
            for own in files
        ]
        self._answer(200, {"files": answer})

    def _batch(self, name: str, *, body: bytes, **_: Any) -> None:
        objects = [
            {
                **one,
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{one['oid']}", "header": {}}},
            }
            for one in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, digest: str, *, body: bytes, **_: Any) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            return self._refused(400, "", "The digest differs")
        self.hub.objects[digest] = body
        return self._answer(200, {})

    def _commit(self, name: str, revision: str, *, query: Any, body: bytes, **_: Any) -> None:
        if (there := self._known(name)) is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, there.sha(revision)):
            return self._refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(there.files(revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        there.messages.append(header["summary"])
        answer = {"success": True, "commitUrl": f"{self.hub.endpoint}/{name}/commit/"}
        if query.get("create_pr") == ["1"]:
            there.pull_requests.append(files)
            number = len(there.pull_requests)
            oid = hashlib.sha1(f"pr {number}".encode()).hexdigest()
            address = f"{self.hub.endpoint}/{name}/discussions/{number}"
            answer |= {"commitOid": oid, "commitUrl": answer["commitUrl"] + oid, "pullRequestUrl": address}
        else:
            there.branches[revision].append(files)
            oid = there.sha(revision)
            answer |= {"commitOid": oid, "commitUrl": answer["commitUrl"] + oid}
        return self._answer(200, answer)

    def _resolve(self, name: str, revision: str, file: str, **_: Any) -> None:
        content = self.hub.file(name, revision, file)
        if content is None:
            return self._refused(404, "EntryNotFound", "Entry not found")
        there = self.hub.repositories[name]
        sha = next(there.sha(branch) for branch in there.branches if revision in (branch, there.sha(branch)))
        return self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of the test's own, to which this process is signed in."""
    known = Hub()
    handler = type("Handler", (_Handler,), {"hub": known})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        known.endpoint = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        # What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_DISABLE_XET set when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", known.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", known.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield known
        server.shutdown()
