"""`qwen2-local chat`: a conversation in plain lines. Nothing is saved."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from qwen2_local.cli import output
from qwen2_local.cli.options import sampling_from, shared
from qwen2_local.errors import ContextOverflow, Qwen2LocalError
from qwen2_local.types import Message, Sampling

if TYPE_CHECKING:
    from qwen2_local.model import Qwen2

HELP = """\
Enter      send the line
Ctrl-C     stop the reply, keep what was written
/new       start over
/system X  set the system prompt to X, and start over
/help      this
/quit      leave; Ctrl-D too"""


@click.command()
@click.argument("model", default="guide")
@shared
def chat(
    model: str = "guide",
    system: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    backend: str | None = None,
) -> None:
    """Talk with MODEL, line by line. /help says what else there is. Chats are not saved."""
    from qwen2_local.model import Qwen2

    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is no text costs an error message, not the chat.
        sys.stdin.reconfigure(errors="surrogateescape")
    sampling_from(Sampling(), temperature, top_p, top_k, seed)  # what cannot be is refused before anything is loaded
    with output.Status() as status:
        status.show(f"loading {model}")
        loaded = Qwen2(model, backend=backend, context=context, report=status.bytes)
    with loaded:
        for warning in loaded.notes:
            output.note(f"note: {warning}")
        sampling = sampling_from(loaded.sampling, temperature, top_p, top_k, seed)
        output.note(f"{model} · {loaded.info.name} · context {loaded.info.context:,} tokens · /help for help, Ctrl-D to leave")
        history = _fresh(system)
        while (line := _line()) is not None:
            match line.split(maxsplit=1):
                case []:
                    continue
                case ["/quit" | "/exit"]:
                    break
                case ["/help"]:
                    output.note(HELP)
                case ["/new"]:
                    history = _fresh(system)
                    output.note("A new conversation.")
                case ["/system", *rest]:
                    system = rest[0] if rest else None
                    history = _fresh(system)
                    output.note("A new conversation, with that system prompt." if rest else "A new conversation, with the default system prompt.")
                case [command, *_] if command.startswith("/") and command[1:].isalpha():
                    output.note(f"There is no {command}. /help lists what there is; a message may not begin like that.")
                case _:
                    history = _turn(loaded, history, line, sampling, max_tokens)


def _turn(loaded: Qwen2, history: list[Message], line: str, sampling: Sampling, max_tokens: int | None) -> list[Message]:
    """One exchange; gives the conversation with it, or as it was if there was no reply."""
    asked = [*history, Message("user", line)]
    completion = None
    with output.Status() as status:
        try:
            stream = loaded.respond(asked, sampling=sampling, max_tokens=max_tokens, progress=status.prefill)
            try:
                for piece in stream:
                    output.reply(piece.text)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise  # a script is stopped, not one reply
            with suppress(KeyboardInterrupt):  # an impatient second one
                stream.close()
            stream.close()
            completion = stream.completion
        except ContextOverflow as error:
            output.note(f"{error.what}\n  /new starts over; --context gives more room.")
            return history
        except Qwen2LocalError as error:
            output.note(f"error: {error}")
            return history
    assert completion is not None
    if completion.text:
        print(flush=True)
    if completion.finish_reason == "cancelled":
        output.note("(stopped)")
    elif not completion.text:
        output.note("(no reply)")
    elif completion.finish_reason == "context":
        output.note("(the context is full: /new starts over, --context gives more room)")
    return [*asked, Message("assistant", completion.text)] if completion.text else history


def _fresh(system: str | None) -> list[Message]:
    return [Message("system", system)] if system else []


def _line() -> str | None:
    """The next line typed; None at the end of input. Ctrl-C drops the line on a terminal, and ends the chat elsewhere."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history in input())
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            print("> ", end="", file=sys.stderr, flush=True)
            return input()
        except EOFError:
            output.note("")
            return None
        except KeyboardInterrupt:
            output.note("\n(Ctrl-D leaves)")
