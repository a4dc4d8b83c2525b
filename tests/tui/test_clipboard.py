"""Copying: which tool is taken, and that no more is said than was done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen2_tui import clipboard


@pytest.fixture
def tools(tmp_path: Path):
    """A folder for PATH in which tools can be put; each writes what it gets into the file `got`."""

    def put(*names: str, code: int = 0) -> str:
        for name in names:
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/got\nexit {code}\n")
            path.chmod(0o755)
        return str(tmp_path)

    return put


def test_the_tool_is_that_of_the_desktop(tools):
    path = tools("pbcopy", "wl-copy", "xclip", "xsel")
    assert clipboard.tool({"PATH": path}, "darwin") == ["pbcopy"]
    assert clipboard.tool({"PATH": path, "WAYLAND_DISPLAY": "wayland-0", "DISPLAY": ":0"}, "linux") == ["wl-copy"]
    assert clipboard.tool({"PATH": path, "DISPLAY": ":0"}, "linux") == ["xclip", "-selection", "clipboard"]
    assert clipboard.tool({"PATH": path}, "linux") is None


def test_a_tool_that_is_not_there_is_not_taken(tools):
    assert clipboard.tool({"PATH": tools("xsel"), "WAYLAND_DISPLAY": "w", "DISPLAY": ":0"}, "linux") == ["xsel", "--clipboard", "--input"]


def test_over_ssh_the_clipboard_is_not_this_machines(tools):
    path = tools("pbcopy", "wl-copy", "xclip")
    assert clipboard.tool({"PATH": path, "SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}, "darwin") is None
    assert clipboard.tool({"PATH": path, "SSH_TTY": "/dev/pts/1", "WAYLAND_DISPLAY": "w"}, "linux") is None
    assert clipboard.tool({"PATH": path, "SSH_TTY": "/dev/pts/1", "DISPLAY": "localhost:10.0"}, "linux") == ["xclip", "-selection", "clipboard"]


def test_the_tool_gets_the_text(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", tools("xclip"))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert clipboard.copied("größer\n") == "Copied 7 characters."
    assert (tmp_path / "got").read_text(encoding="utf-8") == "größer\n"


def test_without_a_tool_only_the_terminal_can_have_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clipboard.copied("x") == "Sent 1 character to the terminal: it copies them if it allows that (OSC 52)."


def test_a_tool_that_fails_is_said(tools, monkeypatch):
    command = [f"{tools('xsel', code=1)}/xsel"]
    assert not clipboard.copy_by_tool("x", command)
    assert clipboard.said("abc", ["xsel"], False).startswith("xsel failed. Sent 3 characters to the terminal")
    assert not clipboard.copy_by_tool("x", ["/nowhere/at/all"])


def test_a_tool_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "slow").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "slow").chmod(0o755)
    monkeypatch.setattr(clipboard, "_TOOL_S", 0.1)
    assert not clipboard.copy_by_tool("x", [str(tmp_path / "slow")])


def test_what_many_terminals_refuse_is_said():
    assert "Many terminals refuse" in clipboard.said("x" * 80_000, None, False)
    assert "Many terminals refuse" not in clipboard.said("x" * 80_000, ["pbcopy"], True)
