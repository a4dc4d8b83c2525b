"""What a person does with saved chats, with the questions that belong to it: coroutines for `app.run_worker`, from keys and palette.

After each, every screen is told (`ChatsChanged`), and lists of chats look again. What goes wrong is said, and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.app import SystemCommand

from qwen2_local.chats import ChatStore
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean_line
from qwen2_tui.events import ChatsChanged
from qwen2_tui.library import Library, destination, destination_problem
from qwen2_tui.settings import applied
from qwen2_tui.titles import Proposal
from qwen2_tui.widgets.dialogs import Ask, Confirm
from qwen2_tui.widgets.sidebar import Sidebar

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp


async def rename(app: QwenApp, chat: int) -> None:
    """Asks for a title. The model proposes one meanwhile, if it can; a person takes it, or does not."""
    with _told(app):
        title = await asyncio.to_thread(app.library.title, chat)
        proposal = await asyncio.to_thread(app.library.proposal, chat)
        asked = Ask(
            "Rename the chat",
            title,
            words="" if proposal is None else "The model is asked for a title, too.",
            placeholder="empty: from the first question",
            check=lambda typed: "A title has at most 200 characters." if len(typed) > 200 else "",
        )
        waiting = None if proposal is None else asyncio.create_task(_proposed(proposal, asked))
        try:
            wanted = await app.push_screen_wait(asked)
        finally:
            if proposal is not None and waiting is not None:
                proposal.cancel()
                waiting.cancel()
        if wanted is not None and wanted != title:
            await asyncio.to_thread(app.library.rename, chat, wanted)
            changed(app)


async def _proposed(proposal: Proposal, asked: Ask) -> None:
    """Shows the title when it is there. A model that fails here proposes nothing, and that is all."""
    with suppress(Qwen2LocalError):
        title = await asyncio.to_thread(proposal.read)
        if asked.is_running:
            asked.propose(title)


async def pin(app: QwenApp, chat: int) -> None:
    """Pins it, or no longer."""
    with _told(app):
        await asyncio.to_thread(app.library.pin, chat)
        changed(app)


async def delete(app: QwenApp, chat: int) -> None:
    """Deletes it at once; a key brings it back."""
    with _told(app):
        title = await asyncio.to_thread(app.library.title, chat)
        await asyncio.to_thread(app.library.delete, chat)
        app.tell(f'Deleted "{title}". {app.key_of("app.undo")} brings it back, until the app ends.')
        changed(app, gone=[chat])


async def undo(app: QwenApp) -> None:
    """Brings back what was deleted last."""
    with _told(app):
        back = await asyncio.to_thread(app.library.undo)
        app.tell("There is no deletion to undo." if back is None else "It is there again.")
        if back is not None:
            changed(app, back=[back])


async def export(app: QwenApp, chat: int, store: ChatStore | None = None) -> None:
    """Asks for a file, and writes the chat to it. store: where the chat is, if it is not among the saved ones."""
    library = app.library if store is None else Library(store)
    with _told(app):
        suggested = await asyncio.to_thread(library.suggestion, chat, Path.cwd())
        words = "End the name in .md to read it, in .json for all of it: branches, ids and timings, to be imported again."
        typed = await app.push_screen_wait(Ask("Export the chat", str(suggested), words=words, check=destination_problem))
        if typed is None:
            return
        path = destination(typed)
        overwrite = await asyncio.to_thread(path.exists)
        if overwrite and not await app.push_screen_wait(Confirm("Replace the file?", f"{path} is there already.", yes="replace", grave=True)):
            return
        await asyncio.to_thread(lambda: library.export(chat, path, overwrite=overwrite))
        app.tell(f"Wrote {path}.")


def commands(app: QwenApp) -> Iterator[SystemCommand]:
    """For the palette: what can be done with the chat that is open."""
    screen = app.chat_screen
    number, chat = screen.number, screen.chat
    if number is not None:
        for title, help, doing in (
            ("Rename this chat", "the model proposes a title", rename),
            ("Pin this chat, or no longer", "pinned ones stand first", pin),
            ("Delete this chat", f"{app.key_of('app.undo')} brings it back", delete),
            ("Export this chat", "as Markdown or JSON", export),
        ):
            yield SystemCommand(title, help, partial(_run, app, doing, number))
    elif screen.temporary and chat is not None and chat.number is not None:
        store = screen.session.conversation.store
        yield SystemCommand("Export this chat", "as Markdown or JSON", partial(_run, app, partial(export, store=store), chat.number))
    for name, preset in app.settings.presets.items():
        yield SystemCommand(f"Preset: {clean_line(name)}", "for this chat", partial(screen.change_chat, applied(preset, app.settings.chat)))


def _run(app: QwenApp, doing: Callable[[QwenApp, int], Coroutine[Any, Any, None]], chat: int) -> None:
    app.run_worker(doing(app, chat))


def changed(app: QwenApp, *, gone: Iterable[int] = (), back: Iterable[int] = ()) -> None:
    """Tells everybody that chats are other than they were."""
    for screen in app.screen_stack:
        screen.post_message(ChatsChanged(frozenset(gone), frozenset(back)))
        for sidebar in screen.query(Sidebar):
            sidebar.refresh_chats()


@contextmanager
def _told(app: QwenApp) -> Iterator[None]:
    try:
        yield
    except (Qwen2LocalError, OSError) as error:
        app.problem(error)
