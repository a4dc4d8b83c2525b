"""`qwen2-local app`: the full-screen app. Alone on a terminal, `qwen2-local` opens it as well, or the plain chat where it cannot be."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from qwen2_local.cli import output
from qwen2_local.cli.options import loads_apart
from qwen2_local.errors import UsageError
from qwen2_local.sanitize import clean_line


@click.command()
@click.argument("model", required=False)
@click.option("--continue", "last", is_flag=True, help="Go on with the last chat.")
@click.option("--resume", type=int, metavar="ID", help="Go on with this chat; `qwen2-local chats` lists them.")
@click.option("--temporary", is_flag=True, help="Begin with a chat that leaves nothing on the disk.")
@loads_apart
def app(model: str | None, last: bool, resume: int | None, temporary: bool, loads: dict[str, Any]) -> None:
    """Open the app, full screen, with MODEL (the chat's own, or that of the settings, or the guide). F1 helps there, ctrl+q leaves.

    It needs a terminal of 60 columns and 20 lines or more. `qwen2-local chat` is the plain chat, line by line.
    """
    if last + (resume is not None) + temporary > 1:
        raise click.UsageError("Of --continue, --resume and --temporary only one can be given.")
    if why := unfit():
        raise UsageError(f"The app cannot open here: {why}.", hint="`qwen2-local chat` talks line by line, in any terminal.")
    if resume is not None:
        _require_chat(resume)
    from qwen2_tui import run

    raise SystemExit(run(model, chat=resume, continue_last=last, temporary=temporary, loads=loads))


def on_terminal() -> bool:
    """Does a person sit there?"""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def unfit() -> str:
    """Why no full-screen program can be shown here; "" where one can."""
    if not on_terminal():
        return "its input and output are no terminal"
    kind = os.environ.get("TERM", "")
    if sys.platform != "win32" and kind in ("", "dumb", "unknown"):
        return f"the terminal is too simple (TERM is {kind or 'not set'})"
    return ""


def open_or_chat(context: click.Context) -> None:
    """What a person gets who types no command: the app, or the plain chat where it cannot be shown or does not start."""
    if not unfit():
        try:
            context.invoke(app)
        except Exception as error:
            if os.environ.get("QWEN2_LOCAL_DEBUG"):
                raise
            output.note(f"note: the app does not start ({type(error).__name__}: {clean_line(str(error))}); this is the plain chat.")
    from qwen2_local.cli.chat import chat

    context.invoke(chat)


def _require_chat(number: int) -> None:
    """Raises UnknownChat now, not behind the app."""
    from qwen2_local.chats import ChatStore

    with ChatStore.open_or_temporary() as store:
        store.require_listed(number)
