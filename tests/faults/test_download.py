"""What can go wrong with a download, and how it ends: right to the byte, or with an error that says what to do, and nothing wrong in place."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from qwen2_converters import partial
from qwen2_converters.download import read_range
from qwen2_converters.remote import Address
from qwen2_local import files
from qwen2_local.errors import BadFile, Cancelled, DoesNotFit, FetchFailed, Offline, Qwen2LocalError, UsageError
from tests.support.fetching import QUICK, SHORT, described, fetch, names, remote
from tests.support.hub_server import HTML, POINTER, HubServer

ROOT = Path(__file__).parents[2]
DATA = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(100_000)
NAME = "weights.dat"
CHECKS = ["sha256", "blob", "size"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def whole(folder: Path, data: bytes = DATA) -> bool:
    """Nothing is there but the file, and that is right."""
    return names(folder) == [NAME] and (folder / NAME).read_bytes() == data


def begin(hub: HubServer, folder: Path, length: int, check: str = "sha256") -> None:
    """Has `length` bytes of the file there, as an earlier run left them."""
    hub.fault(NAME, times=2, cut_after=length)
    with pytest.raises(FetchFailed):
        fetch(folder, remote(hub, NAME, DATA, check), patience=type(QUICK)(tries=1))
    assert (folder / f"{NAME}.part").stat().st_size == length
    hub.faults.clear()
    hub.log.clear()


# 1, 12, 15: broken off


@pytest.mark.parametrize("check", CHECKS)
def test_a_cut_connection_is_taken_up_where_it_broke(hub: HubServer, folder: Path, check: str) -> None:
    hub.fault(NAME, cut_after=30_000)
    hub.fault(NAME, cut_after=20_000)
    fetch(folder, remote(hub, NAME, DATA, check))
    assert whole(folder)
    assert hub.sent(NAME) == len(DATA)
    assert [one.headers.get("range") for one in hub.log] == [None, "bytes=30000-", "bytes=50000-"]


@pytest.mark.parametrize("check", CHECKS)
def test_the_next_run_fetches_only_what_is_missing(hub: HubServer, folder: Path, check: str) -> None:
    begin(hub, folder, 70_000, check)
    hashes = fetch(folder, remote(hub, NAME, DATA, check))
    assert whole(folder)
    assert hashes == {NAME: hashlib.sha256(DATA).hexdigest()}
    assert hub.sent(NAME) == 30_000


def test_a_network_that_stays_away_ends_after_a_few_tries(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=100, cut_after=0)
    with pytest.raises(FetchFailed, match=r"weights\.dat could not be fetched: the connection to 127.* broke") as caught:
        fetch(folder, remote(hub, NAME, DATA))
    assert len(hub.log) == QUICK.tries
    assert "what has come is kept" in caught.value.hint
    assert not (folder / NAME).exists()


def test_a_server_that_is_not_there_is_offline(folder: Path) -> None:
    with pytest.raises(Offline, match="cannot be reached"):
        fetch(folder, described(NAME, DATA, lambda: Address("http://127.0.0.1:9/x")))


def test_a_stalled_server_is_asked_again(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, stall_after=40_000)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)
    assert hub.sent(NAME) == len(DATA)


def test_a_slow_server_is_waited_for(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, pause=0.005)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)
    assert len(hub.log) == 1


def test_a_body_without_a_length_that_ends_early_is_taken_up(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, chunked=True, cut_after=40_000)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)
    assert hub.sent(NAME) == len(DATA)


# 3, 6: wrong bytes


@pytest.mark.parametrize("check", ["sha256", "blob"])
def test_wrong_bytes_are_fetched_once_more(hub: HubServer, folder: Path, check: str) -> None:
    hub.fault(NAME, wrong_byte=50_000)
    fetch(folder, remote(hub, NAME, DATA, check))
    assert whole(folder)
    assert len(hub.log) == 2


@pytest.mark.parametrize("check", ["sha256", "blob"])
def test_bytes_that_stay_wrong_are_set_aside(hub: HubServer, folder: Path, check: str) -> None:
    file = remote(hub, NAME, DATA, check)
    hub.fault(NAME, times=100, wrong_byte=50_000)
    with pytest.raises(BadFile, match=r"weights\.dat is damaged at its source: twice its (sha256|git blob id) was wrong") as caught:
        fetch(folder, file)
    assert str(folder / f"{NAME}.bad") in caught.value.hint
    assert len(hub.log) == 2
    assert f"{NAME}.bad" in names(folder)
    assert NAME not in names(folder)


def test_setting_aside_never_closes_a_file_twice(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a closed file may be that of another thread's by then."""
    folder.mkdir()
    part = partial.Partial(remote(hub, NAME, DATA), folder, lambda _: None)
    plain = os.open
    monkeypatch.setattr(
        partial.os, "open", lambda path, flags, *more: plain("/nowhere/else", flags) if flags & os.O_EXCL else plain(path, flags, *more)
    )
    with pytest.raises(FileNotFoundError), part:
        part.set_aside()


@pytest.mark.parametrize("length", [1000, 50_000, 99_999])
def test_a_beginning_that_was_damaged_on_disk_is_found_out(hub: HubServer, folder: Path, length: int) -> None:
    begin(hub, folder, length)
    with (folder / f"{NAME}.part").open("r+b") as part:
        part.seek(length // 2)
        part.write(bytes([DATA[length // 2] ^ 1]))
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)


@pytest.mark.parametrize(
    ("name", "body", "what"),
    [
        ("model.safetensors", HTML, "an HTML page, not a model file"),
        ("model.gguf", HTML, "an HTML page, not a model file"),
        ("config.json", HTML, "an HTML page, not a model file"),
        ("model.safetensors", POINTER, "a Git LFS pointer, not a model file"),
        ("tokenizer.json", POINTER, "a Git LFS pointer, not a model file"),
        ("model.gguf", b'{"error": "Please log in"}', "JSON text, not a model file"),
        ("model.safetensors", b"", r"has 0 bytes at 127.0.0.1, 100000 were announced"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_page_in_place_of_a_file_is_named(hub: HubServer, folder: Path, name: str, body: bytes, what: str, chunked: bool) -> None:
    hub.fault(name, times=100, instead=body, content_type="text/html", chunked=chunked)
    with pytest.raises((BadFile, FetchFailed), match="could not be fetched" if chunked and not body else what):
        fetch(folder, remote(hub, name, DATA))
    assert name not in names(folder)


def test_a_log_in_page_does_not_cost_what_has_come(hub: HubServer, folder: Path) -> None:
    begin(hub, folder, 70_000)
    hub.fault(NAME, instead=HTML)
    with pytest.raises(BadFile, match="HTML"):
        fetch(folder, remote(hub, NAME, DATA))
    hub.log.clear()
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)
    assert hub.sent(NAME) == 30_000


@pytest.mark.parametrize("length", [10, 99_999, 100_001])
@pytest.mark.parametrize("check", CHECKS)
def test_another_size_than_announced_is_refused_before_the_body(hub: HubServer, folder: Path, length: int, check: str) -> None:
    hub.fault(NAME, content_length=length)
    with pytest.raises(BadFile, match=f"has {length} bytes at 127.0.0.1, 100000 were announced"):
        fetch(folder, remote(hub, NAME, DATA, check))
    assert NAME not in names(folder)


@pytest.mark.parametrize("check", CHECKS)
def test_a_body_without_end_is_not_written(hub: HubServer, folder: Path, check: str) -> None:
    hub.fault(NAME, endless=True)
    with pytest.raises(BadFile, match=r"does not end: .* more than its 100000 bytes"):
        fetch(folder, remote(hub, NAME, DATA, check))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= len(DATA)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\0b", "..", "", "con", "x" * 250])
def test_hostile_names_are_refused_before_the_first_byte(hub: HubServer, folder: Path, name: str) -> None:
    with pytest.raises(BadFile):
        fetch(folder, remote(hub, NAME, DATA), described(name, DATA, lambda: Address(hub.url(NAME))))
    assert hub.log == []


@pytest.mark.parametrize("pair", [("a", "A"), ("a", "a.part"), ("a", "A.PART.json"), ("a.bad", "a"), ("a", "a")])
def test_names_that_meet_on_disk_are_refused(hub: HubServer, folder: Path, pair: tuple[str, str]) -> None:
    with pytest.raises(BadFile, match="one file on some systems"):
        fetch(folder, *(remote(hub, name, DATA) for name in pair))


def test_a_link_in_the_place_of_a_beginning_is_not_followed(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (tmp_path / "precious").write_text("mine")
    for name in (NAME, f"{NAME}.part", f"{NAME}.part.json", f"{NAME}.bad"):
        (folder / name).symlink_to(tmp_path / "precious")
        with pytest.raises(UsageError, match="in the way"):
            fetch(folder, remote(hub, NAME, DATA))
        (folder / name).unlink()
    assert (tmp_path / "precious").read_text() == "mine"


# 15: servers


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(hub: HubServer, folder: Path, status: int) -> None:
    hub.fault(NAME, times=3, status=status)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)


@pytest.mark.parametrize("after", ["1", "date"])
def test_a_server_that_asks_for_a_pause_gets_it(hub: HubServer, folder: Path, after: str) -> None:
    hub.fault(NAME, status=429, headers={"Retry-After": formatdate(time.time() + 2, usegmt=True) if after == "date" else after})
    started = time.monotonic()
    fetch(folder, remote(hub, NAME, DATA))
    assert time.monotonic() - started > 0.9
    assert whole(folder)


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, status=503, headers={"Retry-After": "3600"})
    with pytest.raises(FetchFailed, match="asks to wait 3600 seconds"):
        fetch(folder, remote(hub, NAME, DATA))


@pytest.mark.parametrize(("status", "what"), [(404, "does not have it"), (451, "answers with status 451"), (407, "the proxy asks for a password")])
def test_a_final_answer_is_taken_as_one(hub: HubServer, folder: Path, status: int, what: str) -> None:
    hub.fault(NAME, times=9, status=status)
    with pytest.raises(FetchFailed, match=what):
        fetch(folder, remote(hub, NAME, DATA))
    assert len(hub.log) == 1


@pytest.mark.parametrize("check", CHECKS)
def test_a_changed_etag_starts_the_file_over(hub: HubServer, folder: Path, check: str) -> None:
    begin(hub, folder, 70_000, check)
    fetch(folder, remote(hub, NAME, OTHER, check))
    assert whole(folder, OTHER)
    assert hub.requests(NAME)[-1].headers.get("range") is None


def test_a_stale_beginning_does_not_use_up_the_second_chance(hub: HubServer, folder: Path) -> None:
    file = remote(hub, NAME, OTHER)
    hub.plain[NAME] = DATA
    hub.fault(NAME, cut_after=30_000, then=lambda: hub.plain.update({NAME: OTHER}))
    # The rest is of another version than the beginning; then a wrong byte; then all is well.
    hub.fault(NAME, headers={})
    hub.fault(NAME, wrong_byte=5)
    fetch(folder, file)
    assert whole(folder, OTHER)
    assert [one.headers.get("range") for one in hub.log] == [None, "bytes=30000-", None, None]


def test_a_file_that_changes_between_two_tries_starts_over(hub: HubServer, folder: Path) -> None:
    file = remote(hub, NAME, OTHER, "size")
    hub.plain[NAME] = DATA
    hub.fault(NAME, cut_after=30_000, then=lambda: hub.plain.update({NAME: OTHER}))
    fetch(folder, file)
    assert whole(folder, OTHER)


def test_a_server_whose_etag_is_never_the_same_ends(hub: HubServer, folder: Path) -> None:
    for number in range(100):
        hub.fault(NAME, cut_after=30_000, headers={"ETag": f'"{number}"'})
    with pytest.raises(FetchFailed):
        fetch(folder, remote(hub, NAME, DATA, "size"))
    assert len(hub.log) <= 2 * QUICK.tries


def test_without_hash_or_etag_nothing_is_taken_up(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=2, cut_after=70_000, headers={"ETag": 'W/"weak"'})
    fetch(folder, remote(hub, NAME, DATA, "size"))
    assert whole(folder)
    assert hub.requests(NAME)[-1].headers.get("range") is None


@pytest.mark.parametrize("check", CHECKS)
def test_a_server_that_ignores_ranges_starts_over(hub: HubServer, folder: Path, check: str) -> None:
    begin(hub, folder, 70_000, check)
    hub.fault(NAME, times=100, no_range=True)
    fetch(folder, remote(hub, NAME, DATA, check))
    assert whole(folder)
    assert hub.sent(NAME) == len(DATA)


@pytest.mark.parametrize("headers", [{"Content-Range": "bytes 0-99999/100000"}, {"Content-Range": "nonsense"}, {"Content-Range": ""}])
def test_another_range_than_asked_for_is_not_written(hub: HubServer, folder: Path, headers: dict[str, str]) -> None:
    begin(hub, folder, 70_000)
    hub.fault(NAME, headers=headers)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)
    assert [one.headers["range"] for one in hub.log] == ["bytes=70000-", "bytes=70000-"]


def test_another_size_in_the_range_is_refused(hub: HubServer, folder: Path) -> None:
    begin(hub, folder, 70_000)
    hub.fault(NAME, headers={"Content-Range": "bytes 70000-99999/100001"})
    with pytest.raises(BadFile, match="has 100001 bytes at"):
        fetch(folder, remote(hub, NAME, DATA))
    assert (folder / f"{NAME}.part").stat().st_size == 70_000


def test_a_compressed_answer_is_refused(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, headers={"Content-Encoding": "gzip"})
    with pytest.raises(FetchFailed, match="compressed"):
        fetch(folder, remote(hub, NAME, DATA))


def test_an_expired_address_is_resolved_again(hub: HubServer, folder: Path) -> None:
    given: list[str] = []

    def resolve() -> Address:
        given.append(hub.sign(NAME, DATA))
        return Address(given[-1])

    hub.fault(NAME, cut_after=30_000, then=hub.signed.clear)
    fetch(folder, described(NAME, DATA, resolve))
    assert whole(folder)
    assert len(given) == 2
    assert sorted(one.status for one in hub.log) == [200, 206, 403]


def test_an_address_that_is_always_refused_says_so(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=100, status=403)
    with pytest.raises(FetchFailed, match=r"weights\.dat: 127.* refuses it \(status 403\)") as caught:
        fetch(folder, remote(hub, NAME, DATA))
    assert "HF_TOKEN" in caught.value.hint
    assert len(hub.log) == 2


def test_what_resolving_raises_comes_through(hub: HubServer, folder: Path) -> None:
    def resolve() -> Address:
        raise FetchFailed("the repository is gone.")

    with pytest.raises(FetchFailed, match="the repository is gone"):
        fetch(folder, described(NAME, DATA, resolve))


# 15: redirects


@pytest.mark.parametrize("name", ["Authorization", "Cookie", "X-Api-Key"])
def test_no_secret_goes_to_another_host(hub: HubServer, folder: Path, name: str) -> None:
    file = described(NAME, DATA, lambda: Address(hub.url(NAME), {name: "secret"}))
    hub.plain[NAME] = DATA
    hub.fault(NAME, redirect=hub.sign(NAME, DATA))
    fetch(folder, file)
    seen = {one.host: one.headers.get(name.lower()) for one in hub.log}
    assert seen == {"hub": "secret", "cdn": None}


def test_a_secret_does_not_come_back_from_another_host(hub: HubServer, folder: Path) -> None:
    hub.plain[NAME] = DATA
    hub.fault(NAME, on="hub", redirect=hub.sign(NAME, DATA))
    hub.fault(NAME, on="cdn", redirect=hub.url(NAME))
    fetch(folder, described(NAME, DATA, lambda: Address(hub.url(NAME), {"Authorization": "secret"})))
    assert [(one.host, one.headers.get("authorization")) for one in hub.log] == [("hub", "secret"), ("cdn", None), ("hub", None)]


def test_no_cookie_is_kept(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, status=503, headers={"Set-Cookie": "track=me; Path=/"})
    fetch(folder, remote(hub, NAME, DATA))
    assert [one.headers.get("cookie") for one in hub.log] == [None, None]


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("file:///etc/passwd", "'file' is not fetched"),
        ("ftp://127.0.0.1/x", "'ftp' is not fetched"),
        ("http://user:word@127.0.0.1/x", "password"),
        ("http://127.0.0.1:x/", "an address that is none"),
    ],
)
def test_a_redirect_that_leads_astray_is_refused(hub: HubServer, folder: Path, target: str, what: str) -> None:
    hub.fault(NAME, times=100, redirect=target)
    with pytest.raises(FetchFailed, match=what):
        fetch(folder, remote(hub, NAME, DATA))
    assert len(hub.log) == 1


def test_redirects_in_circles_end(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=1000, redirect=hub.url(NAME))
    with pytest.raises(FetchFailed, match="circles"):
        fetch(folder, remote(hub, NAME, DATA))
    assert len(hub.log) == 11


def test_a_signature_is_in_no_message(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=100, on="cdn", status=500)
    address = hub.sign(NAME, DATA)
    with pytest.raises(FetchFailed) as caught:
        fetch(folder, described(NAME, DATA, lambda: Address(address)))
    assert address.rpartition("=")[2] not in str(caught.value)


# Mirrors


@pytest.mark.parametrize("fault", [{"status": 404}, {"status": 500}, {"cut_after": 40_000}, {"instead": HTML}, {"wrong_byte": 5}])
def test_a_mirror_takes_over(hub: HubServer, folder: Path, fault: dict[str, object]) -> None:
    hub.plain[NAME] = DATA
    hub.fault(NAME, times=100, on="hub", **fault)
    file = described(NAME, DATA, lambda: Address(hub.url(NAME)), mirrors=(lambda: Address(hub.sign(NAME, DATA)),))
    fetch(folder, file)
    assert whole(folder)


def test_a_mirror_goes_on_where_the_first_broke_off(hub: HubServer, folder: Path) -> None:
    hub.plain[NAME] = DATA
    hub.fault(NAME, on="hub", cut_after=40_000)
    hub.fault(NAME, times=100, on="hub", status=500)
    fetch(folder, described(NAME, DATA, lambda: Address(hub.url(NAME)), mirrors=(lambda: Address(hub.sign(NAME, DATA)),)))
    assert whole(folder)
    assert hub.sent(NAME) == len(DATA)


def test_a_mirror_with_other_bytes_is_not_believed(hub: HubServer, folder: Path) -> None:
    hub.plain[NAME] = DATA
    hub.fault(NAME, times=100, on="hub", status=404)
    file = described(NAME, DATA, lambda: Address(hub.url(NAME)), mirrors=(lambda: Address(hub.sign(NAME, OTHER)),))
    with pytest.raises(BadFile, match="damaged at its source"):
        fetch(folder, file)
    assert NAME not in names(folder)


# 11: disk


def test_a_full_disk_is_foreseen(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 99_999)
    with pytest.raises(DoesNotFit, match="disk is full"):
        fetch(folder, remote(hub, NAME, DATA))
    assert hub.log == []


def test_what_has_come_is_no_longer_needed_on_disk(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(hub, folder, 70_000)
    monkeypatch.setattr(files, "free_bytes", lambda _: 30_000)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)


def test_a_disk_that_fills_up_anyway_gets_its_space_back(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: memoryview) -> int:
        if os.lseek(handle, 0, os.SEEK_CUR) >= 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    write = os.write
    first = remote(hub, "first.dat", b"first")
    monkeypatch.setattr(partial.os, "write", full)
    with pytest.raises(DoesNotFit, match=r"0\.00 GB are needed"):
        fetch(folder, first, remote(hub, NAME, DATA), parallel=1)
    assert names(folder) == ["first.dat"]


# 16, cancel


def test_two_downloads_into_one_folder(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, stall_after=40_000)
    file = remote(hub, NAME, DATA)
    started, told = threading.Event(), list[str]()
    first = threading.Thread(target=lambda: fetch(folder, file, progress=lambda _: started.set()))
    first.start()
    assert started.wait(5)
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        fetch(folder, file)
    fetch(folder, file, wait_s=10, on_wait=told.append)
    first.join()
    assert told[0] == f"process {os.getpid()}"
    assert whole(folder)
    assert hub.sent(NAME) == len(DATA)


def test_cancelling_is_quick_and_keeps_what_has_come(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, stall_after=40_000)
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        fetch(folder, remote(hub, NAME, DATA), cancelled=cancelled, timeouts=type(SHORT)(read=60))
    assert time.monotonic() - started < 2
    assert (folder / f"{NAME}.part").stat().st_size == 40_000
    hub.log.clear()
    fetch(folder, remote(hub, NAME, DATA))
    assert hub.sent(NAME) == 60_000


def test_cancelling_does_not_wait_for_an_answer(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, hold=True)
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        fetch(folder, remote(hub, NAME, DATA), cancelled=cancelled, timeouts=type(SHORT)(read=60))
    assert time.monotonic() - started < 2
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)


def test_a_server_that_never_answers_is_given_up(hub: HubServer, folder: Path) -> None:
    hub.fault(NAME, times=100, hold=True)
    with pytest.raises(FetchFailed, match="has stopped answering"):
        fetch(folder, remote(hub, NAME, DATA), patience=type(QUICK)(tries=2))


def test_what_a_callback_raises_ends_the_download(hub: HubServer, folder: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(folder, remote(hub, NAME, DATA), progress=interrupt)
    fetch(folder, remote(hub, NAME, DATA))
    assert whole(folder)


# 12: kill -9

CHILD = """
    import sys
    from pathlib import Path
    from qwen2_converters.download import download
    from qwen2_converters.remote import Address, RemoteFile
    folder, *described = sys.argv[1:]
    files = []
    for line in described:
        name, size, key, url = line.split("|")
        sha256, blob = (key if len(key) == n else None for n in (64, 40))
        files.append(RemoteFile(name, int(size), lambda url=url: Address(url), sha256, blob, "v1"))
    def progress(p):
        print(p.done, flush=True)
    download(files, Path(folder), progress=progress, parallel=3)
    print("done", flush=True)
"""


def child(hub: HubServer, folder: Path, contents: dict[str, bytes], check: Callable[[int], str]) -> subprocess.Popen[bytes]:
    lines = []
    for number, (name, data) in enumerate(contents.items()):
        file = remote(hub, name, data, check(number))
        lines.append(f"{name}|{len(data)}|{file.sha256 or file.blob_id or '-'}|{hub.url(name)}")
    path = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), *lines]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_any_time_then_the_rest(hub: HubServer, folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    contents = {f"part-{number}.dat": chance.randbytes(chance.randrange(1, 300_000)) for number in range(4)}
    for _ in range(4):
        hub.faults.clear()
        for name in contents:
            hub.fault(name, times=1000, pause=0.001)
        with child(hub, folder, contents, lambda number: CHECKS[number % 3]) as killed:
            assert killed.stdout is not None
            target = chance.randrange(sum(map(len, contents.values())))
            for line in killed.stdout:
                if line == b"done\n" or int(line) >= target:
                    break
            killed.send_signal(signal.SIGKILL)
        assert all((folder / name).read_bytes() == data for name, data in contents.items() if name in names(folder))
    hub.faults.clear()
    hub.log.clear()
    there = {path.name: path.stat().st_size for path in folder.iterdir()}
    with child(hub, folder, contents, lambda number: CHECKS[number % 3]) as last:
        assert last.wait() == 0
    assert names(folder) == sorted(contents)
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    for name, data in contents.items():
        assert hub.sent(name) == len(data) - there.get(name, there.get(f"{name}.part", 0))


MAKER = """
    import os, signal, sys
    left = int(sys.argv.pop(1))
    def counted(real):
        def call(*args, **more):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)
        return call
    from pathlib import Path
    for name in ("open", "write", "fsync", "ftruncate", "lseek"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("replace", "unlink", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
"""


def test_killed_before_any_step_the_same_command_finishes(hub: HubServer, tmp_path: Path) -> None:
    """A wrong hash at first, so that setting aside is among the steps. QWEN2_LOCAL_ALL_POINTS=1 tries every one."""
    file = remote(hub, NAME, DATA)
    line = f"{NAME}|{len(DATA)}|{file.sha256}|{hub.url(NAME)}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "converters")])}
    code = textwrap.dedent(MAKER) + textwrap.dedent(CHILD)
    for steps in range(0, 200, 1 if os.environ.get("QWEN2_LOCAL_ALL_POINTS") else 5):
        folder = tmp_path / str(steps) / "model"
        hub.faults.clear()
        hub.fault(NAME, wrong_byte=10)
        done = subprocess.run([sys.executable, "-c", code, str(steps), str(folder), line], env=environment, capture_output=True, check=False)
        if folder.exists():
            assert not (folder / NAME).exists() or (folder / NAME).read_bytes() == DATA
        if done.returncode == 0:
            assert whole(folder)
            assert steps > 15, "the steps were not counted"
            return
        assert done.returncode == -9, done.stderr.decode()
        fetch(folder, file)
        assert whole(folder)
    pytest.fail("it never finished")


# read_range


def test_a_range_is_read_through_the_same_faults(hub: HubServer) -> None:
    file = remote(hub, NAME, DATA)
    hub.fault(NAME, status=503)
    hub.fault(NAME, cut_after=5)
    hub.fault(NAME, no_range=True)
    assert read_range(file, 1000, 1010, patience=QUICK, timeouts=SHORT) == DATA[1000:1010]
    assert read_range(file, 0, len(DATA), patience=QUICK, timeouts=SHORT) == DATA
    assert hub.log[-1].status == 206


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5), (0, 100_001)])
def test_a_range_outside_of_the_file_is_a_mistake(hub: HubServer, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        read_range(remote(hub, NAME, DATA), start, stop)


def test_every_error_has_a_next_step(hub: HubServer, folder: Path) -> None:
    for fault in ({"status": 404}, {"status": 403}, {"status": 500}, {"instead": HTML}, {"content_length": 5}, {"endless": True}, {"cut_after": 0}):
        hub.faults.clear()
        hub.fault(NAME, times=100, **fault)  # type: ignore[arg-type]
        with pytest.raises(Qwen2LocalError) as caught:
            fetch(folder, remote(hub, NAME, DATA))
        assert NAME in caught.value.what
        assert caught.value.hint
