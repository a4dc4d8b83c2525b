"""Fetches and verifications as child processes: real ones, against hubs on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import ClassVar

import pytest

from qwen2_converters.again import Order, remember
from qwen2_local.store import Store
from qwen2_tui import jobs as jobs_module
from qwen2_tui.child import Ended
from qwen2_tui.job import told
from qwen2_tui.jobs import Job, Jobs
from qwen2_tui.plan import Plan
from tests.support import gguf_bytes
from tests.support.hub_server import HubServer
from tests.support.installed import install
from tests.support.pulling import APACHE

NAME, FILE = "some/big-GGUF", "big-q8_0.gguf"
INSTALLED = "big:q8_0"
SLOW = 60.0


@pytest.fixture(autouse=True)
def not_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other tests a child as it is would starve."""
    monkeypatch.setattr(jobs_module, "NICE", 0)


def big() -> bytes:
    """A GGUF of some megabytes."""
    made = gguf_bytes.model()
    for layer in range(2):
        for name in ("ffn_gate", "ffn_up"):
            made.tensors[f"blk.{layer}.{name}.weight"] = (32, 20_000)
        made.tensors[f"blk.{layer}.ffn_down.weight"] = (20_000, 32)
    made.keys["feed_forward_length"] = gguf_bytes.key("qwen2.feed_forward_length", gguf_bytes.U32, 20_000)
    return made.build()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one model, which comes whole unless a test says otherwise."""
    with HubServer() as server:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        server.add(NAME, {FILE: big()}, card=APACHE)
        yield server


@pytest.fixture
def stalling(hub: HubServer) -> HubServer:
    """It stalls in the middle, once."""
    hub.fault(FILE, on="cdn")  # the look at its header
    hub.fault(FILE, on="cdn", stall_after=2_000_000)
    return hub


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    made.close()


def until(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + SLOW
    while not condition():
        assert time.monotonic() < deadline, what or "it took too long"
        time.sleep(0.01)


def state(jobs: Jobs, name: str = NAME) -> str:
    return jobs.jobs[name].state if name in jobs.jobs else ""


def part() -> Path:
    return Store().unfinished(INSTALLED) / f"{FILE}.part"


def has_come(count: int) -> bool:
    return part().is_file() and part().stat().st_size >= count


def test_what_the_end_of_the_app_stops_is_paused_the_next_time_and_goes_on(stalling, jobs):
    jobs.start(NAME)
    until(lambda: has_come(1_000_000))
    began = time.monotonic()
    jobs.close()
    assert time.monotonic() - began < 3
    until(lambda: state(jobs) == "paused")
    jobs.resume(NAME)
    assert state(jobs) == "paused", "closed is closed"
    asked, before = len(stalling.log), stalling.sent(FILE)
    size = len(stalling.repos[NAME].files[FILE])
    again, told = Jobs(), list[Job]()
    again.tell = told.append
    again.look()
    job = again.jobs[NAME]
    assert (job.state, job.kind, job.total) == ("paused", "fetch", size) and job.kept >= 1_000_000
    assert len(stalling.log) == asked, "nobody asked for the network"
    again.resume(NAME)
    until(lambda: state(again) == "done")
    assert stalling.sent(FILE) - before <= size - 1_000_000 + (1 << 20), "what was kept came again"
    assert [one.name for one in Store().list()] == [INSTALLED] and again.jobs[NAME].models == (INSTALLED,)
    fetching = [one for one in told if one.phase == "fetching"]
    assert told[0].phase == "looking" and fetching and all(one.total == size for one in fetching) and told[-1].state == "done"
    again.close()


def test_what_is_paused_is_kept_until_it_is_cancelled(stalling, jobs):
    jobs.start(NAME)
    until(lambda: has_come(1_000_000))
    jobs.pause(NAME)
    until(lambda: state(jobs) == "paused")
    assert jobs.jobs[NAME].kept >= 1_000_000
    jobs.cancel(NAME)
    until(lambda: NAME not in jobs.jobs)
    assert not part().exists() and Store().drafts() == ()


def test_a_name_is_never_an_option_and_what_goes_wrong_is_said(hub, jobs):
    jobs.start("--dry-run")
    until(lambda: state(jobs, "--dry-run") == "failed")
    words = jobs.jobs["--dry-run"].words
    assert "--dry-run" in words and not words.startswith("error")


PARENT = """
import sys, time
from qwen2_tui import jobs as jobs_module
from qwen2_tui.jobs import Jobs
jobs_module.NICE = 7
jobs = Jobs()
jobs.start(sys.argv[1])
print(jobs._children[sys.argv[1]].pid, flush=True)
time.sleep(100)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not (Path(f"/proc/{pid}/stat").is_file() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_child_whose_parent_is_killed_ends_too_and_keeps_what_it_has(stalling):
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, NAME], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    until(lambda: has_come(1_000_000))
    if sys.platform == "linux":
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7), "it would take the model's cores"
        group = Path(f"/proc/{pid}/autogroup")
        assert not group.exists() or "nice 7" in group.read_text()
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    until(lambda: not alive(pid), "it is an orphan")
    assert Store().kept(INSTALLED) >= 1_000_000


def test_a_child_that_does_not_heed_it_ends_too():
    """Native code never looks at signals."""
    code = """
import signal, threading, time
from qwen2_local.cli import child
child._END_S = 0.2
signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=child._end_with_parent, daemon=True).start()
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(SLOW) == 130


def test_a_verification_tells_how_far_it_is_and_what_it_found(jobs):
    told: list[Job] = []
    jobs.tell = told.append
    install(Store(), "mine")
    jobs.verify("mine")
    until(lambda: state(jobs, "mine") == "done")
    assert "All is well" in jobs.jobs["mine"].words
    assert (told[-1].done, told[-1].kind) == (told[-1].total, "verify") and told[-1].total > 0


def test_a_plan_is_asked_for_and_fetches_nothing(hub, jobs):
    answers: list[tuple[Plan | None, str]] = []
    jobs.plan(NAME, lambda plan, fault: answers.append((plan, fault)))
    until(lambda: answers)
    plan, fault = answers[0]
    assert plan is not None and fault == ""
    assert (plan.models, plan.to_fetch, plan.licence) == (((INSTALLED, ""),), len(hub.repos[NAME].files[FILE]), "apache-2.0")
    assert not plan.licence_to_accept and Store().drafts() == ()


# What a child tells, and how it is put together


def told_by(*events: dict[str, object]) -> Job:
    return reduce(told, events, Job("x", phase="looking"))


def test_what_is_fetched_is_in_front_while_both_go_on():
    fetching = {"phase": "fetching", "name": "a", "done": 50, "total": 100, "speed": 7, "left_s": 7.1}
    converting = {"phase": "converting", "name": "b", "done": 12, "total": 100, "speed": 1, "left_s": 88}
    assert told_by(fetching, converting) == Job("x", "fetch", "fetching", 50, 100, 7.0, 7.1, words="converting 12%")
    assert told_by(fetching, converting, {**fetching, "done": 60}).words == "converting 12%"
    over = told_by(fetching, converting, {**fetching, "done": 100}, converting)
    assert (over.phase, over.done, over.words) == ("converting", 12, "")


def test_nothing_that_a_child_says_breaks_it():
    strange = {"phase": "fetch\x1b[31ming", "done": "many", "total": -1, "speed": float("nan"), "left_s": []}
    assert told_by(strange, {}) == Job("x")
    assert replace(told_by(strange), phase="") == Job("x") and "\x1b" not in told_by(strange).phase


class Scripted:
    """Stands for `Child`: a test says how it ends."""

    made: ClassVar[list[Scripted]] = []

    def __init__(self, arguments, *, on_end, on_event, nice):
        self.arguments, self.tell, self.end, self.stopped = list(arguments), on_event, on_end, False
        self.made.append(self)

    def stop(self):
        self.stopped = True

    def wait(self, timeout=None):
        return True


@pytest.fixture
def scripted(monkeypatch) -> list[Scripted]:
    """The children that are started, which are none."""
    monkeypatch.setattr(Scripted, "made", [])
    monkeypatch.setattr("qwen2_tui.jobs.Child", Scripted)
    return Scripted.made


def begun(name: str, order: Order) -> None:
    with pytest.raises(KeyboardInterrupt), Store().resume(name) as draft:
        remember(draft.folder.parent, order, "x", [name], 9000)
        (draft.folder / "x.part").write_bytes(b"x" * 5000)
        raise KeyboardInterrupt


def test_what_the_command_line_began_goes_on_as_it_began(scripted):
    begun("mine", Order("some/x", ("gguf:q8_0", "mlx:4bit"), revision="v1", source="modelscope", install_as="mine", discard_source=True))
    begun("other:original", Order("other", original=True))
    jobs = Jobs()
    jobs.look()
    assert {name: (job.state, job.total) for name, job in jobs.jobs.items()} == {"some/x": ("paused", 9000), "other": ("paused", 9000)}
    jobs.resume("some/x")
    jobs.resume("other")
    base = ["pull", "--yes", "--json", "--events"]
    options = ["--to", "gguf:q8_0", "--to", "mlx:4bit", "--revision", "v1", "--source", "modelscope", "--name", "mine", "--accept-licence"]
    assert scripted[0].arguments == [*base, *options, "--discard-source", "--", "some/x"]
    assert scripted[1].arguments == [*base, "--original", "--accept-licence", "--", "other"]


def test_cancelling_what_runs_frees_it_once_it_has_ended(scripted):
    begun("mine", Order("some/x", install_as="mine"))
    jobs, told = Jobs(), list[Job]()
    jobs.tell = told.append
    jobs.look()
    jobs.resume("some/x")
    jobs.cancel("some/x")
    assert scripted[0].stopped and jobs.jobs["some/x"].phase == "stopping" and Store().drafts() == ("mine",)
    scripted[0].end(Ended(130, {}, "kept 5 kB"))
    assert jobs.jobs == {} and Store().drafts() == () and told[-1].state == "cancelled"


@pytest.mark.parametrize("ask", ["pause", "cancel"])
def test_what_was_finished_before_it_could_be_stopped_is_done(scripted, ask):
    jobs = Jobs()
    jobs.start("7b")
    getattr(jobs, ask)("7b")
    scripted[0].end(Ended(0, {"status": "installed", "models": [{"name": "7b:q4_k_m"}]}, ""))
    assert jobs.jobs["7b"].state == "done" and jobs.jobs["7b"].models == ("7b:q4_k_m",)


def test_a_verification_that_is_stopped_leaves_nothing(scripted):
    begun("mine", Order("mine", install_as="mine"))
    jobs = Jobs()
    jobs.verify("mine")
    jobs.cancel("mine")
    scripted[0].end(Ended(130, {}, ""))
    assert jobs.jobs == {} and Store().drafts() == ("mine",), "what was begun of another fetch is not its business"


def test_what_somebody_else_works_on_is_not_freed(scripted):
    begun("mine", Order("some/x", install_as="mine"))
    jobs = Jobs()
    jobs.look()
    with Store().resume("mine"):
        jobs.cancel("some/x")
        until(lambda: state(jobs, "some/x") == "failed")
    assert "in use by process" in jobs.jobs["some/x"].words
    jobs.look()
    assert state(jobs, "some/x") == "failed", "what went wrong stays to be read"


def test_a_licence_is_accepted_only_where_a_person_did(scripted):
    jobs = Jobs()
    jobs.start("7b")
    jobs.start("72b", accept_licence=True)
    assert "--accept-licence" not in scripted[0].arguments and "--accept-licence" in scripted[1].arguments


def test_one_name_is_fetched_once(scripted):
    jobs = Jobs()
    jobs.start("7b")
    jobs.start("7b")
    assert len(scripted) == 1


def test_what_ends_by_itself_without_a_word_failed(scripted):
    jobs = Jobs()
    jobs.start("7b")
    scripted[0].end(Ended(-9, {}, ""))
    assert jobs.jobs["7b"].state == "failed" and "-9" in jobs.jobs["7b"].words


def test_faults_of_a_model_come_with_the_next_step(scripted):
    jobs = Jobs()
    jobs.verify("7b:q4_k_m")
    assert scripted[0].arguments == ["verify", "7b:q4_k_m", "--json", "--events"]
    scripted[0].end(Ended(3, {"ok": False, "faults": ["model.gguf has changed\x1b[2J: its SHA-256 is another."]}, ""))
    job = jobs.jobs["7b:q4_k_m"]
    assert job.state == "failed" and "SHA-256" in job.words and "`qwen2-local rm 7b:q4_k_m`" in job.words and "\x1b" not in job.words


def test_no_process_can_be_started(monkeypatch):
    def refuse(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("qwen2_tui.jobs.Child", refuse)
    jobs = Jobs()
    jobs.start("7b")
    assert jobs.jobs["7b"].state == "failed" and "temporarily unavailable" in jobs.jobs["7b"].words
