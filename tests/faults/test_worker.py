"""A worker process that crashes, is killed, hangs, babbles or is orphaned."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qwen2_local import __version__, paths
from qwen2_local.backends.base import Layout, Scores
from qwen2_local.engine import Event, Finished, Request, Token
from qwen2_local.errors import BackendError, Cancelled, DoesNotFit, UsageError, WorkerDied
from qwen2_local.kvcache import cache
from qwen2_local.types import Sampling
from qwen2_local.worker import messages, process, server
from qwen2_local.worker.client import RemoteEngine
from qwen2_local.worker.frames import Decoder
from tests.support.scripted import VOCABULARY, scrambled
from tests.support.scripted_worker import SITE, loads, setup

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{SITE}{os.pathsep}{ROOT}")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RemoteEngine]:
    with closing(RemoteEngine(setup(tmp_path, pause=0.01))) as made:
        yield made


def request(*prompt: int, most: int = 8) -> Request:
    return Request(prompt or (1, 2, 3), Sampling(), frozenset(), VOCABULARY, most)


def tokens(events: list[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def expected(*prompt: int, most: int = 8) -> list[int]:
    """What the scripted model says."""
    text = list(prompt)
    for _ in range(most):
        text.append(scrambled(text))
    return text[len(prompt) :]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def gone(pid: int) -> bool:
    """Is there no such process, or only its remains, for its parent to collect?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    if sys.platform != "linux":
        return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()[:1] in ("", "Z")
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_there(pid: int) -> bool:
    """Is there such a process, be it a zombie?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Death


def test_a_crash_is_a_typed_error_and_the_next_request_has_a_new_worker(tmp_path: Path) -> None:
    with closing(RemoteEngine(setup(tmp_path, crash_at=4))) as engine:
        first = engine.pid
        with pytest.raises(WorkerDied, match="SIGSEGV") as caught:
            list(engine.generate(request()))
        assert "doctor" in caught.value.hint
        assert tokens(list(engine.generate(request(most=2)))) == expected(1, 2, 3, most=2)
        assert engine.pid not in (first, None)


def test_a_kill_fails_all_that_is_under_way_and_nothing_else(engine: RemoteEngine) -> None:
    replies = [engine.submit(request(n, most=3000)) for n in range(1, 6)]
    for reply in replies:
        while not isinstance(next(reply), Token):
            pass
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for reply in replies:
        with pytest.raises(WorkerDied, match="SIGKILL") as caught:
            list(reply)
        assert "memory" in caught.value.hint
        assert list(reply) == []
    assert tokens(list(engine.generate(request(7)))) == expected(7)


def test_a_worker_that_was_killed_while_idle_is_not_noticed(engine: RemoteEngine) -> None:
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: engine.pid is None)
    assert tokens(list(engine.generate(request(7)))) == expected(7)


def test_no_zombie_is_left(engine: RemoteEngine) -> None:
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not is_there(pid))


def test_killed_at_random_moments(tmp_path: Path) -> None:
    with closing(RemoteEngine(setup(tmp_path, pause=0.002))) as engine:
        for number in range(8):
            reply = engine.submit(request(number + 1, most=100))
            time.sleep(0.02 * number)
            pid = engine.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDied):
                list(reply)
        assert tokens(list(engine.generate(request(9)))) == expected(9)


def test_a_model_that_kills_its_process_twice_is_not_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(WorkerDied, match=r"died twice.*SIGSEGV") as caught:
            RemoteEngine(setup(tmp_path, crash_loads=99))
        assert "--context" in caught.value.hint
    assert loads(tmp_path) == 4


def test_a_model_that_cannot_be_loaded_again_says_so_without_trying_for_ever(tmp_path: Path) -> None:
    with closing(RemoteEngine(setup(tmp_path, pause=0.01))) as engine:
        setup(tmp_path, crash_loads=99)
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: engine.pid is None)
        for _ in range(3):
            with pytest.raises(WorkerDied, match="died twice"):
                list(engine.generate(request()))
        assert loads(tmp_path) == 3


def test_one_death_while_loading_is_tried_again(tmp_path: Path) -> None:
    with closing(RemoteEngine(setup(tmp_path, crash_loads=1))) as engine:
        assert tokens(list(engine.generate(request(7)))) == expected(7)
    assert loads(tmp_path) == 2


def test_what_loading_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="9 GB") as caught:
        RemoteEngine(setup(tmp_path, does_not_fit=True))
    assert caught.value.hint == "Take less."
    assert loads(tmp_path) == 1


# Many requests, and ends that are asked for


def test_many_at_once_get_each_their_own(engine: RemoteEngine) -> None:
    came: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        came[number] = tokens(list(engine.generate(request(number, most=6))))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert came == {number: expected(number, most=6) for number in range(1, 21)}


def test_a_cancel_is_quick_and_leaves_the_others_alone(engine: RemoteEngine) -> None:
    times: list[float] = []
    while not times or (min(times) >= 0.3 and len(times) < 5):  # other tests may hold the processors
        other = engine.submit(request(5, most=40))
        reply = engine.submit(request(most=3000))
        while not isinstance(next(reply), Token):
            pass
        began = time.monotonic()
        reply.cancel()
        rest = list(reply)
        times.append(time.monotonic() - began)
        assert isinstance(rest[-1], Finished)
        assert rest[-1].reason == "cancelled"
        assert tokens(list(other)) == expected(5, most=40)
    assert min(times) < 0.3


def test_a_reply_that_is_forgotten_stops(engine: RemoteEngine) -> None:
    events = engine.generate(request(most=3000))
    next(events)
    events.close()
    worker = engine._worker
    assert worker is not None
    assert until(lambda: not worker._pending)


def test_closing_ends_replies_as_cancelled_and_the_process(tmp_path: Path) -> None:
    engine = RemoteEngine(setup(tmp_path, pause=0.01))
    pid = engine.pid
    assert pid is not None
    reply = engine.submit(request(most=3000))
    next(reply)
    engine.close()
    engine.close()
    last = list(reply)[-1]
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"
    assert gone(pid)
    with pytest.raises(UsageError, match="closed"):
        engine.submit(request())


def test_a_worker_has_time_to_write_all_its_kv_before_its_parent_kills_it() -> None:
    assert cache._CLOSE_S + 3 < server._CLOSE_S < process._CLOSE_S - 1


def test_closing_does_not_wait_for_native_code_that_hangs(tmp_path: Path) -> None:
    engine = RemoteEngine(setup(tmp_path, pause=60))
    pid = engine.pid
    assert pid is not None
    reply = engine.submit(request())
    time.sleep(0.2)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 11
    assert gone(pid)
    assert [event.reason for event in reply if isinstance(event, Finished)] == ["cancelled"]


def test_memory_is_given_back_when_idle_and_the_model_comes_back(tmp_path: Path) -> None:
    with closing(RemoteEngine(setup(tmp_path, pause=0.01), idle_s=0.2)) as engine:
        pid = engine.pid
        assert pid is not None
        assert len(tokens(list(engine.generate(request(most=50))))) == 50, "a long reply is not idle"
        assert engine.pid == pid
        assert until(lambda: gone(pid))
        assert engine.pid is None
        assert tokens(list(engine.generate(request(7)))) == expected(7)


def test_scores_are_those_of_this_process(tmp_path: Path) -> None:
    made = setup(tmp_path)
    with closing(RemoteEngine(made)) as engine:
        with pytest.raises(UsageError, match="two tokens"):
            engine.score((1,), VOCABULARY)
        scores = engine.score((1, 2, 3), VOCABULARY)
    assert isinstance(scores, Scores)
    assert len(scores.logprobs) == len(scores.greedy) == 2


def test_the_layout_can_be_looked_at(engine: RemoteEngine) -> None:
    assert engine.layout == Layout(1, 4096)


def test_a_model_that_is_closed_while_it_comes_back_leaves_no_process(tmp_path: Path) -> None:
    engine = RemoteEngine(setup(tmp_path))
    setup(tmp_path, slow_load=60)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: engine.pid is None)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            engine.submit(request())
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert until(lambda: loads(tmp_path) == 2)
    began = time.monotonic()
    engine.close()
    thread.join(10)
    assert raised
    assert time.monotonic() - began < 5, "nobody waits for the load"
    assert engine.pid is None


def test_a_ctrl_c_while_the_model_loads_ends_the_process(tmp_path: Path) -> None:
    begun = threading.Thread(target=lambda: until(lambda: loads(tmp_path) == 1) and os.kill(os.getpid(), signal.SIGINT))
    begun.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        RemoteEngine(setup(tmp_path, slow_load=60))
    assert time.monotonic() - began < 15
    begun.join()


def test_a_score_ends_with_the_model(tmp_path: Path) -> None:
    engine = RemoteEngine(setup(tmp_path, pause=0.5))
    raised: list[BaseException] = []

    def score() -> None:
        try:
            engine.score(tuple(range(1, 300)), VOCABULARY)
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    time.sleep(0.2)
    engine.close()
    thread.join(5)
    assert raised


def test_loads_deaths_and_closes_leave_nothing_behind(tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(list(Path("/dev/fd").iterdir()))

    def cycle(number: int) -> None:
        engine = RemoteEngine(setup(tmp_path), idle_s=60)
        list(engine.generate(request(number)))
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: engine.pid is None)
        list(engine.generate(request(number)))
        engine.close()

    cycle(1)
    assert until(lambda: not any(thread.name.startswith("qwen2-local") for thread in threading.enumerate()))
    before = held()
    for number in range(2, 5):
        cycle(number)
    assert until(lambda: held() == before), (before, held())


# Its output


def test_what_a_backend_prints_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = paths.logs() / process.LOG
    log.unlink(missing_ok=True)
    with closing(RemoteEngine(setup(tmp_path, chatty=True))) as engine:
        assert tokens(list(engine.generate(request(7)))) == expected(7)
    said = log.read_text()
    assert "hello from Python" in said
    assert "hello from native code" in said
    assert log.stat().st_mode & 0o777 == 0o600
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_the_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    log = paths.logs() / process.LOG
    log.write_bytes(b"x" * 1_000_001)
    RemoteEngine(setup(tmp_path)).close()
    assert log.stat().st_size < 100_000
    assert log.with_suffix(".log.1").stat().st_size == 1_000_001


def test_without_a_place_for_the_log_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "file"))
    with closing(RemoteEngine(setup(tmp_path))) as engine:
        assert tokens(list(engine.generate(request(7)))) == expected(7)


# Its parent

PARENT = """
import os, sys, time
from pathlib import Path
from qwen2_local.worker.client import RemoteEngine
from tests.support.scripted_worker import setup
from tests.faults.test_worker import request
engine = RemoteEngine(setup(Path(sys.argv[1]), pause=float(sys.argv[2])))
reply = engine.submit(request())
if sys.argv[3] == "fork" and os.fork() == 0:
    time.sleep(30)  # holds the other end of the worker's pipes
    os._exit(0)
print(engine.pid, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("case", ["idle", "busy", "fork"])
def test_it_dies_with_its_parent(tmp_path: Path, case: str) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path), "30" if case == "busy" else "0", case]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        parent.wait()
        assert until(lambda: gone(pid), 13), "busy: it waits 8.5 s for native code"
    finally:
        os.killpg(parent.pid, signal.SIGKILL) if case == "fork" else parent.kill()
        parent.communicate()


def test_a_ctrl_c_in_the_terminal_is_not_for_it(engine: RemoteEngine) -> None:
    pid = engine.pid
    assert pid is not None
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert tokens(list(engine.generate(request(7)))) == expected(7)
    assert engine.pid == pid


def test_the_thread_that_started_it_may_end(tmp_path: Path) -> None:
    made: list[RemoteEngine] = []
    thread = threading.Thread(target=lambda: made.append(RemoteEngine(setup(tmp_path))))
    thread.start()
    thread.join()
    with closing(made[0]) as engine:
        time.sleep(0.2)
        assert tokens(list(engine.generate(request(7)))) == expected(7)
        assert loads(tmp_path) == 1


def test_a_fork_is_told_that_the_model_is_not_its_own(engine: RemoteEngine) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            engine.submit(request())
        except UsageError:
            engine.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert tokens(list(engine.generate(request(7)))) == expected(7)


# What is no worker, and what is no parent


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        struct.pack(">I", 2**31),
        struct.pack(">I", 2) + b"[]",
        messages.encode(messages.Forgotten(3))[:-2],
    ],
)
def test_a_process_that_speaks_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    (tmp_path / "said").write_bytes(said)
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat '{tmp_path}/said'\nsleep 0.2\n")
    program.chmod(0o700)
    made = setup(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(BackendError):
        RemoteEngine(made)


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(BackendError, match="No process can be started"):
        RemoteEngine(setup(tmp_path))


def test_trying_out_whether_a_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process.try_out() > 0
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho something >&2\necho no module >&2\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(WorkerDied, match=r"exit code 3.*no module"):
        process.try_out()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(BackendError, match="No worker process starts"):
        process.try_out()


def child(data: bytes) -> tuple[list[object], int]:
    """What a worker answers to `data` and the end of its input, and its exit code."""
    done = subprocess.run([sys.executable, "-P", "-m", "qwen2_local.worker"], input=data, capture_output=True, timeout=60, check=False)
    decoder = Decoder()
    answers = list(decoder.feed(done.stdout))
    decoder.end()
    return [messages.answer(one) for one in answers], done.returncode


def test_a_worker_without_orders_ends() -> None:
    assert child(b"") == ([], 0)


@pytest.mark.parametrize("data", [b"x" * 100, struct.pack(">I", 0), messages.encode(messages.Cancel(1)), b"\0\0"])
def test_a_worker_that_is_not_understood_says_so_and_ends(data: bytes) -> None:
    answers, code = child(data)
    assert [type(one) for one in answers] == [messages.Failed]
    assert code == 0


def test_a_worker_of_another_version_does_not_load(tmp_path: Path) -> None:
    start = messages.Start(messages.PROTOCOL, "0.0.0", os.getpid(), setup(tmp_path))
    answers, _ = child(messages.encode(start))
    assert [one.what for one in answers if isinstance(one, messages.Failed)] == [f"qwen2-local is of version {__version__} now, not 0.0.0 any more."]
    assert loads(tmp_path) == 0
