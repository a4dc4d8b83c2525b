"""Files that a message mentions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen2_local.chats.attached import Attached
from qwen2_tui import attach
from qwen2_tui.attach import Completion, Mention, complete, mentions, read, unfinished


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("one two\nthree\n", encoding="utf-8")
    (tmp_path / "with spaces.md").write_text("four", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/deep.py").write_text("five six", encoding="utf-8")
    return tmp_path


def test_a_mention_begins_behind_a_space_and_quotes_hold_spaces():
    assert mentions('see @a.txt (@b/c.md) and @"d e.txt"; mail me@x.org, @a.txt') == [Mention("a.txt"), Mention("b/c.md)"), Mention("d e.txt", True)]


def test_files_are_read_with_their_tokens(folder):
    reading = read('Compare @notes.txt and @"with spaces.md".', words, folder=folder)
    assert reading.files == (Attached("notes.txt", "one two\nthree", 3), Attached("with spaces.md", "four", 1))
    assert reading.problems == ()


def test_marks_at_the_end_of_a_sentence_are_no_part_of_a_path(folder):
    assert [file.name for file in read("In (@notes.txt), or @sub/deep.py?", words, folder=folder).files] == ["notes.txt", "sub/deep.py"]


def test_home_is_the_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("@~/notes.txt", words, folder=Path("/")).files[0].text == "one two\nthree"


def test_what_does_not_look_like_a_path_is_text(folder):
    assert read("@someone said: use @property, @dataclass(frozen=True)", words, folder=folder) == attach.Reading()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing.txt", "There is no file missing.txt."),
        ("sub", "sub is a folder: name a file in it."),
        ("data.bin", "data.bin is no text but binary."),
        ("latin.txt", "latin.txt is no text: neither UTF-8 nor UTF-16."),
        ("big.txt", f"big.txt is too big: {attach.MOST_BYTES + 1:,} bytes, of at most {attach.MOST_BYTES:,}."),
        ("pipe", "pipe is no ordinary file."),
    ],
)
def test_what_cannot_be_attached_is_said(folder, name, problem):
    (folder / "data.bin").write_bytes(b"\x7fELF\0\0")
    (folder / "latin.txt").write_bytes("schön".encode("latin-1"))
    (folder / "big.txt").write_bytes(b"x" * (attach.MOST_BYTES + 1))
    os.mkfifo(folder / "pipe")
    assert read(f"@{name}", words, folder=folder) == attach.Reading((), (problem,))


def test_an_unreadable_file_is_said(folder):
    reading = read("@" + "x" * 5000 + ".txt", words, folder=folder)
    assert reading.files == () and len(reading.problems) == 1


def test_utf16_with_its_mark_is_text(folder):
    (folder / "wide.txt").write_bytes("größer".encode("utf-16"))
    assert read("@wide.txt", words, folder=folder).files == (Attached("wide.txt", "größer", 1),)


def test_what_was_attached_before_is_not_read_again(folder):
    before = Attached("notes.txt", "as it was", 3)
    assert read("Look at @notes.txt.", words, folder=folder, kept={"notes.txt": before}).files == (before,)


def test_the_mention_before_the_cursor():
    assert unfinished("look at @sub/de") == "@sub/de"
    assert unfinished('look at @"with sp') == '@"with sp'
    assert unfinished("look at @") == "@"
    assert unfinished("a@b") is None
    assert unfinished("@done and") is None


def test_a_path_is_completed_as_far_as_it_is_certain(folder):
    assert complete("@no", folder=folder) == Completion("@notes.txt ")
    assert complete("@sub", folder=folder) == Completion("@sub/")
    assert complete("@sub/", folder=folder) == Completion("@sub/deep.py ")
    assert complete("@wi", folder=folder) == Completion('@"with spaces.md" ')
    assert complete("@x", folder=folder) is None
    (folder / "notes2.txt").touch()
    assert complete("@n", folder=folder) == Completion("@notes", ("notes.txt", "notes2.txt"))
    assert complete("@notes", folder=folder) == Completion("@notes", ("notes.txt", "notes2.txt"))


def test_hidden_names_and_such_as_a_terminal_would_obey_are_not_typed(folder):
    (folder / ".secret").touch()
    (folder / "evil\x1b[2J").touch()
    assert complete("@ev", folder=folder) is None
    assert complete("@.s", folder=folder) == Completion("@.secret ")
    assert ".secret" not in complete("@", folder=folder).choices
