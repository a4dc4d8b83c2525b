"""The table of keys: what each does, and where. Bindings are made from it, and so are the footer, the help and what settings may change.

A key that many terminals swallow (shift+enter) or multiplexers use as a prefix (ctrl+b, ctrl+a) is never the only one of its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, cast

from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual.binding import Binding

Where = Literal["everywhere", "writing", "conversation", "chats", "models", "compare", "settings", "tokens", "prompt"]

PLACES: dict[Where, str] = {
    "everywhere": "Everywhere",
    "writing": "Writing a message",
    "conversation": "In the conversation, on the selected turn",
    "chats": "In the list of chats",
    "models": "Models",
    "compare": "Compare",
    "settings": "Settings",
    "tokens": "Tokens and probabilities",
    "prompt": "The raw prompt",
}


@dataclass(frozen=True, slots=True)
class Key:
    """A row of the table. keys: by default, with commas between several. words: for the footer; help: longer, "" for the same."""

    id: str
    keys: str
    words: str
    where: Where
    help: str = ""

    @property
    def shown(self) -> str:
        """The default keys for people: "ctrl+j, alt+enter"."""
        return shown(self.keys)


_SIGNS = {
    "question_mark": "?", "slash": "/", "left_square_bracket": "[", "right_square_bracket": "]", "escape": "esc", "pageup": "page up",
    "pagedown": "page down", "space": "space", "at": "@", "plus": "+", "minus": "-",
}  # fmt: skip


def shown(keys: str) -> str:
    """Keys as a person reads them."""
    return ", ".join("+".join(_SIGNS.get(part, part) for part in one.strip().split("+")) for one in keys.split(","))


TABLE: tuple[Key, ...] = (
    Key("app.palette", "ctrl+p", "commands", "everywhere", "all commands, by name"),
    Key("app.help", "f1", "help", "everywhere", "this help"),
    Key("app.new", "ctrl+n", "new", "everywhere", "new chat"),
    Key("app.temporary", "ctrl+t", "temporary", "everywhere", "new chat that leaves nothing on the disk"),
    Key("app.search", "ctrl+f", "search", "everywhere", "search chats, titles and texts"),
    Key("app.sidebar", "f3", "chats", "everywhere", "show or hide the list of chats"),
    Key("app.models", "ctrl+o", "models", "everywhere", "models: fetch, switch, compare"),
    Key("app.settings", "f2", "settings", "everywhere"),
    Key("app.undo", "ctrl+z", "undo", "everywhere", "undo the deletion of chats"),
    Key("app.interrupt", "ctrl+c", "copy or stop", "everywhere", "copy what is selected; else stop the reply; else, twice, quit"),
    Key("app.back", "escape", "back", "everywhere", "close what is open; stop the reply and keep it; else back to the message"),
    Key("app.quit", "ctrl+q", "quit", "everywhere", "quit; nothing is lost"),
    *(
        Key(f"offer.{number}", f"f{number + 4}", f"choice {number}", "everywhere", f"choice {number} of what is offered above the message")
        for number in range(1, 5)
    ),
    Key("write.send", "enter", "send", "writing"),
    Key("write.newline", "ctrl+j,alt+enter,shift+enter", "new line", "writing"),
    Key("write.earlier", "up", "earlier questions", "writing", "earlier questions, in an empty message"),
    Key("write.complete", "tab", "complete path", "writing", "complete a path behind @: attaches that text file"),
    Key("write.editor", "ctrl+e", "editor", "writing", "write in $EDITOR"),
    Key("turn.up", "up,k", "turn up", "conversation", "the turn above"),
    Key("turn.down", "down,j", "turn down", "conversation", "the turn below"),
    Key("turn.page_up", "pageup", "page up", "conversation"),
    Key("turn.page_down", "pagedown", "page down", "conversation"),
    Key("turn.first", "home", "start", "conversation", "to the start"),
    Key("turn.last", "end", "end", "conversation", "to the end, and stay there"),
    Key("turn.edit", "e", "edit", "conversation", "edit it, as another branch"),
    Key("turn.regenerate", "r", "regenerate", "conversation", "another reply"),
    Key("turn.continue", "c", "continue", "conversation", "let the reply go on"),
    Key("turn.copy", "y", "copy", "conversation", "copy it, or the code block that is focused"),
    Key("turn.code_next", "n", "next code", "conversation", "next code block"),
    Key("turn.code_previous", "b", "previous code", "conversation", "previous code block"),
    Key("turn.stop", "escape", "stop", "conversation", "stop the reply that is being written, and keep what came"),
    Key("turn.tokens", "t", "tokens", "conversation", "its tokens with their probabilities"),
    Key("turn.prompt", "p", "prompt", "conversation", "the raw prompt, as the model sees it"),
    Key("turn.previous", "left", "branch left", "conversation", "the alternative before"),
    Key("turn.next", "right", "branch right", "conversation", "the next alternative"),
    Key("turn.write", "i", "write", "conversation", "back to the message"),
    Key("chats.open", "enter", "open", "chats"),
    Key("chats.search", "slash", "search", "chats"),
    Key("chats.rename", "r", "rename", "chats", "give it a title; the model proposes one"),
    Key("chats.pin", "p", "pin", "chats", "keep it at the head of the list, or no longer"),
    Key("chats.delete", "d,delete", "delete", "chats", "delete it; ctrl+z brings it back"),
    Key("chats.export", "x", "export", "chats", "export as Markdown or JSON"),
    Key(
        "models.open", "enter", "take", "models", "use an installed model, in this chat too; plan the fetch of another; go on with one that is paused"
    ),
    Key("models.fetch", "f", "fetch other", "models", "fetch any other model or quantization: by name, hub's id, address or path"),
    Key("models.pause", "p,space", "pause", "models", "pause or go on with a fetch"),
    Key("models.cancel", "x", "cancel", "models", "cancel a fetch, and delete what came of it"),
    Key("models.verify", "v", "verify", "models", "read it back, and compare it with its checksums"),
    Key("models.details", "i", "details", "models", "all that is known of an installed model"),
    Key("models.remove", "d,delete", "remove", "models", "delete an installed model"),
    Key("models.compare", "c", "compare", "models", "two models, one prompt"),
    Key("compare.again", "ctrl+r", "another seed", "compare", "ask both once more, with another seed"),
    Key("compare.models", "f4", "choose", "compare", "choose the two models, and their settings"),
    Key("settings.save", "ctrl+s", "save", "settings"),
    Key("settings.reset", "ctrl+r", "reset", "settings", "the selected value back to what it would be without it"),
    Key("settings.next", "ctrl+pagedown,f6", "next section", "settings"),
    Key("settings.previous", "ctrl+pageup,f5", "previous section", "settings"),
    Key("tokens.left", "left,h", "token left", "tokens", "the token before"),
    Key("tokens.right", "right,l", "token right", "tokens", "the next token"),
    Key("tokens.up", "up,k", "line up", "tokens"),
    Key("tokens.down", "down,j", "line down", "tokens"),
    Key("tokens.first", "home", "first", "tokens", "the first token"),
    Key("tokens.last", "end", "last", "tokens", "the last token"),
    Key("tokens.unlikely", "n", "next surprise", "tokens", "the next token that had a likelier alternative"),
    Key("tokens.branch", "enter", "alternatives", "tokens", "choose another token, and let the reply go on from there"),
    Key("prompt.copy", "y", "copy", "prompt", "copy the prompt as text"),
)

BY_ID: Mapping[str, Key] = {key.id: key for key in TABLE}


class _Untaught(Enum):
    """What most terminals send for alt+enter. Textual takes it for enter, and half a message would be sent."""

    ALT_ENTER = "alt+enter"


cast("dict[str, Any]", ANSI_SEQUENCES_KEYS)["\x1b\r"] = (_Untaught.ALT_ENTER,)


def bind(id: str, action: str, *, show: bool = False, priority: bool = False) -> Binding:
    """The binding of the row `id`. show: in the footer, where it matters now. priority: before the focused widget's own keys."""
    key = BY_ID[id]
    return Binding(key.keys, action, key.words, show=show, priority=priority, id=id, tooltip=key.help)


def keymap(wanted: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What a person's settings change of the table, as Textual wants it; and sentences on what of it cannot be."""
    taken, notes = {}, []
    for id, keys in wanted.items():
        if id not in BY_ID:
            notes.append(f"There is no key named {id}: F1 lists them.")
        elif not keys.strip():
            notes.append(f"The key {id} has nothing to be pressed.")
        else:
            taken[id] = keys
    for first, second, key in clashes({row.id: taken.get(row.id, row.keys) for row in TABLE}):
        if first in taken or second in taken:
            notes.append(f"{shown(key)} is {BY_ID[first].words} and {BY_ID[second].words} at once.")
    return taken, tuple(notes)


def clashes(bound: Mapping[str, str]) -> Iterable[tuple[str, str, str]]:
    """Pairs of rows that have a key in common, and can be meant at the same time: of one place."""
    seen: dict[tuple[Where, str], str] = {}
    for id, keys in bound.items():
        for key in (one.strip() for one in keys.split(",")):
            place = (BY_ID[id].where, key)
            if place in seen:
                yield seen[place], id, key
            seen[place] = id
