"""The list of chats: newest first, found by their words, a drawer where it is narrow; by key and by mouse."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len, set_cell_size
from textual.app import App, ComposeResult
from textual.containers import Horizontal
from textual.pilot import Pilot
from textual.widgets import Static

from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore
from qwen2_tui.widgets.chatlist import ChatList
from qwen2_tui.widgets.dialogs import Line
from qwen2_tui.widgets.rowtext import ago, around, fitted
from qwen2_tui.widgets.sidebar import Sidebar
from tests.tui.pilot import make_app, running, screen_text, wait_for_text, wait_until

NOW = time.time()


def chat(title: str, reply: str = "", *, hours: float = 0, pinned: bool = False) -> ChatRecord:
    used = NOW - 3600 * hours
    messages = (ChatMessage("user", title, 1, None, created=used), ChatMessage("assistant", reply, 2, 1, created=used))
    return ChatRecord(title, True, pinned, used, used, 2, messages)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChatStore]:
    with ChatStore.open(tmp_path / "chats.db") as store:
        store.insert_all([
            chat("Tax letter", "Dear Sir or Madam", hours=50),
            chat("Rivers of Laos", "The long way of the Mekong through the mountains, of the Nam Ou and of others.", hours=3),
            chat("Rust lifetimes", "They are inferred.", hours=80, pinned=True),
            chat("老挝的河流", "湄公河从中国进入老挝。", hours=24 * 20),
        ])  # fmt: skip
        yield store


class Beside(App[None]):
    """A sidebar beside something."""

    CSS = "#main { width: 1fr; }"

    def __init__(self, store: ChatStore) -> None:
        super().__init__()
        self.store = store
        self.heard: list[Any] = []

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Sidebar(self.store)
            yield Static("conversation " * 500, id="main")

    def on_sidebar_opened(self, event: Sidebar.Opened) -> None:
        self.heard.append((event.chat, event.message))

    def on_sidebar_new(self, event: Sidebar.New) -> None:
        self.heard.append(event.temporary)

    def on_sidebar_left(self) -> None:
        self.heard.append("left")


async def filled(pilot: Pilot[Any], rows: int = 4) -> Sidebar:
    sidebar = pilot.app.query_one(Sidebar)
    await wait_until(pilot, lambda: len(listed(sidebar)) == rows)
    return sidebar


def listed(sidebar: Sidebar) -> list[str]:
    return [row.title for row in sidebar.query_one(ChatList).rows]


def lines(app: App[Any], width: int = 29) -> list[str]:
    return [set_cell_size(line, width).rstrip(" │").strip() for line in screen_text(app).splitlines()]


async def test_pinned_ones_come_first_then_the_newest_with_how_long_ago(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        await filled(pilot)
        assert [" ".join(line.split()) for line in lines(pilot.app)[1:5]] == [
            "★ Rust lifetimes 3d",
            "Rivers of Laos 3h",
            "Tax letter 2d",
            "老挝的河流 2w",
        ]


async def test_the_open_one_is_marked_and_those_with_a_reply_under_way(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        sidebar = await filled(pilot)
        sidebar.mark(2, running={2, 1})
        await pilot.pause()
        assert sidebar.highlighted == 2  # what is done with a chat is done with the one that one sees
        assert [line[0] for line in lines(pilot.app)[1:4]] == ["★", "●", "●"]
        sidebar.mark(2, running={1})
        await pilot.pause()
        assert [line[0] for line in lines(pilot.app)[2:4]] == ["▌", "●"]
        assert "temporary chat" not in screen_text(pilot.app)
        sidebar.mark(None, temporary=True, running={None})
        await wait_for_text(pilot, "● temporary chat: not saved")


async def test_a_search_shows_the_words_where_they_are_and_opens_the_message(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        sidebar = await filled(pilot)
        sidebar.focus_search()
        await pilot.press(*"meko")
        await filled(pilot, 1)
        assert lines(pilot.app)[1].startswith("Rivers of Laos")
        assert "Mekong" in lines(pilot.app)[2]
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.heard == [(2, 4)])  # type: ignore[attr-defined]


async def test_titles_and_chinese_words_are_found_and_nothing_is_said_plainly(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        sidebar = await filled(pilot)
        line = sidebar.query_one(Line)
        line.value = "tax"
        await wait_until(pilot, lambda: listed(sidebar) == ["Tax letter"])
        line.value = "进入"
        await wait_until(pilot, lambda: listed(sidebar) == ["老挝的河流"])
        assert "进入" in lines(pilot.app)[2]
        line.value = "nowhere"
        await wait_for_text(pilot, "Nothing was found.")


async def test_escape_takes_back_the_search_then_the_keyboard(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        sidebar = await filled(pilot)
        sidebar.focus_search()
        await pilot.press(*"tax")
        await filled(pilot, 1)
        await pilot.press("escape")
        await filled(pilot, 4)
        await pilot.press("escape")
        await wait_until(pilot, lambda: pilot.app.heard == ["left"])  # type: ignore[attr-defined]


async def test_by_keys(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        sidebar = await filled(pilot)
        sidebar.query_one("#chats").focus()
        await pilot.press("down", "j", "k", "enter", "end", "enter", "home", "enter")
        await wait_until(pilot, lambda: pilot.app.heard == [(2, None), (4, None), (3, None)])  # type: ignore[attr-defined]
        await pilot.press("slash", *"la", "down", "enter")
        assert sidebar.query_one(ChatList).has_focus


async def test_by_mouse(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(100, 24)) as pilot:
        await filled(pilot)
        await pilot.click(ChatList, offset=(5, 2))
        await pilot.click("#new-temporary")
        await pilot.click("#new-chat")
        await wait_until(pilot, lambda: pilot.app.heard == [(1, None), True, False])  # type: ignore[attr-defined]
        await pilot.click(ChatList, offset=(5, 15))  # below the last
        assert len(pilot.app.heard) == 3  # type: ignore[attr-defined]


async def test_below_80_columns_it_is_a_drawer(store: ChatStore) -> None:
    async with Beside(store).run_test(size=(79, 20)) as pilot:
        sidebar = pilot.app.query_one(Sidebar)
        main = pilot.app.query_one("#main")
        assert not sidebar.display and main.region.width == 79
        sidebar.toggle()
        await wait_for_text(pilot, "Tax letter")
        assert main.region.width == 79 and sidebar.region.width <= 79 * 0.9
        await pilot.press("down", "enter")
        await wait_until(pilot, lambda: pilot.app.heard == [(2, None)])  # type: ignore[attr-defined]
        assert not sidebar.display  # it has done what it was opened for
        sidebar.focus_search()
        await wait_until(pilot, lambda: sidebar.display)
        main.can_focus = True
        main.focus()
        await wait_until(pilot, lambda: not sidebar.display)
        await pilot.resize_terminal(80, 20)
        await wait_until(pilot, lambda: sidebar.display and main.region.width == 50)
        sidebar.toggle()
        await wait_until(pilot, lambda: main.region.width == 80)


async def test_the_keyboard_does_not_stay_in_it_when_the_window_gets_narrow(store: ChatStore) -> None:
    app = make_app()
    async with running(app, size=(100, 30)) as pilot:
        app.chat_screen.sidebar.query_one("#chats").focus()
        await wait_until(pilot, lambda: isinstance(app.focused, ChatList))
        await pilot.resize_terminal(60, 20)
        await wait_until(pilot, lambda: app.focused is app.chat_screen.composer)
        await pilot.press("h", "i")
        assert app.chat_screen.composer.text == "hi"


async def test_two_thousand_chats_are_shown_and_walked_through_at_once(tmp_path: Path) -> None:
    with ChatStore.open(tmp_path / "chats.db") as store:
        store.insert_all([chat(f"Chat {number}", "with some words", hours=number) for number in range(2000)])
        async with Beside(store).run_test(size=(100, 24)) as pilot:
            sidebar = await filled(pilot, 2000)
            chats = sidebar.query_one(ChatList)
            began = time.process_time()
            drawn = [chats.render_line(y) for y in range(24)]
            chats.show(chats.rows, now=NOW)
            assert time.process_time() - began < 0.1
            assert len(drawn) == 24
            sidebar.query_one("#chats").focus()
            await pilot.press("end")
            await wait_for_text(pilot, "Chat 1999")
            # The cursor stays with its chat when a newer one comes.
            store.insert(chat("newest"))
            sidebar.refresh_chats()
            await filled(pilot, 2001)
            assert chats.row is not None and chats.row.title == "Chat 1999"


async def test_no_title_is_obeyed(tmp_path: Path) -> None:
    with ChatStore.open(tmp_path / "chats.db") as store:
        store.insert_all([chat("[red]a\x1b[31mb\nc", "find \x1b]52;c;aGk=\x07 me")])
        async with Beside(store).run_test(size=(100, 24)) as pilot:
            sidebar = await filled(pilot, 1)
            assert "[red]a[31mb c" in lines(pilot.app)[1]
            sidebar.query_one(Line).value = "me"
            await wait_for_text(pilot, "find ]52;c;aGk= me")


async def test_what_cannot_be_read_is_said(store: ChatStore) -> None:
    app = Beside(store)
    async with app.run_test(size=(100, 24)) as pilot:
        sidebar = await filled(pilot)
        store.close()
        sidebar.refresh_chats()
        await wait_until(pilot, lambda: [one.message for one in app._notifications] == ["The chats are closed."])


async def test_what_is_done_with_the_chat_under_the_cursor(store: ChatStore) -> None:
    app = make_app(store=store)
    async with running(app, size=(100, 30)) as pilot:
        sidebar = await filled(pilot)
        sidebar.query_one("#chats").focus()
        await pilot.press("down", "p")
        await wait_until(pilot, lambda: store.summary(2).pinned and listed(sidebar)[0] == "Rivers of Laos")
        assert sidebar.highlighted == 2
        await pilot.press("d")
        await wait_until(pilot, lambda: "Rivers of Laos" not in listed(sidebar))
        await pilot.press("ctrl+z")
        await wait_until(pilot, lambda: "Rivers of Laos" in listed(sidebar))
        await pilot.press("home", "r")
        await wait_for_text(pilot, "Rename the chat")
        await pilot.press("ctrl+u", *"New", "enter")
        await wait_until(pilot, lambda: listed(sidebar)[0] == "New")
        await pilot.press("x")
        await wait_for_text(pilot, "Export the chat")
        await pilot.press("escape")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "now"), (59, "now"), (60, "1m"), (3600, "1h"), (86400, "1d"), (13 * 86400, "13d"), (14 * 86400, "2w"), (800 * 86400, "2y")],
)
def test_how_long_ago(seconds: float, said: str) -> None:
    assert ago(seconds) == said


@pytest.mark.parametrize(
    ("text", "width"), [("Rivers", 10), ("Rivers of Laos", 10), ("老挝的河流有哪些", 9), ("🦆" * 20, 7), ("", 3), ("ab", 1), ("ab", 0)]
)
def test_titles_are_as_wide_as_there_is_room(text: str, width: int) -> None:
    assert cell_len(fitted(text, width)) == width


def test_the_words_are_seen_in_what_is_left_of_a_long_text() -> None:
    text = "At first much is said that nobody looks for, and then at last the Mékong comes, and the mekong again."
    part, places = around(text, ["MEKONG", "and"], 40)
    assert cell_len(part) <= 40
    assert [part[start:end] for start, end in places] == ["and", "Mékong"] or "Mékong" in [part[start:end] for start, end in places]
    assert around("nothing here", ["x"], 40) == ("nothing here", [])
