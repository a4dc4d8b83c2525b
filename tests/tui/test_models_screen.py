"""The models: what there is, what fits, and what becomes of a fetch while one chats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen2_local import advice, files, fit
from qwen2_local.store import Store
from qwen2_tui.inventory import Installed, Inventory
from qwen2_tui.jobs import Job
from qwen2_tui.plan import Plan, read
from qwen2_tui.screens.models import ModelsScreen
from qwen2_tui.widgets import modelrows
from qwen2_tui.widgets.modellist import ModelList
from tests.support.installed import install
from tests.tui.pilot import ScriptedJobs, make_app, screen_text, wait_for_text, wait_until
from tests.tui.scripted import ScriptedLoader

MEMORY = fit.Memory(16 * 10**9, 12 * 10**9)
DISK = 80 * 10**9
SEVEN = Plan(
    name="7b", title="Qwen2-7B-Instruct", source="huggingface", repository="Qwen/Qwen2-7B-Instruct-GGUF", models=(("7b:q4_k_m", ""),),
    files=4_680_000_000, to_fetch=4_680_000_000, to_convert=0, disk=4_700_000_000, disk_free=DISK,
    memory=((8192, 5_300_000_000), (32768, 6_800_000_000)), memory_total=16 * 10**9, fits=True,
    licence="Apache-2.0", licence_url="https://www.apache.org/licenses/LICENSE-2.0", licence_to_accept=False,
    speed=13_000_000, current=False, changed=False,
)  # fmt: skip
FETCHING = Job("7b", phase="fetching", done=1_170_000_000, total=4_680_000_000, speed=13.4e6, left_s=262)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB of memory, 80 GB of disk."""
    monkeypatch.setattr(fit, "machine_memory", lambda: MEMORY)
    monkeypatch.setattr(files, "free_bytes", lambda path: DISK)


async def opened(pilot: Any, select: str = "") -> ModelsScreen:
    """The screen, with the line `select` selected ("size 7b", "model guide")."""
    await wait_until(pilot, lambda: pilot.app.host.state.phase == "ready")
    await pilot.press("ctrl+o")
    await wait_until(
        pilot, lambda: isinstance(pilot.app.screen, ModelsScreen) and pilot.app.screen.query(ModelList) and pilot.app.screen.lines.selected
    )
    screen: ModelsScreen = pilot.app.screen
    if select:
        options = screen.query_one(ModelList)
        options.highlighted = options.get_option_index(select)
        await pilot.pause()
    return screen


def line_of(app: Any, name: str) -> str:
    return next(line for line in screen_text(app).split("\n") if name in line.split())


async def test_every_size_with_what_it_takes_and_whether_it_fits():
    app = make_app(jobs=ScriptedJobs())
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot)
        assert "16.0 GB of memory, 12.0 free · disk 80.00 GB free" in screen_text(app)
        assert [one for one in ("0.5b", "1.5b", "7b", "57b", "72b") if "GB" in line_of(app, one) and "GB" in line_of(app, f"{one}-base")] == [
            "0.5b", "1.5b", "7b", "57b", "72b",
        ]  # fmt: skip
        seven, large = line_of(app, "7b"), line_of(app, "72b")
        assert "★" in seven and "4.68 GB" in seven and "▓▓▓░░░░░ 5.3 GB" in seven and "recommended" in seven and "Apache-2.0" in seven
        assert "▓▓▓▓▓▓▓▓" in large and "too large" in large and "Tongyi Qianwen" in large
        assert screen_text(app).count("★") == 1 and "q4_k_m runs well here: recommended." in screen_text(app)
        assert "5.3 GB at 8K, 6.8 GB at 32K context, of 16.0 GB" in screen_text(app)
        await pilot.press("down")
        assert "the original of 15.23 GB is fetched" in screen_text(app) and "base: it continues texts" in screen_text(app)


async def test_at_60x20_all_is_there_that_decides():
    app = make_app(jobs=ScriptedJobs())
    async with app.run_test(size=(60, 20)) as pilot:
        await opened(pilot)
        seven = line_of(app, "7b")
        assert "4.68 GB" in seven and "▓▓▓░░░░░ 5.3 GB" in seven and "fits" in seven
        await pilot.press("home")
        assert "guide" in screen_text(app)


async def test_a_fetch_is_planned_and_asked_for_before_it_begins():
    jobs = ScriptedJobs()
    jobs.plans["7b"] = SEVEN
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        await pilot.press("enter")
        await wait_for_text(pilot, "It becomes 7b:q4_k_m.")
        shown = screen_text(app)
        assert "4.68 GB from Hugging Face: Qwen/Qwen2-7B-Instruct-GGUF" in shown and "4.70 GB needed, 80.00 GB free" in shown
        assert "5.3 GB at 8K, 6.8 GB at 32K context, of 16.0 GB: fits" in shown and "about 6 min" in shown and "Apache-2.0" in shown
        assert jobs.asked == [("plan", "7b")], "nothing has begun"
        await pilot.press("escape")
        await wait_until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert ("start", "7b") not in jobs.asked
        await pilot.press("enter")
        await wait_for_text(pilot, "It becomes")
        await pilot.press("enter")
        await wait_until(pilot, lambda: ("start", "7b") in jobs.asked)


async def test_a_licence_is_shown_and_enter_alone_does_not_accept_it():
    jobs = ScriptedJobs()
    jobs.plans["72b"] = replace(SEVEN, name="72b", title="Qwen2-72B-Instruct", licence="Tongyi Qianwen", licence_to_accept=True, fits=False)
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 72b")
        await pilot.press("enter")
        await wait_for_text(pilot, "I have read the licence and accept it")
        assert "is not a free licence" in screen_text(app) and "little memory" in screen_text(app)
        await pilot.press("enter")
        await wait_until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert ("start", "72b") not in jobs.asked
        await pilot.press("enter")
        await wait_for_text(pilot, "accept it")
        await pilot.press("y")
        await wait_until(pilot, lambda: ("start", "72b") in jobs.asked)


async def test_a_hub_that_cannot_be_reached_is_said_with_the_next_step():
    jobs = ScriptedJobs()
    jobs.plans["7b"] = "huggingface.co cannot be reached\x1b[2J.\n  Check the network."
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        await pilot.press("enter")
        await wait_for_text(pilot, "cannot be reached[2J.")
        assert "Check the network." in screen_text(app)
        await pilot.press("y")
        assert ("start", "7b") not in jobs.asked


async def test_a_disk_that_is_too_small_is_said_before_it_begins():
    jobs = ScriptedJobs()
    jobs.plans["7b"] = replace(SEVEN, disk=90 * 10**9)
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        await pilot.press("enter")
        await wait_for_text(pilot, "The disk has too little room")
        await pilot.press("enter")
        await wait_until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert ("start", "7b") not in jobs.asked


async def test_who_does_not_wait_for_a_plan_leaves_nothing_behind():
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        await pilot.press("enter")
        await wait_for_text(pilot, "Looking for 7b")
        await pilot.press("escape")
        await wait_until(pilot, lambda: ("stop", "") in jobs.asked)


async def test_progress_is_in_the_line_and_p_pauses_and_goes_on():
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        assert "pause" not in screen_text(app).split("\n")[-1], "there is nothing to pause"
        jobs.say(FETCHING)
        await wait_for_text(pilot, "25%")
        assert "━" in line_of(app, "7b") and "13.4 MB/s" in line_of(app, "7b") and "4:22 left" in line_of(app, "7b")
        assert "pause" in screen_text(app).split("\n")[-1]
        await pilot.press("p")
        assert jobs.asked[-1] == ("pause", "7b")
        jobs.say(replace(FETCHING, state="paused", kept=1_170_000_000))
        await wait_for_text(pilot, "1.17 GB of 4.68 GB kept")
        await pilot.press("p")
        assert jobs.asked[-1] == ("resume", "7b")
        await pilot.press("enter")
        assert jobs.asked[-1] == ("resume", "7b") and len(jobs.asked) == 3


async def test_what_earlier_days_left_is_shown_as_paused_and_enter_goes_on():
    jobs = ScriptedJobs()
    jobs.jobs["some/tune-GGUF"] = Job("some/tune-GGUF", phase="fetching", done=5 * 10**8, total=10**9, state="paused", kept=5 * 10**8)
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "job some/tune-GGUF")
        assert "paused · 0.50 GB of 1.00 GB kept" in line_of(app, "some/tune-GGUF")
        assert jobs.asked == []
        await pilot.press("enter")
        assert jobs.asked == [("resume", "some/tune-GGUF")]


async def test_no_name_and_no_word_reaches_the_terminals_controls():
    jobs = ScriptedJobs()
    evil = "some/\x1b]52;c;AAAA\x07\x1b[2J[red]tune"
    jobs.jobs[evil] = Job(evil, state="paused")
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, f"job {evil}")
        assert "some/]52;c;AAAA[2J[red]tune" in screen_text(app)
        jobs.say(Job(evil, state="failed", words="\x1b[31mBroken\x9b2J.\n  [b]Mend it."))
        await wait_for_text(pilot, "[b]Mend it.")
        await pilot.press("x")
        await wait_for_text(pilot, "Cancel fetching")
        assert not {"\x1b", "\x07", "\x9b"} & set(screen_text(app))


async def test_cancel_asks_and_says_what_is_lost():
    jobs = ScriptedJobs()
    jobs.jobs["7b"] = FETCHING
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        await pilot.press("x")
        await wait_for_text(pilot, "1.17 GB that have come are deleted.")
        await pilot.press("enter")
        await wait_until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert jobs.asked == []
        await pilot.press("x")
        await wait_for_text(pilot, "Cancel fetching 7b?")
        await pilot.press("y")
        await wait_until(pilot, lambda: jobs.asked == [("cancel", "7b")])


async def test_what_went_wrong_is_said_under_the_lines_and_enter_tries_again():
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        jobs.say(replace(FETCHING, state="failed", words="The disk is full.\n  Free some space."))
        await wait_for_text(pilot, "Free some space.")
        assert "The disk is full." in line_of(app, "7b")
        await pilot.press("enter")
        assert jobs.asked == [("resume", "7b")]


async def test_what_is_installed_appears_when_the_fetch_is_done():
    jobs = ScriptedJobs()
    jobs.jobs["0.5b"] = replace(FETCHING, name="0.5b")
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot)
        install(Store(), "0.5b:q4_0")
        jobs.say(replace(FETCHING, name="0.5b", state="done", models=("0.5b:q4_0",)))
        await wait_for_text(pilot, "✓ q4_0")
        assert "GGUF Q4_0" in line_of(app, "0.5b:q4_0")


async def test_enter_on_an_installed_one_switches_to_it_in_the_chat():
    install(Store(), "mine")
    loader = ScriptedLoader()
    app = make_app(loader=loader, jobs=ScriptedJobs())
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "model mine")
        assert "●" in line_of(app, "guide") and "●" not in line_of(app, "mine")
        await pilot.press("enter")
        await wait_until(pilot, lambda: [wish.name for wish in loader.wishes] == ["guide", "mine"])
        assert app.screen is app.chat_screen


async def test_details_say_what_show_says():
    install(Store(), "mine")
    app = make_app(jobs=ScriptedJobs())
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "model mine")
        await pilot.press("i")
        await wait_for_text(pilot, "architecture")
        assert "Qwen/Qwen2-0.5B-Instruct" in screen_text(app) and "context" in screen_text(app)
        await pilot.press("escape")
        assert isinstance(app.screen, ModelsScreen)


async def test_remove_asks_says_what_it_frees_and_deletes():
    install(Store(), "mine")
    app = make_app(jobs=ScriptedJobs())
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "model mine")
        await pilot.press("d")
        await wait_for_text(pilot, "It frees")
        await pilot.press("n")
        assert [one.name for one in Store().list()] == ["mine"]
        await pilot.press("d")
        await wait_for_text(pilot, "It frees")
        await pilot.press("y")
        await wait_until(pilot, lambda: not Store().list())
        await wait_until(pilot, lambda: "mine" not in screen_text(app).split())


async def test_what_is_in_use_is_not_removed():
    install(Store(), "mine")
    app = make_app(jobs=ScriptedJobs(), model=None)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        app.switch_model(app.wish("mine"))
        await opened(pilot, "model mine")
        await pilot.press("d")
        await wait_for_text(pilot, "mine is in use here.")
        assert [one.name for one in Store().list()] == ["mine"]


async def test_verify_shows_how_far_it_is_and_what_it_found():
    install(Store(), "mine")
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "model mine")
        await pilot.press("v")
        assert jobs.asked == [("verify", "mine")]
        jobs.say(Job("mine", "verify", "hashing", done=50, total=100))
        await wait_for_text(pilot, "hashing")
        assert "50%" in line_of(app, "mine")
        jobs.say(Job("mine", "verify", "hashing", 100, 100, state="done", words="All is well."))
        await wait_for_text(pilot, "All is well.")
        assert "✓ verified" in screen_text(app) and "GGUF Q4_0" in line_of(app, "mine")
        await pilot.press("x")
        assert len(jobs.asked) == 1, "there is nothing to cancel any more"


async def test_any_other_model_is_asked_for_by_name():
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "size 7b")
        await pilot.press("f")
        await wait_for_text(pilot, "Fetch which model?")
        await pilot.press(*"7b:q8_0", "enter")
        await wait_until(pilot, lambda: jobs.asked == [("plan", "7b:q8_0")])


async def test_the_palette_has_what_can_be_done_with_the_selected_one():
    install(Store(), "mine")
    jobs = ScriptedJobs()
    jobs.jobs["7b"] = FETCHING
    app = make_app(jobs=jobs)
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot, "model mine")
        titles = [one.title for one in screen.commands()]
        assert titles == ["Fetch another model", "Details of mine", "Verify mine", "Remove mine"]
        screen.lines.highlighted = screen.lines.get_option_index("size 7b")
        titles = [one.title for one in screen.commands()]
        assert titles == ["Pause the fetch of 7b", "Cancel the fetch of 7b", "Fetch another model"]


# Lines and plans, without a screen


def inventory(*installed: Installed) -> Inventory:
    return Inventory(installed, tuple(advice.advise(MEMORY, DISK)), MEMORY, DISK)


@pytest.mark.parametrize("width", [20, 40, 56, 70, 92, 200])
def test_no_line_is_wider_than_the_screen(width):
    jobs = [
        FETCHING,
        replace(FETCHING, name="some/model-of-a-very-long-name-indeed-GGUF:q4_k_m", words="converting 12%"),
        Job("x", "verify", "hashing", 5, 10),
        Job("7b", phase="looking"),
        Job("7b", state="paused", kept=10**9, total=2 * 10**9),
        Job("7b", state="failed", words="It is broken, and that takes many words to say, more than fit."),
    ]
    lines = [modelrows.size_head(width)]
    lines += [modelrows.size_row(one, inventory(), width) for one in inventory().advices]
    lines += [modelrows.job_row(job, width) for job in jobs]
    lines += [modelrows.installed_row(Installed("模型" * 30, "GGUF Q4_0", 10**9, 32768), width, used=True)]
    assert all(line.cell_length <= width for line in lines)


def test_bars_are_never_empty_nor_too_long():
    assert [modelrows.bar(share, 4) for share in (0, 0.01, 0.5, 1, 7)] == ["░░░░", "▓░░░", "▓▓░░", "▓▓▓▓", "▓▓▓▓"]


@pytest.mark.parametrize(("seconds", "words"), [(9, "0:09"), (138, "2:18"), (3738, "1:02:18")])
def test_time_left(seconds, words):
    assert modelrows.duration(seconds) == words


ANSWER = {
    "status": "planned", "title": "t", "source": "modelscope", "repository": "a/b", "speed": 0,
    "models": [{"name": "b:q4_0", "target": "gguf:q4_0", "state": "changed"}],
    "bytes": {"files": 100, "to_fetch": 40, "to_convert": 20, "disk_needed": 60, "disk_free": 70},
    "memory": {"at": {"32768": 9, "8192": 5}, "total": 10**10, "fits": False},
    "licence": {"id": "", "name": "not stated", "url": "u", "to_accept": False},
}  # fmt: skip


def test_a_plan_in_words():
    plan = read("b", ANSWER)
    lines = dict(plan.lines)
    assert plan.changed and not plan.current and [context for context, _ in plan.memory] == [8192, 32768]
    assert lines["fetch"] == "0 kB from ModelScope: a/b, of it 0 kB are here already" and lines["convert"].startswith("to b:q4_0 (gguf:q4_0)")
    assert lines["memory"].endswith("does not fit well") and lines["licence"].startswith("not stated") and "time" not in lines
    with pytest.raises(KeyError):
        read("b", {})
