"""The model's host: loads in a thread, one after the other, and tells on the UI thread how it goes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

import pytest

from qwen2_local.errors import Cancelled, DoesNotFit, UnknownModel, WorkerDied
from qwen2_tui.host import Host, HostState
from qwen2_tui.model import LoadWish
from tests.tui.scripted import ScriptedLoader, ScriptedModel


class Stage:
    """A host, and its UI thread: the one of the test, which does what was handed over when it asks `until`."""

    def __init__(self, loader: Callable[..., ScriptedModel]) -> None:
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.told: list[HostState] = []
        self.threads: set[str] = set()
        self.host = Host(loader, self._tell, self.calls.put)

    def _tell(self, state: HostState) -> None:
        self.told.append(state)
        self.threads.add(threading.current_thread().name)

    def until(self, condition: Callable[[], object], timeout: float = 5.0) -> None:
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, self.told
            try:
                self.calls.get(timeout=0.01)()
            except Empty:
                continue

    def ready(self) -> ScriptedModel:
        self.until(lambda: self.host.state.phase == "ready")
        assert isinstance(self.host.model, ScriptedModel)
        return self.host.model


@pytest.fixture
def held() -> Iterator[ScriptedLoader]:
    """A loader that waits."""
    loader = ScriptedLoader(models={"one": ScriptedModel(name="one"), "two": ScriptedModel(name="two")}, hold=True)
    yield loader
    loader.go.release(100)


def test_at_first_there_is_nothing():
    stage = Stage(ScriptedLoader())
    assert (stage.host.state.phase, stage.host.model, stage.host.memory(), stage.told) == ("empty", None, 0, [])


def test_it_loads_and_tells_on_the_ui_thread():
    model = ScriptedModel(notes=("It is slow here.",))
    stage = Stage(ScriptedLoader(model, reports=[("converting", 41, 100)]))
    stage.host.load(LoadWish("guide"))
    assert stage.host.state.phase == "loading" and stage.host.model is None
    assert stage.ready() is model
    assert [(state.phase, state.words) for state in stage.told] == [
        ("loading", "loading guide"),
        ("loading", "preparing guide: converting 41 %"),
        ("ready", ""),
    ]
    assert stage.told[-1].notes == ("It is slow here.",)
    assert stage.threads == {threading.current_thread().name}


def test_the_label_is_the_full_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen2_tui.host.label_of", lambda name: f"{name}:q4_k_m")
    stage = Stage(ScriptedLoader())
    stage.host.load(LoadWish("7b"))
    assert stage.host.label == "7b"
    stage.ready()
    assert stage.host.label == "7b:q4_k_m"


def test_progress_is_told_a_few_times_a_second_and_at_its_end():
    stage = Stage(ScriptedLoader(reports=[("converting", done, 1000) for done in range(1001)]))
    stage.host.load(LoadWish())
    stage.ready()
    said = [state.words for state in stage.told if "converting" in state.words]
    assert len(said) < 10 and said[-1] == "preparing guide: converting 100 %"


def test_a_switch_closes_the_model_before_it_first(held: ScriptedLoader):
    held.go.release()
    stage = Stage(held)
    stage.host.load(LoadWish("one"))
    one = stage.ready()
    stage.host.load(LoadWish("two"))
    assert stage.host.model is None
    stage.until(lambda: len(held.wishes) == 2)
    assert one.closed  # before the second needs its memory
    held.go.release()
    assert stage.ready().name == "two"


def test_a_load_under_way_is_superseded(held: ScriptedLoader):
    stage = Stage(held)
    stage.host.load(LoadWish("one"))
    stage.until(lambda: len(held.wishes) == 1)
    stage.host.load(LoadWish("two"))
    held.go.release(2)
    assert stage.ready().name == "two"
    assert held.models["one"].closed
    assert [wish.name for wish in held.wishes] == ["one", "two"]
    assert all(state.phase != "ready" or state.wish.name == "two" for state in stage.told)


def test_a_superseded_conversion_ends_at_its_next_report():
    ended = []
    going = threading.Event()

    def loader(wish: LoadWish, report: Callable[[str, int, int], None]) -> ScriptedModel:
        if wish.name == "two":
            return ScriptedModel(name="two")
        try:
            for done in range(10_000):
                report("converting", done, 10_000)
                going.set()
                time.sleep(0.001)
        except Cancelled:
            ended.append(wish.name)
            raise
        return ScriptedModel()

    stage = Stage(loader)
    stage.host.load(LoadWish("one"))
    assert going.wait(5)
    stage.host.load(LoadWish("two"))
    assert stage.ready().name == "two"
    assert ended == ["one"]


def test_a_failed_load_says_what_and_what_next():
    stage = Stage(ScriptedLoader(fails=[DoesNotFit("it needs 5.3 GB,\x1b[31m but there are 2.0.", hint="Take a smaller one.")]))
    stage.host.load(LoadWish("7b"))
    stage.until(lambda: stage.host.state.phase == "failed")
    state = stage.host.state
    assert (state.words, state.hint, state.crashed) == ("It needs 5.3 GB,[31m but there are 2.0.", "Take a smaller one.", False)
    assert stage.host.model is None


def test_after_a_failure_another_can_be_loaded():
    stage = Stage(ScriptedLoader(fails=[UnknownModel("No model is called 9b.")]))
    stage.host.load(LoadWish("9b"))
    stage.until(lambda: stage.host.state.phase == "failed")
    stage.host.load(LoadWish("guide"))
    stage.ready()


def test_a_fault_of_ours_in_loading_is_a_failed_load_too():
    stage = Stage(ScriptedLoader(fails=[ZeroDivisionError("division by zero")]))
    stage.host.load(LoadWish("guide"))
    stage.until(lambda: stage.host.state.phase == "failed")
    assert "guide could not be loaded" in stage.host.state.words and "doctor" in stage.host.state.hint


def test_a_dead_worker_is_said_and_can_be_started_again():
    loader = ScriptedLoader()
    stage = Stage(loader)
    stage.host.load(LoadWish("guide", context=512))
    stage.ready()
    stage.host.crash(WorkerDied("The worker process was killed (SIGKILL).", hint="Perhaps the memory ran out."))
    assert (stage.host.state.phase, stage.host.state.crashed) == ("failed", True)
    assert "SIGKILL" in stage.host.state.words
    stage.host.restart(safe=True)
    stage.ready()
    assert loader.wishes[-1] == LoadWish("guide", context=512, safe=True)
    stage.host.restart(safe=False)
    stage.ready()
    assert loader.wishes[-1] == LoadWish("guide", context=512)


def test_memory_is_that_of_the_process():
    stage = Stage(ScriptedLoader(ScriptedModel(pid=os.getpid())))
    stage.host.load(LoadWish())
    stage.ready()
    until = time.monotonic() + 5
    while not stage.host.memory() and time.monotonic() < until:  # where `ps` is asked, in a thread
        time.sleep(0.01)
    assert 10_000_000 < stage.host.memory() < 10_000_000_000


def test_memory_of_a_process_that_is_gone_is_not_known():
    stage = Stage(ScriptedLoader(ScriptedModel(pid=2**22 + 1)))
    stage.host.load(LoadWish())
    stage.ready()
    assert stage.host.memory() == 0


def test_close_closes_the_model_and_nothing_is_loaded_after_it():
    loader = ScriptedLoader()
    stage = Stage(loader)
    stage.host.load(LoadWish())
    model = stage.ready()
    stage.host.close()
    stage.host.close()
    assert model.closed and stage.host.model is None
    stage.host.load(LoadWish("two"))
    assert len(loader.wishes) == 1


def test_close_waits_for_no_load(held: ScriptedLoader):
    stage = Stage(held)
    stage.host.load(LoadWish("one"))
    stage.until(lambda: held.wishes)
    began = time.monotonic()
    stage.host.close()
    assert time.monotonic() - began < 0.5
    held.go.release()
    until = time.monotonic() + 5
    while not held.models["one"].closed and time.monotonic() < until:
        time.sleep(0.01)
    assert held.models["one"].closed  # what was loaded too late lets go of its memory
