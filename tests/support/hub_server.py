"""A server on this machine that speaks as Hugging Face and ModelScope do, and plain HTTP; it logs every request and misbehaves on command.

    with HubServer() as hub:
        hub.add("Qwen/Qwen2-0.5B", {"config.json": b"{}", "model.safetensors": weights})
        hub.fault("model.safetensors", cut_after=1000)        # once, then well again
        HfApi(endpoint=hub.endpoint).model_info("Qwen/Qwen2-0.5B", files_metadata=True)

Two hosts (ports): the hub, and a CDN that the hub redirects large files to, with signed addresses. What huggingface_hub 2.4 asks for is
answered from how the real servers answer; tests/unit/test_hub_server.py holds it against the real client.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

HTML = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
LARGE = (".safetensors", ".gguf", ".bin", ".npz")
"""Endings of files that are kept with Git LFS: they have a SHA-256, and come from the CDN."""


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """One repository. commit: its revision; older ones stay reachable by theirs.

    token: what a request must carry as "Authorization: Bearer TOKEN"; None for a public one. gated: such a token lacks the consent.
    edit: changes a listing before it is sent, in either hub's form: hostile names, wrong sizes.
    """

    files: dict[str, bytes]
    commit: str = "c" * 40
    token: str | None = None
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[list[dict[str, Any]]], None] | None = None


@dataclass
class Fault:
    """What goes wrong with the requests for one file's bytes. `times`: how often still. on: "hub", "cdn", or "" for whoever sends the bytes."""

    name: str
    times: int
    on: str = ""
    cut_after: int | None = None
    """Bytes of the body, then the connection breaks."""
    stall_after: int | None = None
    """Bytes of the body, then nothing, until the server stops or the client goes away."""
    pause: float = 0.0
    """Seconds before every 1000 bytes."""
    wrong_byte: int | None = None
    """The byte at this offset of the file is another."""
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """With `status`, or beside the usual ones: {"Retry-After": "1"}, {"ETag": '"other"'}."""
    redirect: str = ""
    instead: bytes | None = None
    """This body, with 200: HTML, POINTER."""
    content_type: str = ""
    no_range: bool = False
    content_length: int | None = None
    """Announced, whatever is sent."""
    endless: bool = False
    """Zeros without end, after the file."""
    chunked: bool = False
    """No Content-Length."""
    hold: bool = False
    """No answer at all, until the server stops or the client goes away."""
    then: Callable[[], object] | None = None
    """Called when this has been sent, before the client can ask again."""


@dataclass
class Request:
    """One line of the log, which goes on while it is answered. host: "hub" or "cdn". sent: bytes of the body so far."""

    host: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0

    @property
    def name(self) -> str:
        """The file asked for."""
        parts = urlsplit(self.path)
        return parse_qs(parts.query).get("FilePath", [unquote(parts.path).rpartition("/")[2]])[0]


class HubServer:
    """Both hosts. `endpoint` and `cdn`: their addresses; `log`: all requests, in the order in which they came."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.plain: dict[str, bytes] = {}
        """Files at `url(name)`."""
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.signed: dict[str, tuple[str, bytes]] = {}
        """By signature: the name and bytes that a CDN address stands for. Clear it, and all addresses have expired."""
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self._servers = [_serve(self, host) for host in ("hub", "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **more: Any) -> Repo:
        """The repository `name` on both hubs. `more`: fields of Repo. Its commit follows from what it holds."""
        digest = hashlib.sha1(repr(sorted((name, git_blob_id(data)) for name, data in files.items())).encode()).hexdigest()
        repo = self.repos[name] = Repo(dict(files), **({"commit": digest} | more))
        self.repos[f"{name}@{repo.commit}"] = repo
        return repo

    def url(self, name: str) -> str:
        """The address of a plain file."""
        return f"{self.endpoint}/plain/{quote(name)}"

    def sign(self, name: str, data: bytes) -> str:
        """An address on the CDN."""
        signature = secrets.token_hex(8)
        self.signed[signature] = (name, data)
        return f"{self.cdn}/blobs/{quote(name, safe='')}?signature={signature}"

    def fault(self, name: str, times: int = 1, **what: Any) -> Fault:
        """The next `times` requests for the bytes of the file `name` end so; see Fault."""
        made = Fault(name, times, **what)
        self.faults.append(made)
        return made

    def take_fault(self, host: str, name: str, last: bool) -> Fault:
        """The fault for this request, used up by one; one that does nothing if there is none. last: this host is to send the bytes."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.name == name and (fault.on == host or (not fault.on and last)):
                    fault.times -= 1
                    return fault
        return Fault(name, 0)

    def sent(self, name: str) -> int:
        """Bytes of bodies sent for the file `name`, without redirects and errors."""
        return sum(one.sent for one in self.log if one.name == name and one.status in (200, 206) and one.method == "GET")

    def requests(self, name: str) -> list[Request]:
        """What was asked about the file `name`."""
        return [one for one in self.log if one.name == name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


def _serve(hub: HubServer, host: str) -> _Server:
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "host": host}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    entry: Request

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.entry = Request(self.host, self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        self.hub.log.append(self.entry)
        try:
            (self._cdn if self.host == "cdn" else self._hub)()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # Roads

    def _hub(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query).items()}
        if found := re.fullmatch(r"/plain/(.+)", path):
            name = found[1]
            data = self.hub.plain.get(name)
            return self._bytes(name, data, f'"{git_blob_id(data)}"') if data is not None else self._error(404)
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/repo/files|/repo|)", path):
            return self._modelscope(found[1], found[2], query)
        if found := re.fullmatch(r"/models/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._modelscope(found[1], "/repo", {"Revision": found[2], "FilePath": found[3]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path):
            return self._hf_api(found[1], found[2] or "revision", found[3] or "main", query)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._hf_resolve(found[1], found[2], found[3])
        return self._error(404)

    def _cdn(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        found = self.hub.signed.get(query.get("signature", [""])[0])
        if found is None:
            return self._error(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        # As S3 does: the CDN's ETag is not the file's hash.
        return self._bytes(*found, f'"{hashlib.md5(found[1]).hexdigest()}-1"')

    # Hugging Face

    def _hf_repo(self, name: str, revision: str) -> Repo | None:
        """The repository, or None when an error was sent, as huggingface_hub knows them."""
        latest = self.hub.repos.get(name)
        repo = latest if revision == "main" else self.hub.repos.get(f"{name}@{revision}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if latest is None or (latest.token is not None and not token):
            # So the real one answers, to tell strangers nothing of private repositories.
            self._error(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif latest.token is not None and token != latest.token:
            self._error(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif latest.gated:
            self._error(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted."})
        elif repo is None:
            self._error(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        else:
            return repo
        return None

    def _hf_api(self, name: str, kind: str, revision: str, query: dict[str, str]) -> None:
        repo = self._hf_repo(name, revision)
        if repo is None:
            return
        listing = [_hf_entry(path, data, kind) for path, data in sorted(repo.files.items())]
        if kind == "revision" and "blobs" not in query:
            listing = [{"rfilename": entry["rfilename"]} for entry in listing]
        if repo.edit:
            repo.edit(listing)
        info = {"id": name, "modelId": name, "sha": repo.commit, "private": repo.token is not None, "gated": repo.gated, "tags": [],
                "lastModified": "2026-01-02T03:04:05.000Z", "cardData": repo.card, "siblings": listing}  # fmt: skip
        self._json(listing if kind == "tree" else info)

    def _hf_resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._hf_repo(name, revision)
        if repo is None:
            return
        headers = {"X-Repo-Commit": repo.commit}
        data = repo.files.get(path)
        if data is None:
            return self._error(404, headers={**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if not path.endswith(LARGE):
            return self._bytes(path, data, f'"{git_blob_id(data)}"', headers)
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {**headers, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        return self._redirect(path, self.hub.sign(path, data), linked)

    # ModelScope

    def _modelscope(self, name: str, what: str, query: dict[str, str]) -> None:
        latest = self.hub.repos.get(name)
        revision = query.get("Revision", "master")
        repo = latest if revision == "master" else self.hub.repos.get(f"{name}@{revision}")
        if repo is None or (repo.token is not None and f"m_session_id={repo.token}" not in self.headers.get("Cookie", "")):
            return self._json({"Code": 10010205001, "Message": "record not found", "Success": False}, 404)
        if what == "/repo/files":
            listing = [_modelscope_entry(path, data, repo.commit) for path, data in sorted(repo.files.items())]
            if repo.edit:
                repo.edit(listing)
            return self._json({"Code": 200, "Data": {"Files": listing}, "Message": "success", "Success": True})
        if what == "":
            return self._json({"Code": 200, "Data": {"Name": name.rpartition("/")[2], **repo.card}, "Message": "success", "Success": True})
        path = query.get("FilePath", "")
        data = repo.files.get(path)
        if data is None:
            return self._json({"Code": 10010205004, "Message": "file not found", "Success": False}, 404)
        if path.endswith(LARGE):
            return self._redirect(path, self.hub.sign(path, data), {})
        return self._bytes(path, data, f'"{hashlib.sha256(data).hexdigest()}"')

    # Answers

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _body(self, data: bytes) -> None:
        if self.command != "HEAD":
            self.entry.sent += len(data)
            self.wfile.write(data)

    def _error(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self._body(body)

    def _json(self, value: Any, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(raw))})
        self._body(raw)

    def _redirect(self, name: str, target: str, headers: Mapping[str, str]) -> None:
        fault = self.hub.take_fault(self.host, name, last=False) if self.command == "GET" else Fault(name, 0)
        if fault.status is not None:
            return self._error(fault.status, headers=fault.headers)
        self._head(302, {**headers, **fault.headers, "Location": fault.redirect or target, "Content-Length": "0"})

    def _bytes(self, name: str, data: bytes, etag: str, headers: Mapping[str, str] | None = None) -> None:
        """The file, or the range asked for, or what a fault makes of it."""
        fault = self.hub.take_fault(self.host, name, last=True) if self.command == "GET" else Fault(name, 0)
        if fault.hold:
            return self._hold()
        if fault.status is not None:
            return self._error(fault.status, headers=fault.headers)
        if fault.redirect:
            return self._head(302, {"Location": fault.redirect, "Content-Length": "0"})
        if fault.wrong_byte is not None:
            data = data[: fault.wrong_byte] + bytes([data[fault.wrong_byte] ^ 255]) + data[fault.wrong_byte + 1 :]
        data = data if fault.instead is None else fault.instead
        etag = {"ETag": etag, **fault.headers}["ETag"]
        start, stop, status = 0, len(data), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not fault.no_range and fault.instead is None and self.headers.get("If-Range", etag) == etag:
            start, stop, status = int(wanted[1]), min(int(wanted[2] or len(data)) + 1 if wanted[2] else len(data), len(data)), 206
            if start >= len(data):
                return self._error(416, headers={"Content-Range": f"bytes */{len(data)}"})
        answer = {**(headers or {}), "Content-Type": fault.content_type or "application/octet-stream", "ETag": etag, **fault.headers}
        if status == 206:
            answer = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", **answer}
        if not fault.no_range:
            answer["Accept-Ranges"] = "bytes"
        if fault.chunked or (fault.endless and fault.content_length is None):
            answer["Connection"] = "close"
        else:
            answer["Content-Length"] = str(stop - start if fault.content_length is None else fault.content_length)
        self._head(status, answer)
        self._send(data[start:stop], fault)
        if fault.chunked or fault.endless or fault.content_length is not None:
            self.close_connection = True

    def _hold(self) -> None:
        while not self.hub.stopping.wait(0.02) and not _gone(self.connection):
            pass
        self.close_connection = True

    def _send(self, body: bytes, fault: Fault) -> None:
        if self.command == "HEAD":
            return
        end = min(len(body) if limit is None else limit for limit in (fault.cut_after, fault.stall_after))
        step = 1000 if fault.pause else max(end, 1)
        for begin in range(0, min(end, len(body)), step):
            self.hub.stopping.wait(fault.pause)
            self._body(body[begin : min(begin + step, end)])
        if fault.stall_after is not None:
            self._hold()
        if fault.then:
            fault.then()
        if fault.cut_after is not None or fault.stall_after is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        while fault.endless and not self.hub.stopping.is_set():
            self._body(bytes(65536))


def _gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)


def _pour(source: socket.socket, into: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            into.sendall(data)
        into.shutdown(socket.SHUT_WR)


def _hf_entry(path: str, data: bytes, kind: str) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = POINTER.replace(b"0" * 64, sha256.encode()).replace(b"size 123", b"size %d" % len(data))
    blob = git_blob_id(pointer if path.endswith(LARGE) else data)
    if kind == "tree":
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        return entry | ({"lfs": {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}} if path.endswith(LARGE) else {})
    entry = {"rfilename": path, "size": len(data), "blobId": blob}
    return entry | ({"lfs": {"sha256": sha256, "size": len(data), "pointerSize": len(pointer)}} if path.endswith(LARGE) else {})


def _modelscope_entry(path: str, data: bytes, commit: str) -> dict[str, Any]:
    return {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest(),
            "IsLFS": path.endswith(LARGE), "Revision": commit, "Mode": "33188"}  # fmt: skip


class Proxy:
    """An HTTP proxy: asks for whole addresses itself, and makes tunnels (CONNECT). `log` holds the addresses, of tunnels HOST:PORT.

    password: what Proxy-Authorization must be, if anything.
    """

    def __init__(self, password: str = "") -> None:
        self.log: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            headers: Message

            def log_message(self, *_: Any) -> None:
                pass

            def do_CONNECT(self) -> None:
                proxy.log.append(self.path)
                if password and self.headers.get("Proxy-Authorization") != password:
                    return self.send_error(407)
                host, _, port = self.path.partition(":")
                with socket.create_connection((host, int(port))) as onward:
                    self.send_response(200)
                    self.end_headers()
                    back = threading.Thread(target=_pour, args=(onward, self.connection), daemon=True)
                    back.start()
                    _pour(self.connection, onward)
                    back.join()
                self.close_connection = True

            def do_GET(self) -> None:
                proxy.log.append(self.path)
                parts = urlsplit(self.path)
                onward = http.client.HTTPConnection(parts.hostname or "", parts.port)
                onward.request("GET", f"{parts.path}?{parts.query}", headers={k: v for k, v in self.headers.items() if k != "Proxy-Connection"})
                answer = onward.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key not in ("Server", "Date", "Connection"):
                        self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)
                onward.close()

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
