"""`qwen2-local chat`: a conversation in plain lines, kept among the saved chats unless it is temporary."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from qwen2_local.cli import output
from qwen2_local.cli.opening import opened
from qwen2_local.cli.options import loads, system, wishes
from qwen2_local.errors import ContextOverflow, Qwen2LocalError, UnknownChat, UsageError
from qwen2_local.options import settle
from qwen2_local.types import Sampling

if TYPE_CHECKING:
    from qwen2_local.chat import Chat, Reply
    from qwen2_local.chats import ChatStore
    from qwen2_local.model import Qwen2

HELP = """\
Enter      send the line
Ctrl-C     stop the reply, keep what was written
/retry     another reply to the last question
/edit X    ask X instead of the last question
/more      let the last reply go on
/new       start over
/system X  set the system prompt to X, and start over
/help      this
/quit      leave; Ctrl-D too"""
_SHOWN = 600
"""Characters of the last reply, where a chat goes on."""


@click.command()
@click.argument("model", required=False)
@click.option("--continue", "last", is_flag=True, help="Go on with the last chat.")
@click.option("--resume", type=int, metavar="ID", help="Go on with this chat; `qwen2-local chats` lists them.")
@click.option("--temporary", is_flag=True, help="Leave nothing of this conversation on the disk.")
@click.option(
    "--overflow",
    type=click.Choice(["error", "drop_oldest", "keep_ends"]),
    metavar="POLICY",
    help="When the context is full: error (say so; default), drop_oldest (leave the oldest turns out) or keep_ends (all but first and latest).",
)
@system
@wishes
@loads
def chat(
    model: str | None,
    last: bool,
    resume: int | None,
    temporary: bool,
    overflow: Any,
    system: str | None,
    wishes: dict[str, Any],
    loads: dict[str, Any],
) -> None:
    """Talk with MODEL (the guide, or the chat's own), line by line. /help says what else there is.

    Chats are saved: `qwen2-local chats` lists them, `chats rm ID` deletes one.
    """
    if last + (resume is not None) + temporary > 1:
        raise click.UsageError("Of --continue, --resume and --temporary only one can be given.")
    if system is not None and (last or resume is not None):
        raise click.UsageError("--system has no place in a chat that goes on: it has its own.")
    settle(Sampling(), **wishes)  # what cannot be is refused before anything is loaded
    from qwen2_local.chats import ChatStore

    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is no text costs an error message, not the chat.
        sys.stdin.reconfigure(errors="surrogateescape")
    if temporary:
        store = None
        loads["kv_cache"] = False
    elif last or resume is not None:
        store = ChatStore.open()
    else:
        store = ChatStore.open_or_temporary()
    try:
        number = resume
        if store is not None:
            for note in store.notes:
                output.note(f"note: {note}")
            if last:
                number = _last(store)
            if number is not None:
                store.require_listed(number)
                model = model or store.summary(number).model or None
        model = model or "guide"
        with opened(model, loads) as loaded:
            output.note(f"{model} · {loaded.info.name} · context {loaded.longest:,} tokens · /help for help, Ctrl-D to leave")
            _Talk(loaded, store, system, overflow or "error", wishes).hold(number)
    finally:
        if store is not None:
            store.close()


def _last(store: ChatStore) -> int:
    newest = max(store.summaries(), key=lambda one: (one.used, one.id), default=None)
    if newest is None:
        raise UnknownChat("There is no saved chat to go on with.", hint="Begin one: `qwen2-local chat`.")
    return newest.id


class _Talk:
    """One conversation after the other, with one model."""

    def __init__(self, loaded: Qwen2, store: ChatStore | None, system: str | None, overflow: Any, wishes: dict[str, Any]) -> None:
        self._loaded = loaded
        self._store = store
        self._system = system
        self._overflow = overflow
        self._wishes = wishes
        self._unsaved = ""

    def hold(self, number: int | None) -> None:
        """Until the person leaves. number: of a saved chat that goes on."""
        chat = self._fresh() if number is None else self._resumed(number)
        while (line := _line()) is not None:
            match line.split(maxsplit=1):
                case []:
                    continue
                case ["/quit" | "/exit", *_]:
                    break
                case ["/help", *_]:
                    output.note(HELP)
                case ["/new"]:
                    chat = self._fresh()
                    output.note("A new conversation.")
                case ["/system", *rest]:
                    self._system = rest[0] if rest else None
                    chat = self._fresh()
                    output.note("A new conversation, with that system prompt." if rest else "A new conversation, with the default system prompt.")
                case ["/retry" | "/more" as command] if not any(message.role == "user" for message in chat.messages):
                    output.note(f"There is nothing to {'retry' if command == '/retry' else 'go on with'} yet.")
                case ["/retry"]:
                    self._again(chat)
                case ["/more"]:
                    self._turn(chat, chat.stream_continue)
                case ["/edit", text]:
                    self._edit(chat, text)
                case ["/edit"]:
                    output.note("/edit takes the new question: /edit What is MLX?")
                case ["/new" | "/retry" | "/more" as command, _]:
                    output.note(f"{command} takes no text. /help lists what there is.")
                case [command, *_] if command.startswith("/") and command[1:].isalpha():
                    output.note(f"There is no {command}. /help lists what there is; a message may not begin like that.")
                case _:
                    self._turn(chat, partial(chat.stream, line))

    def _fresh(self) -> Chat:
        from qwen2_local.chat import Chat

        return Chat(self._loaded, system=self._system, store=self._store, overflow=self._overflow)

    def _resumed(self, number: int) -> Chat:
        """A saved chat, with its last turn shown."""
        from qwen2_local.chat import Chat

        chat = Chat.load(self._loaded, number, self._store, overflow=self._overflow)
        messages = chat.messages
        output.note(f"chat {number} · {chat.title} · {len(messages)} messages")
        for message in [one for one in messages if one.role != "system"][-2:]:
            text = message.text if len(message.text) <= _SHOWN else f"… {message.text[-_SHOWN:]}"
            output.quote(f"> {text}" if message.role == "user" else text)
        if messages and messages[-1].role == "user":
            output.note("(that question has no reply: /retry gives it one)")
        elif messages and messages[-1].state == "partial":
            output.note("(that reply broke off: /more lets it go on, /retry writes another)")
        return chat

    def _again(self, chat: Chat) -> None:
        if settle(self._loaded.sampling, **self._wishes).sampling.temperature == 0 and chat.messages and chat.messages[-1].role == "assistant":
            output.note("(sampling is greedy, so the reply is the same; --temperature 0.7 makes it differ)")
        if "seed" in self._wishes:
            # The same seed would give the same reply.
            self._wishes["seed"] = (self._wishes["seed"] + 1) % 2**64
        self._turn(chat, chat.stream_regenerate)

    def _edit(self, chat: Chat, text: str) -> None:
        questions = [number for number, message in enumerate(chat.messages) if message.role == "user"]
        if not questions:
            output.note("There is no question to edit yet.")
        else:
            self._turn(chat, partial(chat.stream_edit, questions[-1], text))

    def _turn(self, chat: Chat, begin: Callable[..., Reply]) -> None:
        """One exchange. What goes wrong is said; the conversation stays."""
        with output.Status() as status:
            try:
                reply = begin(**self._wishes, progress=status.prefill)
                try:
                    for piece in reply:
                        output.reply(piece.text)
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise  # a script is stopped, not one reply
                finally:
                    with suppress(KeyboardInterrupt):  # an impatient second one
                        reply.close()
                    reply.close()
            except ContextOverflow as error:
                output.note(f"{error.what}\n  /new starts over; --context gives more room, --overflow drop_oldest leaves the oldest turns out.")
                return
            except UsageError as error:
                output.note(f"{error.what}")
                return
            except Qwen2LocalError as error:
                output.note(f"error: {error}")
                return
        completion = reply.completion
        assert completion is not None
        if completion.text:
            print(flush=True)
        if completion.finish_reason == "cancelled":
            output.note("(stopped)")
        elif completion.finish_reason == "context":
            output.note("(the context is full: /new starts over, --context gives more room)")
        elif not completion.text:
            output.note("(no reply)")
        if chat.unsaved and chat.unsaved != self._unsaved:
            output.note(f"note: the chat is not saved: {chat.unsaved}")
        self._unsaved = chat.unsaved


def _line() -> str | None:
    """The next line typed; None at the end of input. Ctrl-C drops the line on a terminal, and ends the chat elsewhere."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    with suppress(ImportError):
        import readline  # line editing and history in input()

        if "libedit" not in (readline.__doc__ or ""):
            # Python switches it off. With it, pasted lines are one message, not a question each.
            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ").rstrip("\n")
            print("> ", end="", file=sys.stderr, flush=True)
            return input()
        except EOFError:
            output.note("")
            return None
        except KeyboardInterrupt:
            output.note("\n(Ctrl-D leaves)")
