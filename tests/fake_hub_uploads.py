"""The upload half of the fake Hub: accounts, rights, repositories, LFS, commits.

    with UploadHub() as hub:
        hub.faults.append(Fault("reset", path="^/lfs/", method="PUT"))   # in the middle of the body
        subprocess.run(..., env=os.environ | hub.env | {"HF_TOKEN": "hf_me"})

The token `hf_me` belongs to the user "me" and may write, `hf_reader` may only read. What is
committed can be downloaded again through the routes of `fake_hub`.
"""

import base64
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from fake_hub import NAME, FakeHub, Handler, Refused, Repository, etag, is_large, oid

from gpt2repro.system import patience

# Tried before fake_hub's.
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/models/{NAME}/auth-check/write", "auth_check"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>.+)", "branch"),
    ("DELETE", rf"/api/models/{NAME}/branch/(?P<branch>.+)", "delete_branch"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<digest>[0-9a-f]{64})", "lfs_put"),
    ("PUT", r"/lfs/(?P<digest>[0-9a-f]{64})/(?P<part>\d+)", "lfs_put_part"),
    ("POST", r"/lfs/(?P<digest>[0-9a-f]{64})/complete", "lfs_complete"),
    ("POST", r"/lfs/verify", "lfs_verify"),
)


@dataclass(frozen=True)
class Account:
    name: str
    role: str = "write"


class UploadHub(FakeHub):
    """`part_size`: files above it are uploaded in parts, as the Hub asks for large ones."""

    def __init__(self, *, part_size: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.part_size = part_size
        self.accounts = {"hf_me": Account("me"), "hf_reader": Account("me", role="read")}
        self.stored: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.mixed_up: dict[str, str] = {}  # branch -> SHA-256 of what its large files become
        self.parts: dict[str, dict[int, bytes]] = {}
        self.private: set[str] = set()
        self.private_by_default = False  # an organization's choice
        self.messages: list[str] = []

    def __enter__(self) -> "UploadHub":
        super().__enter__()
        self._server.RequestHandlerClass = type("Hub", (UploadHandler,), {"hub": self})
        return self

    def use_as_me(self, monkeypatch: Any) -> None:
        """Make it this process's Hub, with the token of `me`, and repeat without waiting."""
        self.use_in_process(monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        monkeypatch.setattr(patience, "FIRST_DELAY_SECONDS", 0.01)
        monkeypatch.setattr(patience, "LONGEST_DELAY_SECONDS", 0.05)
        monkeypatch.setattr(patience, "OFFLINE_AFTER_SECONDS", 0.2)
        real_sleep = time.sleep  # the client's own backoff waits whole seconds
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: real_sleep(0.01))

    def put(self) -> int:
        """Bodies of large files that arrived whole."""
        return sum(request.status == 200 for request in self.requests("^/lfs/[0-9a-f]", "PUT"))

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        repository = self.repositories["models", name]
        return repository.commits[repository.refs[ref]]


class UploadHandler(Handler):
    hub: UploadHub

    def serve(self) -> None:
        """A "reset" of a PUT hangs up when half of the body has come."""
        if self.command == "PUT":
            with self.hub.lock:
                resets = (f for f in self.hub.faults if f.kind == "reset")
                struck = any(f.strikes("PUT", self.path) for f in resets)
            if struck:
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
                self.decoded_path = self.path
                self.record(0, 0)
                self.reset()
                return
        super().serve()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def route(self) -> None:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, self.decoded_path)
            if match and self.command == method:
                getattr(self, name)(**match.groupdict())
                return
        super().route()

    # --- accounts ---------------------------------------------------------------------------------

    @property
    def account(self) -> Account | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.accounts.get(token)

    def find(self, kind: str, name: str, rest: str) -> tuple[Repository, str, str]:
        owner = self.account.name if self.account else None
        if name in self.hub.private and name.split("/")[0] != owner:
            raise Refused(401, "RepoNotFound")
        return super().find(kind, name, rest)

    def writable(self, name: str) -> Repository:
        """The repository, if the request's token may write to it."""
        if self.account is None:
            raise Refused(401, "Unauthorized")
        repository = self.hub.repositories.get(("models", name))
        if repository is None:
            raise Refused(404, "RepoNotFound")
        if self.account.role != "write" or name.split("/")[0] != self.account.name:
            raise Refused(403, "Forbidden")
        return repository

    def whoami(self) -> None:
        if self.account is None:
            raise Refused(401, "Unauthorized")
        access = {"accessToken": {"displayName": "test", "role": self.account.role}}
        orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "shop", "roleInOrg": "read"}]
        self.answer_json({"type": "user", "name": self.account.name, "orgs": orgs, "auth": access})

    def auth_check(self, name: str) -> None:
        self.writable(name)
        self.answer_json({})

    # --- repositories -----------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or (self.account.name if self.account else "")
        name = f"{owner}/{asked['name']}"
        if self.account is None:
            raise Refused(401, "Unauthorized")
        if self.account.role != "write" or owner != self.account.name:
            raise Refused(403, "Forbidden")
        exists = ("models", name) in self.hub.repositories
        if not exists:
            self.hub.add("models", name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            default = "private" if self.hub.private_by_default else "public"
            if asked.get("private", asked.get("visibility", default) == "private"):
                self.hub.private.add(name)
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": "0" * 24}
        self.answer(409 if exists else 200, json.dumps(answer).encode(), {})

    def info(self, kind: str, name: str, rest: str = "main") -> None:
        repository, commit, _ = self.find(kind, name, rest)
        files = repository.commits[commit]
        siblings = [{"rfilename": path} for path in files]
        private = name in self.hub.private
        answer = {"id": name, "_id": "0" * 24, "sha": commit, "siblings": siblings}
        self.answer_json(answer | {"tags": [], "private": private, "downloads": 0, "likes": 0})

    def branch(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        if branch in repository.refs:
            raise Refused(409, "BranchExists")
        asked = json.loads(self.body or b"{}")
        commit = repository.resolve(asked.get("startingPoint", "main"))
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        repository.refs[branch] = commit
        self.answer_json({})

    def delete_branch(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        if branch == "main" or branch not in repository.refs:
            raise Refused(403 if branch == "main" else 404, "RevisionNotFound")
        del repository.refs[branch]
        self.answer_json({})

    def head(self, repository: Repository, branch: str) -> dict[str, bytes]:
        if branch not in repository.refs:
            raise Refused(404, "RevisionNotFound")
        return repository.commits[repository.refs[branch]]

    def validate_yaml(self) -> None:
        self.answer_json({"warnings": [], "errors": []})

    # --- commits ----------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> None:
        repository = self.writable(name)
        there = self.head(repository, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if is_large(path) else "regular"
            if path in there:
                answer["oid"] = etag(path, there[path])
            answers.append(answer)
        self.answer_json({"files": answers})

    def commit(self, name: str, revision: str) -> None:
        repository = self.writable(name)
        files = dict(self.head(repository, revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                if (
                    value.get("parentCommit", repository.refs[revision])
                    != repository.refs[revision]
                ):
                    raise Refused(412, "PreconditionFailed")
                self.hub.messages.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise Refused(422, "LfsObjectMissing")
                mixed_up = self.hub.mixed_up.get(revision, value["oid"])
                files[value["path"]] = self.hub.stored[mixed_up]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        answer = {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        self.answer_json(answer)

    # --- LFS --------------------------------------------------------------------------------------

    @property
    def storage(self) -> str:
        """Another host, as the Hub's is."""
        return self.hub.url.replace("127.0.0.1", "localhost")

    def lfs_batch(self, name: str) -> None:
        self.writable(name)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            digest, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": digest, "size": size}
            if digest not in self.hub.stored:
                answer["actions"] = {
                    "upload": self.upload_action(digest, size),
                    "verify": {"href": f"{self.storage}/lfs/verify"},
                }
            answers.append(answer)
        self.answer_json({"transfer": "basic", "objects": answers})

    def upload_action(self, digest: str, size: int) -> dict[str, Any]:
        place, part_size = f"{self.storage}/lfs/{digest}", self.hub.part_size
        if part_size is None or size <= part_size:
            return {"href": place}
        num_parts = -(-size // part_size)
        header = {str(part): f"{place}/{part}" for part in range(1, num_parts + 1)}
        return {"href": f"{place}/complete", "header": header | {"chunk_size": str(part_size)}}

    def lfs_put(self, digest: str) -> None:
        self.keep(digest, self.body)

    def lfs_put_part(self, digest: str, part: str) -> None:
        self.hub.parts.setdefault(digest, {})[int(part)] = self.body
        self.answer(200, b"", {"ETag": oid(self.body)})

    def lfs_complete(self, digest: str) -> None:
        parts = self.hub.parts.pop(digest)
        self.keep(digest, b"".join(parts[part] for part in sorted(parts)))

    def keep(self, digest: str, content: bytes) -> None:
        if oid(content) != digest:
            raise Refused(400, "BadDigest")
        self.hub.stored[digest] = content
        self.answer_json({})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.stored.get(wanted["oid"])
        if stored is None or len(stored) != wanted["size"]:
            raise Refused(404, "LfsObjectMissing")
        self.answer_json({})
