"""A Hugging Face Hub on 127.0.0.1, in memory, from the standard library, that can misbehave.

    with FakeHub() as hub:
        hub.add("datasets", "someone/texts", {"README.md": ..., "data/0.parquet": ...})
        hub.faults.append(Fault("status:503", path=r"\\.parquet$", times=2, retry_after="1"))
        subprocess.run(..., env=os.environ | hub.env)      # another process uses it as the Hub
        hub.use_in_process(monkeypatch)                    # so does this one

Good enough for `datasets.load_dataset`, `transformers`' from_pretrained and `huggingface_hub`'s
listing and ranged reads. `ROUTES` maps a method and a path to a handler method: more of the Hub
(uploads, say) is one line there and one method.
"""

import contextlib
import hashlib
import itertools
import json
import re
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gpt2repro.system import hub_client, patience

KINDS = ("datasets", "models")


@dataclass
class Fault:
    """What goes wrong with the requests it matches.

    `kind`: "status:CODE" | "reset" (hangs up in mid-body) | "hang" (silence) | "short" (a body and
    a Content-Length that stop early) | "ignore_range" (200 and the whole file) | "flip" (a bit in
    the body) | "zeros" (instead of the body) | "drops" (a body byte by byte) | "drops of headers"
    (that never end) | "flood" (a body that never ends) | "answer" (whatever was asked) | "" (only
    `headers` are wrong).
    The first `skip` matching requests pass, the next `times` suffer, the rest pass.
    """

    kind: str
    path: str = ""  # a regular expression, searched in the decoded path
    method: str = "GET"
    times: float = 1
    skip: int = 0
    retry_after: str | None = None
    headers: dict[str, str] = field(default_factory=dict)  # instead of, or besides, the right ones
    answer: tuple[int, bytes] = (200, b"")
    num_hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method not in self.method.split("|") or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.num_hits >= self.times:
            return False
        self.num_hits += 1
        return True


@dataclass(frozen=True)
class Request:
    """One served request, as the log keeps it."""

    method: str
    path: str
    range: str | None
    status: int
    num_bytes: int  # of the body


@dataclass
class Repository:
    """Commits, oldest first; `refs` are branches and tags."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Make `files` the whole content of `ref`; returns the commit's hash."""
        content = repr([len(self.commits), sorted(files.items())]).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = dict(files)
        self.parents[commit] = self.refs.get(ref)
        self.refs[ref] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class FakeHub:
    """A context manager; the server lives as long as the context.

    Attributes: `url`; `env` for other processes; `faults`, tried in order for each request; `log`.
    `signed_links`: files are redirected to one-time addresses, as the Hub does to its storage.
    `renamed`: old names of repositories, which are redirected to their new ones.
    """

    def __init__(self, *, signed_links: bool = False) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.signed_links = signed_links
        self.renamed: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.link_numbers = itertools.count()
        self.num_bytes_flooded = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._home.cleanup()

    @property
    def env(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": self._home.name,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "XDG_CACHE_HOME": self._home.name,
        }

    def use_in_process(self, monkeypatch: Any) -> None:
        """Make this process's `huggingface_hub`, `datasets` and `transformers` use this Hub."""
        import datasets.config
        from huggingface_hub import HfFileSystem, constants, hf_api

        HfFileSystem.clear_instance_cache()  # an earlier Hub may have had the same port
        home = self._home.name
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        # Made once by transformers, for the Hub of its first call. An earlier one has none.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{home}/datasets")

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> Repository:
        """A repository ("datasets" or "models") with one commit on main."""
        assert kind in KINDS
        repository = self.repositories[kind, name] = Repository(kind, name)
        repository.commit(files)
        return repository

    def requests(self, path: str = "", method: str = "GET") -> list[Request]:
        """The logged requests whose decoded path has a match of the regular expression."""
        return [r for r in self.log if r.method == method and re.search(path, r.path)]

    def num_bytes(self, path: str = "") -> int:
        return sum(request.num_bytes for request in self.requests(path))


class NoSleep:
    """The Hub client's own backoff, without the waiting."""

    @staticmethod
    def sleep(seconds: float) -> None:
        assert seconds < 60


def impatient(monkeypatch: Any) -> None:
    """Let this process wait for a Hub that misbehaves no longer than a test can."""
    monkeypatch.setattr(patience, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(patience, "LONGEST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr(hub_client, "LONGEST_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(hub_client, "REQUEST_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(hub_client, "SLOW_AFTER_SECONDS", 2.0)
    monkeypatch.setattr(patience, "LONGEST_QUESTION_SECONDS", 4.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time", NoSleep)


# (method, regular expression over the decoded path, handler method); the first match serves. Names
# may lack the owner, so repository routes try the longest name that exists.
NAME = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
ROUTES = (
    ("GET|HEAD", r"/signed/(?P<link>\d+)", "signed_link"),
    ("GET", rf"/api/(?P<kind>datasets|models)/{NAME}/tree/(?P<rest>.+)", "tree"),
    ("POST", rf"/api/(?P<kind>datasets|models)/{NAME}/paths-info/(?P<rest>.+)", "paths_info"),
    ("GET", rf"/api/(?P<kind>datasets|models)/{NAME}/revision/(?P<rest>.+)", "info"),
    ("GET", rf"/api/(?P<kind>datasets|models)/{NAME}/refs", "refs"),
    ("GET", rf"/api/(?P<kind>datasets|models)/{NAME}/commits/(?P<rest>.+)", "commits"),
    ("GET", rf"/api/(?P<kind>datasets|models)/{NAME}", "info"),
    ("GET|HEAD", rf"/(?P<kind>datasets)/{NAME}/resolve/(?P<rest>.+)", "resolve"),
    ("GET|HEAD", rf"/{NAME}/resolve/(?P<rest>.+)", "resolve"),
)


class Refused(Exception):
    """An answer that is an error of the Hub's."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def log_message(self, *_: Any) -> None:
        """Silence: `FakeHub.log` is the log."""

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.decoded_path, self.query = unquote(parts.path), parse_qs(parts.query)
        with self.hub.lock:
            hits = (f for f in self.hub.faults if f.strikes(self.command, self.decoded_path))
            self.fault = next(hits, None)
        if self.fault and self.fault.kind == "hang":
            self.record(0, 0)
            self.hub.closing.wait(60)
            self.close_connection = True
            return
        if self.fault and self.fault.kind == "reset" and self.command == "HEAD":
            self.record(0, 0)
            self.reset()
            return
        if self.fault and self.fault.kind == "drops of headers":
            self.record(200, 0)
            self.send_in_drops(b"HTTP/1.1 200 OK\r\nX-Long: " + bytes(10_000).hex().encode())
            return
        if self.fault and self.fault.kind == "answer":
            self.answer(*self.fault.answer, {})
            return
        if self.fault and self.fault.kind.startswith("status:"):
            headers = {"Retry-After": self.fault.retry_after} if self.fault.retry_after else {}
            self.answer(int(self.fault.kind.removeprefix("status:")), b"out of order", headers)
            return
        try:
            self.redirect() or self.route()
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code}
            self.answer(refusal.status, b"", headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def redirect(self) -> bool:
        for old, new in self.hub.renamed.items():
            taken = any(name == old for _, name in self.hub.repositories)  # by a new one
            if f"/{old}" in self.path and not taken:
                self.answer(307, b"", {"Location": self.path.replace(old, new)})
                return True
        return False

    def route(self) -> None:
        for methods, pattern, name in ROUTES:
            match = re.fullmatch(pattern, self.decoded_path)
            if match and self.command in methods.split("|"):
                handle: Callable[..., None] = getattr(self, name)
                handle(**match.groupdict())
                return
        raise Refused(404, "NotFound")

    # --- handlers ---------------------------------------------------------------------------------

    def info(self, kind: str, name: str, rest: str = "main") -> None:
        repository, commit, _ = self.find(kind, name, rest)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        answer = {"id": name, "_id": "0" * 24, "sha": commit, "siblings": siblings}
        self.answer_json(answer | {"tags": [], "private": False, "downloads": 0, "likes": 0})

    def refs(self, kind: str, name: str) -> None:
        refs = self.find(kind, name, "main")[0].refs
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit}
            for ref, commit in refs.items()
        ]
        self.answer_json({"branches": branches, "converts": [], "tags": []})

    def commits(self, kind: str, name: str, rest: str) -> None:
        """The newest first."""
        repository, commit, _ = self.find(kind, name, rest)
        line: list[str] = []
        while commit:
            line, commit = [*line, commit], repository.parents[commit] or ""
        about = {"title": "", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        self.answer_json([{"id": commit, **about} for commit in line])

    def tree(self, kind: str, name: str, rest: str) -> None:
        repository, commit, folder = self.find(kind, name, rest)
        files = repository.commits[commit]
        if folder and not any(path.startswith(f"{folder}/") for path in files):
            raise Refused(404, "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict] = {}
        for path in sorted(files):
            inside = path.removeprefix(f"{folder}/") if folder else path
            if folder and inside == path:
                continue
            for parent in PurePosixPath(inside).parents[:-1] if recursive else ():
                full = str(PurePosixPath(folder) / parent)
                entries[full] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": full}
            if recursive or "/" not in inside:
                entries[path] = entry(path, files[path])
            else:
                full = str(PurePosixPath(folder) / inside.split("/")[0])
                entries[full] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": full}
        self.answer_json(list(entries.values()))

    def paths_info(self, kind: str, name: str, rest: str) -> None:
        repository, commit, _ = self.find(kind, name, rest)
        files = repository.commits[commit]
        form = parse_qs(self.body.decode())
        paths = form["paths"] if form else json.loads(self.body)["paths"]
        self.answer_json([entry(path, files[path]) for path in paths if path in files])

    def resolve(self, name: str, rest: str, kind: str = "models") -> None:
        repository, commit, path = self.find(kind, name, rest)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(path, content)}"'}
        if self.hub.signed_links and is_large(path):
            with self.hub.lock:
                link = str(next(self.hub.link_numbers))
                self.hub.links[link] = self.decoded_path
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
            self.answer(302, b"", headers | {"Location": f"{self.hub.url}/signed/{link}"})
            return
        self.answer_file(content, headers)

    def signed_link(self, link: str) -> None:
        path = self.hub.links.pop(link, None)
        if path is None:
            raise Refused(403, "ExpiredLink")
        match = re.fullmatch(rf"/(?:(?P<kind>datasets)/)?{NAME}/resolve/(?P<rest>.+)", path)
        assert match
        repository, commit, path = self.find(
            match["kind"] or "models", match["name"], match["rest"]
        )
        self.answer_file(repository.commits[commit][path], {})

    # --- parts ------------------------------------------------------------------------------------

    def find(self, kind: str, name: str, rest: str) -> tuple[Repository, str, str]:
        """Repository, commit and path of "REVISION/PATH", where a ref may have slashes."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            raise Refused(401, "RepoNotFound")
        if repository.gated:
            raise Refused(403, "GatedRepo")
        for ref in [*repository.refs, *repository.commits]:
            if rest == ref or rest.startswith(f"{ref}/"):
                commit = repository.resolve(ref)
                assert commit
                return repository, commit, rest[len(ref) + 1 :]
        raise Refused(404, "RevisionNotFound")

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        headers |= {"Accept-Ranges": "bytes"}
        if not wanted or (self.fault and self.fault.kind == "ignore_range"):
            self.answer(200, content, headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
            return
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self.answer(206, content[start:end], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        kind = self.fault.kind if self.fault else ""
        if kind == "short":
            body = body[: len(body) // 2]
        if kind == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 16]) + body[middle + 1 :]
        if kind == "zeros":
            body = bytes(len(body))
        sent = body[: len(body) // 2] if kind == "reset" else body
        sent = b"" if self.command == "HEAD" else sent
        self.record(status, len(sent))  # before the client can have it, and look at the log
        headers = headers | {"Content-Length": str(len(body))}
        if kind == "flood":
            headers |= {"Content-Length": str(2**40)}
        self.send_response(status)
        for name, value in (headers | (self.fault.headers if self.fault else {})).items():
            self.send_header(name, value)
        try:
            self.end_headers()
            if kind == "drops":
                self.send_in_drops(sent)
            else:
                self.wfile.write(sent)
            while kind == "flood" and self.command == "GET" and not self.hub.closing.is_set():
                self.wfile.write(bytes(2**20))
                self.hub.num_bytes_flooded += 2**20
            self.wfile.flush()
        except OSError:  # the client hung up: a range ignored, a thread closed
            self.close_connection = True
        if kind == "reset":
            self.reset()

    def send_in_drops(self, content: bytes) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client hung up
            for byte in content:
                if self.hub.closing.wait(0.05):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()

    def reset(self) -> None:
        """Hang up with a RST instead of a FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

    def record(self, status: int, num_bytes: int) -> None:
        asked = self.headers.get("Range")
        self.hub.log.append(Request(self.command, self.decoded_path, asked, status, num_bytes))


def is_large(path: str) -> bool:
    return path.endswith((".parquet", ".safetensors", ".bin", ".gz"))


@lru_cache
def oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache
def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    return oid(content) if is_large(path) else git_oid(content)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the listings describe it."""
    answer: dict[str, Any] = {"type": "file", "oid": git_oid(content), "path": path}
    answer["size"] = len(content)
    if is_large(path):
        answer["lfs"] = {"oid": oid(content), "size": len(content), "pointerSize": 134}
    return answer
