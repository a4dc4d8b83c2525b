"""Settings as a person chose them, and the file they lie in: written and read they are the same, and what a person wrote there survives."""

from __future__ import annotations

import json
import os
import re
import stat
import string
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qwen2_local.options import settle
from qwen2_local.types import Sampling
from qwen2_tui import settings_edit
from qwen2_tui.fields import CHAT, LOOK, MODEL, Field
from qwen2_tui.settings import ChatSettings, ModelSettings, Settings, SettingsFile, differing, with_options
from qwen2_tui.settings_read import understood

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LINE = st.text(st.sampled_from(string.ascii_letters + " .\"'#[]=\\é河🦆"), min_size=1, max_size=20).map(str.strip).filter(bool)


def values(one: Field) -> SearchStrategy[Any]:
    """What the field may be."""
    match one.kind:
        case "text":
            some: SearchStrategy[Any] = TEXT
        case "line":
            some = LINE
        case "flag":
            return st.booleans()
        case "choice":
            some = st.sampled_from(one.choices)
        case "number":
            some = st.floats(one.low, one.high, exclude_min=one.above)
        case "whole":
            some = st.integers(int(one.low), int(one.high))
    return st.none() | some if one.unset else some


def of(kind: Any, known: tuple[Field, ...]) -> SearchStrategy[Any]:
    return st.builds(kind, **{one.name: values(one) for one in known})


CHATS = of(ChatSettings, CHAT)
ALL: SearchStrategy[Settings] = st.builds(
    Settings,
    chat=CHATS,
    model=of(ModelSettings, MODEL),
    presets=st.dictionaries(LINE, CHATS, max_size=3),
    keys=st.dictionaries(st.sampled_from(["write.send", "app.quit", "turn.copy"]), st.sampled_from(["ctrl+s", "f9,f10", "é"])),
    **{one.name: values(one) for one in LOOK},
)
PERSONS = """\
# my settings
theme = "light"   # easier on my eyes

favourite = "tea"
[chat]
temperature = 0.3 # not too wild
# top_p = 0.5
  system = '''
You are a duck.
# not a comment
'''

[chat.extra]
deep = [1, 2, # two
  3]

[model] # the big one
model = "7b"

# for letters
[presets.letters]
temperature = 1
# warm

# my keys
[keys]
"write.send" = "ctrl+s"   # enter is for lines
"""
COMMENTS = [one for one in re.findall("#.*", PERSONS) if one != "# not a comment"]


def test_every_setting_is_explained() -> None:
    assert [one.name for one in CHAT] == [one.name for one in fields(ChatSettings)]
    assert [one.name for one in MODEL] == [one.name for one in fields(ModelSettings)]
    assert all(one.words.endswith(".") and not one.problem(one.example) for one in (*CHAT, *MODEL, *LOOK))


def test_without_a_file_settings_are_those_at_the_beginning(tmp_path: Path) -> None:
    assert SettingsFile(tmp_path / "settings.toml").read() == (Settings(), ())
    assert not (tmp_path / "settings.toml").exists()


@settings(max_examples=30, deadline=None)
@given(ALL, ALL)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, first: Settings, second: Settings) -> None:
    path = tmp_path_factory.mktemp("home") / "settings.toml"
    file = SettingsFile(path)
    for one in (first, second):
        file.write(one)
        assert SettingsFile(path).read() == (one, ())
    assert not list(path.parent.glob("*.bad*"))


@settings(max_examples=30, deadline=None)
@given(ALL)
def test_a_persons_comments_and_own_keys_survive(tmp_path_factory: pytest.TempPathFactory, wanted: Settings) -> None:
    path = tmp_path_factory.mktemp("home") / "settings.toml"
    path.write_text(PERSONS)
    file = SettingsFile(path)
    file.read()
    file.write(wanted)
    text = path.read_text()
    read, notes = SettingsFile(path).read()
    assert read == wanted
    assert all("favourite" in note or "extra" in note for note in notes)
    assert tomllib.loads(text)["favourite"] == "tea"
    assert tomllib.loads(text)["chat"]["extra"] == {"deep": [1, 2, 3]}
    assert [one for one in COMMENTS if one not in text] == []
    assert not list(path.parent.glob("*.bad*"))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
def test_garbage_gives_notes_and_no_error(data: bytes) -> None:
    read, notes = understood(data, "settings.toml")
    assert read == Settings() or notes == () or tomllib.loads(data.decode("utf-8-sig"))
    assert all(note.startswith("settings.toml") and note.isprintable() for note in notes)


@pytest.mark.parametrize("keys", ["\x1b[31m", " ", ",,", "a\nb"])
def test_a_key_is_a_name_that_can_be_shown(keys: str) -> None:
    read, notes = understood(f'[keys]\n"write.send" = {json.dumps(keys)}'.encode(), "settings.toml")
    assert (read.keys, len(notes)) == ({}, 1)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda some: st.lists(some, max_size=2) | st.dictionaries(LINE, some, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["chat", "model", "presets", "keys", "theme", "sidebar", "other"]),
        ANY | st.dictionaries(st.sampled_from(["temperature", "system", "lookup", "model", "kv_bits", "a", "", "\x1b[31m"]), ANY, max_size=4),
    )
)
def test_values_of_any_kind_give_notes_and_no_error(tree: Mapping[str, Any]) -> None:
    text = "\n".join(f"{toml(name)} = {toml(value)}" for name, value in tree.items())
    read, notes = understood(text.encode(), "settings.toml")
    assert all(note.isprintable() for note in notes)
    assert wrong_values(read) == []
    # And whatever stands there, it can be changed, or is kept aside.
    changed = replace(read, theme="light" if read.theme == "dark" else "dark", chat=replace(read.chat, top_k=7))
    edited = settings_edit.edited(text.encode(), read, changed)
    assert edited is None or understood(edited.encode(), "settings.toml")[0] == changed


def wrong_values(read: Settings) -> list[str]:
    """What was taken, and is not what a setting may be."""
    return [
        one.name
        for part, known in ((read.chat, CHAT), (read.model, MODEL), (read, LOOK))
        for one in known
        if (value := getattr(part, one.name)) is not None and one.problem(value)
    ]


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(one):08x}" for one in value) + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml(name)} = {toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "nan" if value is None else repr(value)


def written(path: Path, text: str) -> SettingsFile:
    path.write_text(text)
    return SettingsFile(path)


def test_a_note_names_the_line_what_is_wrong_and_what_is_taken_instead(tmp_path: Path) -> None:
    text = """# mine
theme = "dark"
[chat]
system = '''
[chat]
temperature = 1
'''
temperature = 1000
tmperature = 1
[model]
kv_bits = 4
backend = "cuda"
"""
    read, notes = written(tmp_path / "settings.toml", text).read()
    assert read == Settings(chat=ChatSettings(system="[chat]\ntemperature = 1\n"))
    assert notes == (
        "settings.toml, line 8: temperature is 1000, but has to be a number from 0 to 100. The model's own is taken.",
        "settings.toml, line 9: There is no setting 'tmperature' in [chat]. Did you mean temperature?",
        "settings.toml, line 11: kv_bits is 4, but has to be 16 or 8. 16 is taken.",
        "settings.toml, line 12: backend is 'cuda', but has to be mlx or llama.cpp. What suits this machine is taken.",
    )


def test_a_file_that_is_no_toml_says_where_and_is_kept_when_settings_are_written(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    file = written(path, 'theme = "dark"\n[chat\n')
    read, (note,) = file.read()
    assert read == Settings()
    assert "settings.toml is no TOML" in note and "line 2" in note
    file.write(replace(read, theme="light"))
    assert SettingsFile(path).read() == (Settings(theme="light"), ())
    assert path.with_name("settings.toml.bad").read_text() == 'theme = "dark"\n[chat\n'
    # Nor is that one ever overwritten.
    written(path, "[").write(replace(read, theme="light"))
    assert path.with_name("settings.toml.bad").read_text().startswith("theme")
    assert path.with_name("settings.toml.bad-2").read_text() == "["


@pytest.mark.parametrize("text", ["chat = {temperature = 0.5, top_k = 3}  # mine\n", "chat.temperature = 0.5\nchat.top_k = 3  # mine\n"])
def test_tables_written_in_other_ways_are_changed_as_well(tmp_path: Path, text: str) -> None:
    file = written(tmp_path / "settings.toml", text)
    read, _ = file.read()
    file.write(replace(read, chat=replace(read.chat, temperature=None, top_k=9, seed=1)))
    assert SettingsFile(file.path).read() == (Settings(chat=ChatSettings(top_k=9, seed=1)), ())
    assert "# mine" in file.path.read_text()
    assert not list(tmp_path.glob("*.bad"))


def test_what_a_person_changes_in_the_file_meanwhile_stays(tmp_path: Path) -> None:
    file = written(tmp_path / "settings.toml", "[chat]\ntemperature = 0.5\n")
    read, _ = file.read()
    file.path.write_text("[chat]\ntemperature = 0.9  # better\n")
    file.write(replace(read, theme="light"))
    assert SettingsFile(file.path).read()[0] == Settings(theme="light", chat=ChatSettings(temperature=0.9))


def test_a_value_that_is_unset_leaves_the_comment_beside_it(tmp_path: Path) -> None:
    file = written(tmp_path / "settings.toml", "[chat]\ntemperature = 0.5  # not too wild\ntop_k = 5\n")
    read, _ = file.read()
    file.write(replace(read, chat=ChatSettings()))
    assert file.path.read_text() == "[chat]\n# temperature = 0.5  # not too wild\n# top_k = 20\n"


def test_a_wrong_value_stays_until_it_is_changed(tmp_path: Path) -> None:
    file = written(tmp_path / "settings.toml", '[chat]\ntemperature = "hot"\n')
    read, _ = file.read()
    file.write(replace(read, chat=ChatSettings(top_k=5)))
    assert '"hot"' in file.path.read_text()
    file.write(replace(read, chat=ChatSettings(top_k=5, temperature=1.5)))
    assert SettingsFile(file.path).read() == (Settings(chat=ChatSettings(top_k=5, temperature=1.5)), ())


def test_a_new_file_explains_itself_and_is_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "new" / "settings.toml"
    SettingsFile(path).write(Settings(chat=ChatSettings(temperature=0.2, system="Be\nbrief.")))
    text = path.read_text()
    assert all(f"# {one.words}" in text for one in (*CHAT, *MODEL, *LOOK))
    assert "\ntemperature = 0.2\n" in text and "\n# top_p = 0.8\n" in text
    assert 'system = """Be\nbrief."""' in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # What is unset again is as if it had never been set.
    file = SettingsFile(path)
    file.read()
    file.write(Settings())
    assert path.read_text() == settings_edit.template()


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles"
    kept.mkdir()
    (kept / "mine.toml").write_text('theme = "light"\n')
    (tmp_path / "settings.toml").symlink_to(kept / "mine.toml")
    SettingsFile(tmp_path / "settings.toml").write(Settings(theme="nord"))
    assert (tmp_path / "settings.toml").is_symlink()
    assert (kept / "mine.toml").read_text() == 'theme = "nord"\n'


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"x" * 1_000_001), lambda path: path.symlink_to("nowhere")]
)
def test_what_is_no_file_of_settings_is_no_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "settings.toml")
    read, notes = SettingsFile(tmp_path / "settings.toml").read()
    assert read == Settings()
    assert all(note.startswith("settings.toml ") for note in notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_an_unreadable_file_is_a_note_and_an_unwritable_one_an_error(tmp_path: Path) -> None:
    file = written(tmp_path / "settings.toml", "")
    file.path.chmod(0)
    assert "cannot be read" in file.read()[1][0]
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        file.write(Settings(theme="light"))


@settings(max_examples=40, deadline=None)
@given(CHATS, CHATS)
def test_a_chat_keeps_what_it_has_otherwise_than_every_new_one(mine: ChatSettings, base: ChatSettings) -> None:
    assert with_options(base, differing(mine, base)) == mine
    assert with_options(base, {"temperature": "hot", "top_k": -1, "model": "7b", "lookup": None}) == base


@settings(max_examples=40, deadline=None)
@given(CHATS)
def test_all_that_can_be_chosen_can_be_asked_for(chat: ChatSettings) -> None:
    settle(Sampling(), **chat.wishes())


def test_zero_is_a_choice() -> None:
    assert ChatSettings(temperature=0.0, top_k=0, seed=0, system="x").wishes() == {"temperature": 0.0, "top_k": 0, "seed": 0}


@pytest.mark.parametrize(
    ("name", "typed", "value", "problem"),
    [
        ("temperature", "0,7", 0.7, ""),
        ("temperature", " 1 ", 1.0, ""),
        ("temperature", "", None, ""),
        ("temperature", "hot", None, "It has to be a number from 0 to 100."),
        ("temperature", "nan", None, "It has to be a number from 0 to 100."),
        ("top_p", "0", None, "It has to be a number above 0 to 1."),
        ("max_tokens", "10,000", 10_000, ""),
        ("max_tokens", "1.5", None, "It has to be a whole number from 1 to 10,000,000."),
        ("lookup", "yes", True, ""),
        ("lookup", "", None, "It has to be true or false."),
        ("kv_bits", "8", 8, ""),
        ("kv_bits", "4", None, "It has to be 16 or 8."),
        ("model", "a\x1b[31m", None, "It has to be a line of text."),
    ],
)
def test_what_is_typed_is_checked(name: str, typed: str, value: object, problem: str) -> None:
    field = next(one for one in (*CHAT, *MODEL) if one.name == name)
    assert field.parse(typed) == (value, problem)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((*CHAT, *MODEL, *LOOK)).flatmap(lambda one: st.tuples(st.just(one), values(one))))
def test_what_is_shown_can_be_typed(given: tuple[Field, Any]) -> None:
    field, value = given
    if not (isinstance(value, str) and not value.strip()):
        assert field.parse(field.show(value)) == (value, "")
