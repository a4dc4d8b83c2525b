"""What is done with saved chats: renamed, pinned, deleted and brought back, written to files. Its methods ask the disk: call them in a thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_local import files, kvcache, paths
from qwen2_local.chats import ChatStore, deletion, exchange
from qwen2_local.errors import UnknownChat
from qwen2_local.sanitize import clean_line
from qwen2_tui.titles import Proposal, can_propose

if TYPE_CHECKING:
    from qwen2_tui.model import Model

ENDINGS: dict[str, exchange.Format] = {".md": "markdown", ".markdown": "markdown", ".json": "json"}
"""Of the files that a chat is written to, and what is in them."""

_LONGEST_NAME = 40


class Library:
    """The chats of `store`. model: the one that is loaded, if any: it is told what to forget, and asked for titles."""

    def __init__(self, store: ChatStore, model: Callable[[], Model | None] = lambda: None) -> None:
        self.store = store
        self._model = model
        self._deleted: list[int] = []

    def title(self, chat: int) -> str:
        """Its title."""
        return self.store.summary(chat).title

    def rename(self, chat: int, title: str) -> None:
        """Gives it a title; with "", that from its first question."""
        self.store.rename(chat, title)

    def proposal(self, chat: int) -> Proposal | None:
        """A title that the model may propose; None where there is no model that can."""
        model = self._model()
        if model is None or not can_propose(model):
            return None
        return Proposal(model, exchange.conversation(self.store.record(chat)))

    def pin(self, chat: int) -> bool:
        """Keeps it at the head of the list, or no longer. Is it pinned now?"""
        pinned = not self.store.summary(chat).pinned
        self.store.pin(chat, pinned)
        return pinned

    # Deleting

    def delete(self, chat: int) -> None:
        """Out of all lists at once; for good when the app ends."""
        self.store.trash([chat])
        self._deleted.append(chat)

    def undo(self) -> int | None:
        """Brings back the chat that was deleted last, and says which it was; None if there is none that can come back."""
        while self._deleted:
            chat = self._deleted[-1]
            try:
                self.store.restore([chat])
            except UnknownChat:  # another process has emptied the trash
                chat = 0
            self._deleted.pop()
            if chat:
                return chat
        return None

    def sweep(self) -> None:
        """Deletes for good what lies in the trash since long ago: from an app that did not end well, say."""
        self._purge(())

    def close(self) -> None:
        """Deletes for good what was deleted here."""
        self._purge(self._deleted)
        self._deleted.clear()

    def _purge(self, chats: Sequence[int]) -> None:
        if self.store.read_only:
            return
        model = self._model()
        deletion.purge(self.store, disk=kvcache.Disk(paths.kv()), forget=None if model is None else model.forget, chats=chats)

    # Files

    def suggestion(self, chat: int, folder: Path) -> Path:
        """A file in `folder` that is not there yet, named like the chat."""
        words = re.sub(r"[\W_]+", "-", self.title(chat)).strip("-")[:_LONGEST_NAME].strip("-") or f"chat-{chat}"
        names = (words, *(f"{words}-{number}" for number in range(2, 1000)))
        return next((path for name in names if not (path := folder / f"{name}.md").exists()), folder / f"{words}.md")

    def export(self, chat: int, path: Path, *, overwrite: bool = False) -> None:
        """Writes it as its ending says (`ENDINGS`), for its owner only.

        Raises UsageError if the file exists, unless `overwrite`; DoesNotFit on a full disk, OSError where it cannot be written.
        """
        record = self.store.record(chat)
        text = exchange.to_markdown(record) if ENDINGS[path.suffix.lower()] == "markdown" else exchange.to_json(record)
        with files.staging_file(path, overwrite=overwrite) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text.removesuffix("\n") + "\n")


def destination(typed: str) -> Path:
    """The file that a person means."""
    return Path(typed).expanduser().absolute()


def destination_problem(typed: str) -> str:
    """Why a chat cannot be written there, in a sentence; "" if it can. A file that is there already is no problem yet."""
    if not typed:
        return "Say where to write it."
    if clean_line(typed) != typed:
        return "That is no name of a file."
    try:
        path = destination(typed)
        if path.suffix.lower() not in ENDINGS:
            return "End the name in .md (to read) or .json (all of it, to be imported again)."
        if path.is_dir():
            return f"{path} is a folder."
        if not path.parent.is_dir():
            return f"There is no folder {path.parent}."
        if not paths.writable(path.parent):
            return f"The folder {path.parent} cannot be written."
    except (OSError, RuntimeError) as error:  # a name too long, no home
        return f"That is no name of a file ({error})."
    return ""
