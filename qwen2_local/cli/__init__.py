"""The command line. `main` is the one exception boundary: it turns every error into one message and a documented exit code.

Commands live in modules of their own, imported when called, so that `--help` and `--version` stay fast.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import Any

import click

from qwen2_local import __version__
from qwen2_local.errors import Qwen2LocalError

_COMMANDS = {
    # name: (module in this folder, help in one line)
    "run": ("run", "Answer one prompt, or a file of them."),
    "app": ("app", "Open the app: chats, models and settings, full screen."),
    "chat": ("chat", "Talk with a model, line by line."),
    "chats": ("chats", "List, search, export, import and delete saved chats."),
    "pull": ("pull", "Fetch a model and install it."),
    "ls": ("models", "List the models on this computer."),
    "show": ("models", "Show what is known of a model."),
    "rm": ("models", "Delete an installed model."),
    "bench": ("bench", "Measure a model's speed on this machine."),
    "score": ("score", "Say how likely a model finds a text."),
    "selftest": ("selftest", "Compare a model on every backend and precision, and write a report."),
    "cache": ("cache", "List or delete what models keep of texts they have read."),
    "convert": ("convert", "Convert a Hugging Face folder to GGUF or MLX."),
    "verify": ("verify", "Check a model's files, and its error against the source."),
    "inspect": ("inspect", "Show what any model file or folder holds."),
    "doctor": ("doctor", "Check this machine, and say how to be faster."),
    "completion": ("completion", "Print shell completion for bash, zsh or fish."),
}
EXIT_CODES = """\b
Exit codes: 0 fine · 1 internal error · 2 wrong usage or unknown model
3 bad or damaged file · 4 backend missing or failed
5 does not fit (memory, disk, context) · 6 could not be fetched (network, server)
7 reply not as its schema asks (cut short, say)
130 stopped by Ctrl-C · 141 the reader of the output went away"""


class _ReaderGone(Exception):
    """Nobody reads the output. click would end with exit code 1 on the BrokenPipeError that this stands for."""


class _Commands(click.Group):
    """Knows the commands' names and one-line helps without importing them."""

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except BrokenPipeError:
            raise _ReaderGone from None

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGone from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            if " " in cmd_name:
                ctx.fail(f'That is a prompt, not a command: `qwen2-local run guide "{cmd_name}"`.')
            return None
        module = importlib.import_module(f"qwen2_local.cli.{_COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=_Commands, invoke_without_command=True, context_settings=_SETTINGS, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="qwen2-local")
@click.pass_context
def qwen2_local(context: click.Context) -> None:
    """Run Qwen2 language models on this computer, offline and private.

    Without a command: the app on a terminal; otherwise the built-in guide answers what comes on stdin.
    """
    if context.invoked_subcommand is None:
        from qwen2_local.cli.app import on_terminal, open_or_chat

        if on_terminal():
            open_or_chat(context)
        else:
            from qwen2_local.cli.run import run

            context.invoke(run)


def main() -> None:
    """The console scripts' entry point. Never returns."""
    _prepare_streams()
    try:
        qwen2_local.main(standalone_mode=False, prog_name="qwen2-local")
        sys.stdout.flush()
        code = 0
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        _tell(shown.getvalue().rstrip())
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except Qwen2LocalError as error:
        _tell(f"error: {error}")
        code = error.exit_code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except (_ReaderGone, BrokenPipeError):
        code = 141
    except OSError as error:
        code = _system_error(error)
    except Exception as error:
        if os.environ.get("QWEN2_LOCAL_DEBUG"):
            raise
        _tell(f"error: {type(error).__name__}: {error}\n  This is a bug. QWEN2_LOCAL_DEBUG=1 shows where; please report it with what `doctor` says.")
        code = 1
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _prepare_streams() -> None:
    """Closed output goes nowhere, and text that its encoding cannot take becomes "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _system_error(error: OSError) -> int:
    """A file that cannot be read or written. The exit code."""
    if os.environ.get("QWEN2_LOCAL_DEBUG"):
        raise error
    _tell(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}.\n  Check its folder, permissions and disk.")
    return 5 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2


def _tell(text: str) -> None:
    from qwen2_local.cli import output

    output.note(text)
