"""The full-screen terminal app. It stands on the public API, drives the model in a process of its own, and is called by the command line.

  app        QwenApp: makes the parts, tells the screens what changed, ends in order; everywhere: the global keys and what they open
  host       Host: the loaded model; model: what the app needs of one
  events     what changed in the app, told to all open screens
  keys       the table of keys: bindings, footer, help and keymap come from it
  theme      light and dark; commands: the palette
  opening    what the app begins with; ending: what becomes of it where nobody chose to leave; logfile: where it writes what went wrong
  conversation  a chat as the screen knows it; session: with its reply on the way; turns: messages as shown; summary: to begin another with
  live       a reply on its way, read by a thread; pace: how often it is shown
  library    what is done with saved chats
  inventory  the models that there are, and what this machine has for them; plan: what a fetch would do
  jobs       fetches and verifications, each a child process; job: one, as it is shown; child: a process
  contest    two models on one prompt: who they are; comparing: asks them
  settings   what a person chose, in a TOML file
  scoring    tokens for people: their texts, how likely they were, what else could have come
  attach     @path; clipboard: the local one and the terminal's
  markdown/  text to blocks to lines
  screens/   one idea each: chat, models, compare, settings, help, prompt, tokens
  widgets/   what they are made of

Data goes upward in messages, orders downward in method calls. The UI thread never waits: what may take more than 10 ms is in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def run(
    model: str | None = None,
    *,
    chat: int | None = None,
    continue_last: bool = False,
    temporary: bool = False,
    loads: Mapping[str, Any] | None = None,
) -> int:
    """Open the app in this terminal; its exit code.

    model: to open with, by name or path; None for the usual one. chat: a saved one to go on with; continue_last: the last one; temporary: a
    chat that leaves nothing on the disk. loads: how to load the model, as fields of `model.LoadWish`.
    """
    from qwen2_tui.app import QwenApp
    from qwen2_tui.opening import Opening

    return QwenApp(opening=Opening(model, chat, continue_last, temporary, dict(loads or {}))).hold()
