"""Copying: by this machine's own tool where there is one, and by the terminal (OSC 52). What is said is what was done.

Over SSH the tool would fill the clipboard of the other machine, so only the terminal can do it there, unless X is forwarded. Whether a terminal
takes OSC 52 cannot be known: then the words are "sent to the terminal", not "copied".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

_TOOL_S = 3.0
_MOST_BY_TERMINAL = 74_000
"""Bytes that nearly every terminal takes by OSC 52: xterm's own limit of 100,000, in base64."""


def tool(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> list[str] | None:
    """The command that puts its standard input into this person's clipboard; None: there is none."""
    far = "SSH_CONNECTION" in environment or "SSH_TTY" in environment
    wanted: list[list[str]] = []
    if platform == "darwin" and not far:
        wanted.append(["pbcopy"])
    if environment.get("WAYLAND_DISPLAY") and not far:
        wanted.append(["wl-copy"])
    if environment.get("DISPLAY"):
        wanted += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    path = environment.get("PATH")
    return next((command for command in wanted if shutil.which(command[0], path=path)), None)


def copy_by_tool(text: str, command: list[str]) -> bool:
    """Did it take the text? Waits for it, a few seconds at most: for a thread."""
    try:
        # xclip and wl-copy stay in the background to serve what they hold; pipes that they inherit would never end.
        done = subprocess.run(
            command, input=text.encode(errors="replace"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_TOOL_S, check=False,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def said(text: str, command: list[str] | None, took: bool) -> str:
    """What was done with `text`, for a notice. command: the tool that was tried; took: it worked."""
    count = f"{len(text):,} character{'s' * (len(text) != 1)}"
    if command is not None and took:
        return f"Copied {count}."
    sent = f"Sent {count} to the terminal: it copies them if it allows that (OSC 52)."
    if len(text.encode(errors="replace")) > _MOST_BY_TERMINAL:
        sent += " Many terminals refuse so much at once."
    return f"{command[0]} failed. {sent}" if command is not None else sent


def copied(text: str) -> str:
    """Copies by this machine's tool, if there is one; words on what was done. For a thread. The caller has sent `text` to the terminal as well."""
    command = tool()
    return said(text, command, command is not None and copy_by_tool(text, command))
