"""Screens to look at, for snapshots and for the screenshots of docs/app.md: each is brought about as a person would, always with the same content.

The machine is one of 32 GB, the time is a morning in January 2026.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from textual.pilot import Pilot

from qwen2_local import paths
from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore
from qwen2_local.fit import Memory
from qwen2_tui.live import Progress
from tests.tui.pilot import make_app, screen_text, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedLoader, ScriptedModel

NOW = 1_768_471_200.0
DAY = 86_400
GB = 10**9

RIVERS = """\
Three large rivers cross Laos:

| River    | Length in Laos | Runs into |
|:---------|---------------:|:----------|
| Mekong   |       1,865 km | the sea   |
| Nam Ou   |         448 km | Mekong    |
| Nam Khan |          90 km | Mekong    |

The **Mekong** is the longest. To sort them by length:

```python
rivers = {"Nam Khan": 90, "Mekong": 1865, "Nam Ou": 448}
for name in sorted(rivers, key=rivers.get):
    print(f"{name:10} {rivers[name]:>6,} km")
```

1. The *Nam Ou* has seven dams.
2. The Mekong has two in Laos, `Xayaburi` and `Don Sahong`.
"""
CHINESE = """\
老挝的主要河流有三条：

| 河流   |     长度 | 流入   |
|:-------|---------:|:-------|
| 湄公河 | 1,865 公里 | 南海   |
| 南乌江 |   448 公里 | 湄公河 |

- **湄公河**是最长的河流，流经六个国家。🌊
- 南乌江上有七座水坝；日本語：メコン川。
"""


@contextmanager
def still() -> Iterator[None]:
    """The same time and machine for whoever looks, and no blinking."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("textual.widgets.TextArea._toggle_cursor_blink_visible"))
        stack.enter_context(mock.patch("textual.widgets.Input._toggle_cursor"))
        for what, value in (
            ("time.time", NOW),
            ("qwen2_local.fit.machine_memory", Memory(32 * GB, 21 * GB)),
            ("qwen2_local.files.free_bytes", 412 * GB),
            ("qwen2_local.advice._bandwidth", 100e9),
            ("qwen2_tui.host.Host.memory", int(5.1 * GB)),
            ("qwen2_tui.contest.new_seed", 7),
        ):
            stack.enter_context(mock.patch(what, return_value=value))
        yield


def figures(phase: Any) -> Any:
    """A context in which every reply has the same: those of real ones are never twice the same."""
    return mock.patch("qwen2_tui.live.LiveReply.progress", return_value=Progress(phase, 1892, 1892, 1792, 88, 38.2, 0.3))


def conversation(question: str, *replies: str) -> tuple[ChatMessage, ...]:
    """A question with alternative replies, the last of which is shown."""
    asked = ChatMessage("user", question, id=1, created=NOW - 600)
    return asked, *(ChatMessage("assistant", text, id=2 + at, parent=1, created=NOW - 500, model="7b:q4_k_m") for at, text in enumerate(replies))


def fill() -> None:
    """Some chats, in this home."""
    chats = (
        ("Rivers of Laos", False, 60, conversation("Which rivers cross Laos?", "Many.", "The Mekong.", RIVERS)),
        ("老挝的河流", False, 7200, conversation("老挝有哪些河流？🌏", CHINESE)),
        ("Rust lifetimes", True, 3 * DAY, conversation("What is a lifetime?", "A region of code for which a reference is valid.")),
        ("Tax letter", False, 2 * DAY, conversation("Write to the tax office.", "Dear Sir or Madam,\n\nI refer to your letter of 3 January.")),
        ("A present for my niece, who likes to build bridges", False, 40 * DAY, conversation("A present?", "A kit for a truss bridge.")),
    )
    with ChatStore.open(paths.home() / "chats.db") as store:
        for title, pinned, ago, messages in chats:
            store.insert(ChatRecord(title, True, pinned, NOW - ago, NOW - ago, messages[-1].id, messages))


def app(*says: Any, **more: Any) -> Any:
    """The app as most have it: the 7B, and chats from before."""
    fill()
    model = ScriptedModel(*says, name="7b:q4_k_m", longest=32768, backend="llama.cpp", always=RIVERS[: RIVERS.index("```")])
    loader = ScriptedLoader(model, models={"guide": ScriptedModel(always="Laos has **many** rivers. I know more of quantization.")})
    return make_app(model=model, loader=loader, settings_file=Path("settings.toml"), opening={"model": "7b:q4_k_m", **more})


# Each takes a pilot of `app()` (of an empty home for the first) to a screen, and comes back when it is there.


async def welcome(pilot: Pilot[Any]) -> None:
    await wait_for_text(pilot, "Three things to try")
    await wait_for_text(pilot, "to fetch")


async def chat(pilot: Pilot[Any], title: str = "Rivers of Laos", text: str = "Xayaburi") -> None:
    """A saved one: what a live one shows of its speed is never twice the same."""
    number = next(one.id for one in pilot.app.store.summaries() if one.title == title)
    pilot.app.chat_screen.open_chat(number)
    await wait_for_text(pilot, text)
    await wait_for_text(pilot, "32,768")


async def writing(pilot: Pilot[Any]) -> None:
    """In the middle of a reply; to be looked at with `figures`."""
    pilot.app.scripted.says = [Say(RIVERS, hold=len(pilot.app.scripted.tokenizer.encode(RIVERS[: RIVERS.index("    print")])))]
    pilot.app.focused.insert("Which rivers cross Laos?")
    await pilot.press("enter")
    await wait_for_text(pilot, "for name in")
    await wait_for_text(pilot, "38.2")


async def chinese(pilot: Pilot[Any]) -> None:
    await chat(pilot, "老挝的河流", "メコン川")


async def search(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("ctrl+f", *"mekong")
    await wait_until(pilot, lambda: "Tax letter" not in _text(pilot))


async def palette(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("ctrl+p", *"chat")
    await wait_for_text(pilot, "New chat")
    await pilot.pause(0.2)


async def models(pilot: Pilot[Any]) -> None:
    await pilot.press("ctrl+o")
    await wait_for_text(pilot, "7b-base")


async def compare(pilot: Pilot[Any]) -> None:
    pilot.app.open_compare()
    await wait_for_text(pilot, "One prompt for both.")
    await wait_until(pilot, lambda: all(side.contender for side in pilot.app.screen.sides))
    pilot.app.focused.insert("Which rivers cross Laos?")
    with figures("over"):
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen_text(pilot.app).count("38.2 tok/s") == 2 and "I know more" in screen_text(pilot.app))


async def settings(pilot: Pilot[Any]) -> None:
    await pilot.press("f2")
    await wait_for_text(pilot, "emperature")


async def help(pilot: Pilot[Any]) -> None:
    await pilot.press("f1")
    await wait_for_text(pilot, "Writing a message")


async def tokens(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("tab", "t")
    await wait_until(pilot, lambda: type(pilot.app.screen).__name__ == "TokensScreen" and "%" in _text(pilot))


async def prompt(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("tab", "p")
    await wait_for_text(pilot, "<|im_start|>")


async def rename(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("tab", "tab", "r")
    await wait_until(pilot, lambda: len(pilot.app.screen_stack) > 1)


async def limit(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    pilot.app.focused.insert("A very long letter. " * 9000)
    await wait_for_text(pilot, "does not fit")


async def crashed(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    pilot.app.scripted.says = [Say("It was of course", hold=2)]
    pilot.app.focused.insert("And the shortest?")
    with figures("writing"):
        await pilot.press("enter")
        await wait_for_text(pilot, "It was")
        pilot.app.scripted.die()
        await wait_for_text(pilot, "safe mode")
        await wait_for_text(pilot, "398 / 32,768")


SCENES: dict[str, Callable[[Pilot[Any]], Awaitable[None]]] = {
    "chat": chat,
    "chinese": chinese,
    "search": search,
    "palette": palette,
    "models": models,
    "compare": compare,
    "settings": settings,
    "help": help,
    "tokens": tokens,
    "prompt": prompt,
    "rename": rename,
    "limit": limit,
    "crashed": crashed,
}


def _text(pilot: Pilot[Any]) -> str:
    return screen_text(pilot.app)
