"""The downloader when all is well: what is fetched and what is not, what the caller is told, proxies and certificates."""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_converters.remote import Address, Progress, RemoteFile
from qwen2_local.errors import FetchFailed, Offline, Qwen2LocalError
from tests.support.fetching import QUICK, SHORT, described, fetch, names, remote
from tests.support.hub_server import HubServer, Proxy

CHECKS = ["sha256", "blob", "size"]
NAME = "weights.dat"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.log.clear()
    server.faults.clear()
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def some(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


# What is fetched


def test_files_are_fetched_with_their_hashes_and_nothing_else_lies_there(hub: HubServer, folder: Path) -> None:
    contents = {f"file-{number}": some(number * 7000, number) for number in range(9)}
    given = fetch(folder, *(remote(hub, name, data, CHECKS[number % 3]) for number, (name, data) in enumerate(contents.items())))
    assert {name: (folder / name).read_bytes() for name in names(folder)} == contents
    assert given == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_an_empty_file_needs_no_request(hub: HubServer, folder: Path) -> None:
    fetch(folder, remote(hub, NAME, b""))
    assert (folder / NAME).read_bytes() == b""
    assert hub.log == []


def test_nothing_to_fetch_is_fine(folder: Path) -> None:
    assert fetch(folder) == {}


@pytest.mark.parametrize("check", ["sha256", "blob"])
def test_what_is_there_is_checked_and_not_fetched(hub: HubServer, folder: Path, check: str) -> None:
    file = remote(hub, NAME, some(5000), check)
    first = fetch(folder, file)
    hub.log.clear()
    phases = set[str]()
    assert fetch(folder, file, progress=lambda now: phases.add(now.phase)) == first
    assert hub.log == []
    assert phases == {"verifying"}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("there", [some(5000, 1), b"", some(9000, 2)])
def test_what_is_there_and_wrong_is_fetched_anew(hub: HubServer, folder: Path, there: bytes, check: str) -> None:
    folder.mkdir()
    (folder / NAME).write_bytes(there)
    fetch(folder, remote(hub, NAME, some(5000), check))
    assert (folder / NAME).read_bytes() == some(5000)


def test_a_new_revision_fetches_only_what_changed(hub: HubServer, folder: Path) -> None:
    weights, config = remote(hub, NAME, some(5000)), remote(hub, "config.json", b'{"a": 1}', "blob")
    fetch(folder, weights, config)
    hub.log.clear()
    fetch(folder, weights, remote(hub, "config.json", b'{"a": 2}', "blob"))
    assert (folder / "config.json").read_bytes() == b'{"a": 2}'
    assert [one.name for one in hub.log] == ["config.json"]


def test_another_source_goes_on_with_what_has_the_same_hash(hub: HubServer, folder: Path) -> None:
    data = some(50_000)
    hub.fault(NAME, times=9, cut_after=20_000)
    with pytest.raises(FetchFailed):
        fetch(folder, remote(hub, NAME, data), patience=type(QUICK)(tries=1))
    hub.log.clear()
    fetch(folder, described(NAME, data, lambda: Address(hub.sign(NAME, data)), etag="its own"))
    assert hub.sent(NAME) == 30_000


def left_by_a_failed_run(hub: HubServer, folder: Path, etag: str) -> None:
    """A finished file that has no hash, beside one that could not be fetched."""
    hub.fault("other", status=404)
    with pytest.raises(FetchFailed):
        fetch(folder, remote(hub, NAME, some(5000), "size", etag=etag), remote(hub, "other", b"x"), parallel=1)
    assert (folder / NAME).read_bytes() == some(5000)
    hub.log.clear()


def test_a_finished_file_without_a_hash_is_kept_while_the_listing_names_the_same_version(hub: HubServer, folder: Path) -> None:
    left_by_a_failed_run(hub, folder, "v1")
    fetch(folder, remote(hub, NAME, some(5000), "size", etag="v1"))
    assert hub.log == []
    assert (folder / NAME).read_bytes() == some(5000)
    assert not (folder / f"{NAME}.part.json").exists()


@pytest.mark.parametrize("etag", ["v2", None])
def test_another_version_or_none_is_fetched_anew(hub: HubServer, folder: Path, etag: str | None) -> None:
    left_by_a_failed_run(hub, folder, "v1")
    fetch(folder, remote(hub, NAME, some(5000, 1), "size", etag=etag))
    assert (folder / NAME).read_bytes() == some(5000, 1)


def test_a_finished_file_that_was_damaged_since_is_fetched_anew(hub: HubServer, folder: Path) -> None:
    left_by_a_failed_run(hub, folder, "v1")
    (folder / NAME).write_bytes(some(5000, 1))
    fetch(folder, remote(hub, NAME, some(5000), "size", etag="v1"))
    assert (folder / NAME).read_bytes() == some(5000)


def beginning(folder: Path, data: bytes, **sidecar: object) -> None:
    folder.mkdir()
    (folder / f"{NAME}.part").write_bytes(data)
    (folder / f"{NAME}.part.json").write_text(json.dumps(sidecar))


def test_a_beginning_of_another_file_is_thrown_away(hub: HubServer, folder: Path) -> None:
    beginning(folder, some(3000), file=[5000, hashlib.sha256(some(5000)).hexdigest()], version="", host="elsewhere")
    fetch(folder, remote(hub, NAME, some(5000, 1)))
    assert [one.headers.get("range") for one in hub.log] == [None]
    assert (folder / NAME).read_bytes() == some(5000, 1)


def test_a_beginning_longer_than_the_file_is_thrown_away(hub: HubServer, folder: Path) -> None:
    beginning(folder, some(6000), file=[5000, hashlib.sha256(some(5000)).hexdigest()], version="", host="elsewhere")
    hub.fault(NAME, wrong_byte=5)
    fetch(folder, remote(hub, NAME, some(5000)))
    assert (folder / NAME).read_bytes() == some(5000)


def test_a_beginning_that_nothing_vouches_for_is_thrown_away(hub: HubServer, folder: Path) -> None:
    beginning(folder, some(5000, 1), file=[5000, None], version="", host="elsewhere")
    fetch(folder, remote(hub, NAME, some(5000), "size"))
    assert (folder / NAME).read_bytes() == some(5000)


@pytest.mark.parametrize(
    "sidecar", [b"", b"[]", b"nonsense", b"[" * 20_000, b"\xff", b'{"file": 5}', b'{"file": [5000, null], "version": 5, "host": {}}']
)
def test_a_sidecar_that_is_none_is_no_harm(hub: HubServer, folder: Path, sidecar: bytes) -> None:
    folder.mkdir()
    (folder / f"{NAME}.part").write_bytes(some(3000, 1))
    (folder / f"{NAME}.part.json").write_bytes(sidecar)
    fetch(folder, remote(hub, NAME, some(5000), "size"))
    assert (folder / NAME).read_bytes() == some(5000)
    assert names(folder) == [NAME]


def test_files_of_other_people_are_left_alone(hub: HubServer, folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    fetch(folder, remote(hub, NAME, some(10)))
    assert names(folder) == ["notes.txt", NAME]


@pytest.mark.parametrize(
    "wrong",
    [{"size": -1}, {"sha256": "0" * 63}, {"sha256": "G" * 64}, {"blob_id": "0" * 64}, {"mirrors": (lambda: Address(""),)}],
)
def test_a_remote_file_that_cannot_be_is_a_mistake(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="'x' has"):
        RemoteFile(**{"name": "x", "size": 1, "resolve": lambda: Address(""), **wrong})  # type: ignore[arg-type]


# What the caller is told


def test_callbacks_come_in_the_callers_thread_and_a_done_file_is_in_place(hub: HubServer, folder: Path) -> None:
    contents = {f"file-{number}": some(50_000, number) for number in range(5)}
    threads, done = set[int](), []

    def on_done(file: RemoteFile, path: Path) -> None:
        threads.add(threading.get_ident())
        assert path.read_bytes() == contents[file.name]
        done.append(file.name)

    fetch(folder, *(remote(hub, *item) for item in contents.items()), on_done=on_done, progress=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}
    assert sorted(done) == sorted(contents)


def test_progress_adds_up(hub: HubServer, folder: Path) -> None:
    contents = {f"file-{number}": some(60_000 + number, number) for number in range(3)}
    for name in contents:
        hub.fault(name, pause=0.003)
    seen: list[Progress] = []
    fetch(folder, *(remote(hub, *item) for item in contents.items()), progress=seen.append)
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    assert seen[-1].done == seen[-1].total == sum(map(len, contents.values()))
    assert len(seen) > 6
    for name, data in contents.items():
        mine = [one for one in seen if one.file == name]
        assert (mine[-1].file_done, mine[-1].file_total) == (len(data), len(data))


def test_several_at_once_and_not_more(hub: HubServer, folder: Path) -> None:
    def running() -> int:
        return sum(1 for one in hub.log if one.sent < 20_000)

    files = [remote(hub, f"file-{number}", some(20_000, number)) for number in range(6)]
    for file in files:
        hub.fault(file.name, pause=0.005)
    most = 0

    def look(_: Progress) -> None:
        nonlocal most
        most = max(most, running())

    fetch(folder, *files, parallel=3, progress=look)
    assert 2 <= most <= 3


def test_files_are_begun_in_order(hub: HubServer, folder: Path) -> None:
    files = [remote(hub, f"file-{number}", some(100, number)) for number in (3, 1, 2)]
    fetch(folder, *files, parallel=1)
    assert [one.name for one in hub.log] == ["file-3", "file-1", "file-2"]


# The law of resuming


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 60_000),
    cuts=st.lists(st.integers(0, 30_000), max_size=6),
    runs=st.integers(1, 3),
    check=st.sampled_from(CHECKS),
    seed=st.integers(0, 9),
)
def test_however_often_it_breaks_the_file_is_right_and_no_byte_comes_twice(
    hub: HubServer, tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[int], runs: int, check: str, seed: int
) -> None:
    folder, data = tmp_path_factory.mktemp("law") / "model", some(size, seed)
    file = remote(hub, NAME, data, check)
    hub.log.clear()
    hub.faults.clear()
    for length in cuts:
        hub.fault(NAME, cut_after=length)
    for _ in range(len(cuts) + 1):
        try:
            fetch(folder, file, patience=type(QUICK)(tries=runs, first_s=0.001, longest_s=0.001))
            break
        except FetchFailed:
            assert not (folder / NAME).exists()
    assert (folder / NAME).read_bytes() == data
    assert names(folder) == [NAME]
    # A beginning of less than 512 bytes is not kept: it is too short to tell a model file from a web page.
    assert size <= hub.sent(NAME) <= size + 512 * len(cuts)


# Proxies and certificates


def test_a_proxy_of_the_environment_is_used(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        fetch(folder, remote(hub, NAME, some(5000)))
        assert proxy.log == [hub.url(NAME)]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        fetch(folder, remote(hub, "other", some(5000)))
        assert len(proxy.log) == 1
    assert names(folder) == ["other", NAME]


def test_a_proxy_that_is_away_is_named(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Offline, match="cannot be reached"):
        fetch(folder, remote(hub, NAME, some(5000)))


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "quic://127.0.0.1:9"])
def test_a_proxy_of_an_unknown_kind_is_a_clear_error(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    with pytest.raises(FetchFailed, match="proxy that the environment names"):
        fetch(folder, remote(hub, NAME, some(5000)))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody trusts, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    made = tmp_path_factory.mktemp("authority") / "both.pem"
    line = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=test",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(made), "-out", str(made.with_name("cert.pem"))]  # fmt: skip
    subprocess.run(line, check=True, capture_output=True)
    made.write_bytes(made.read_bytes() + made.with_name("cert.pem").read_bytes())
    return made


@pytest.fixture
def secure(authority: Path) -> Iterator[str]:
    """The address of a server with that certificate. /data is 5000 bytes, /away a redirect out of TLS."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/data" else 302)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            self.wfile.write(some(5000) if self.path == "/data" else b"")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.handle_error = lambda *_: None  # type: ignore[method-assign]
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"https://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_stranger_is_not_trusted(secure: str, folder: Path) -> None:
    with pytest.raises(FetchFailed, match="no certificate that is trusted here") as caught:
        fetch(folder, described(NAME, some(5000), lambda: Address(f"{secure}/data")))
    assert "SSL_CERT_FILE" in caught.value.hint


def test_a_certificate_that_the_environment_names_is_trusted(secure: str, authority: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.with_name("cert.pem")))
    fetch(folder, described(NAME, some(5000), lambda: Address(f"{secure}/data")))
    assert (folder / NAME).read_bytes() == some(5000)


def test_encryption_goes_through_a_proxy_in_a_tunnel(secure: str, authority: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.with_name("cert.pem")))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    file = described(NAME, some(5000), lambda: Address(f"{secure}/data", {"Authorization": "secret"}))
    with Proxy(password="Basic dXNlcjp3b3Jk") as proxy:
        monkeypatch.delenv("https_proxy", raising=False)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//user:word@"))
        fetch(folder, file)
        assert (folder / NAME).read_bytes() == some(5000)
        assert proxy.log == [secure.removeprefix("https://")]
        (folder / NAME).unlink()
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(FetchFailed, match="the proxy does not let the request through"):
            fetch(folder, file)


def test_no_redirect_leads_out_of_encryption(secure: str, authority: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.with_name("cert.pem")))
    with pytest.raises(FetchFailed, match="without encryption"):
        fetch(folder, described(NAME, some(5000), lambda: Address(f"{secure}/away")))


def test_certificates_that_are_not_there_are_a_clear_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (None, b"nonsense"):
        if content is not None:
            (tmp_path / "none.pem").write_bytes(content)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(Qwen2LocalError, match="SSL_CERT_FILE"):
            fetch(folder, described(NAME, some(10), lambda: Address("https://127.0.0.1:9/")))


# Patience


def test_pauses_grow_to_a_bound(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=4, status=503)
    started = time.monotonic()
    fetch(folder, remote(hub, NAME, some(10)), patience=type(QUICK)(tries=5, first_s=0.1, longest_s=0.2), timeouts=SHORT)
    # 0.1, 0.2, 0.2, 0.2, each at least by half.
    assert 0.35 <= time.monotonic() - started < 2.0


def test_a_server_that_gets_on_is_given_all_the_tries_it_needs(hub: HubServer, folder: Path) -> None:
    data = some(7_000_000)
    hub.fault(NAME, times=5, cut_after=1_200_000)
    fetch(folder, remote(hub, NAME, data), patience=type(QUICK)(tries=2, first_s=0.01))
    assert (folder / NAME).read_bytes() == data
    assert hub.sent(NAME) == len(data)


def test_a_server_that_gives_a_little_at_a_time_has_an_end(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=1000, cut_after=600)
    with pytest.raises(FetchFailed):
        fetch(folder, remote(hub, NAME, some(7_000_000)))
    assert len(hub.log) == QUICK.tries


# Through the hubs


@pytest.mark.parametrize("path", ["/Qwen/x/resolve/main/", "/models/Qwen/x/resolve/master/", "/api/v1/models/Qwen/x/repo?Revision=master&FilePath="])
def test_both_hubs_lead_to_the_file_and_only_they_see_the_token(hub: HubServer, folder: Path, path: str) -> None:
    contents = {"model.gguf": b"GGUF" + some(50_000), "config.json": b'{"model_type": "qwen2"}'}
    hub.add("Qwen/x", contents, token="secret")
    headers = {"Authorization": "Bearer secret", "Cookie": "m_session_id=secret"}
    hub.fault("model.gguf", cut_after=20_000)
    fetch(folder, *(described(name, data, lambda name=name: Address(f"{hub.endpoint}{path}{name}", headers)) for name, data in contents.items()))
    assert {name: (folder / name).read_bytes() for name in names(folder)} == contents
    assert hub.sent("model.gguf") == len(contents["model.gguf"])
    for one in hub.log:
        assert ("secret" in str(one.headers)) == (one.host == "hub")
