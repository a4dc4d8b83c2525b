"""The table of keys: everything comes from it, so it has to be right."""

from __future__ import annotations

import pytest
from textual.keys import Keys
from textual.widgets import TextArea

from qwen2_tui import keys
from qwen2_tui.keys import TABLE, clashes, keymap, shown

# What tmux and screen, or a terminal without its own protocol, keep from a program.
SWALLOWED = {"ctrl+b", "ctrl+a", "ctrl+s", "shift+enter", "alt+enter", "ctrl+enter", "ctrl+shift+c"}
NAMED = {key.value for key in Keys} | {"slash", "question_mark", "space", "alt+enter", "shift+enter", "pageup", "pagedown", "delete"}


def test_ids_are_unique():
    assert len({key.id for key in TABLE}) == len(TABLE)


@pytest.mark.parametrize("key", TABLE, ids=lambda key: key.id)
def test_every_row_says_what_it_does_with_keys_that_exist(key: keys.Key):
    assert key.words and key.where in keys.PLACES
    for one in key.keys.split(","):
        assert one in NAMED or len(one) == 1, one


def test_no_key_means_two_things_in_one_place():
    assert list(clashes({key.id: key.keys for key in TABLE})) == []


def test_nothing_depends_on_a_key_that_terminals_swallow():
    # In settings one may also save by leaving: ctrl+s is a convenience.
    assert [key.id for key in TABLE if set(key.keys.split(",")) <= SWALLOWED and key.id != "settings.save"] == []


def test_keys_are_shown_as_people_write_them():
    assert shown("ctrl+j,alt+enter") == "ctrl+j, alt+enter"
    assert shown("slash,escape,pageup") == "/, esc, page up"


def test_a_binding_has_the_id_by_which_settings_change_it():
    binding = keys.bind("app.quit", "quit", priority=True)
    assert (binding.key, binding.id, binding.action, binding.show, binding.priority) == ("ctrl+q", "app.quit", "quit", False, True)


def test_settings_change_keys():
    assert keymap({"app.help": "f12", "app.new": "alt+n,f9"}) == ({"app.help": "f12", "app.new": "alt+n,f9"}, ())


def test_what_cannot_be_is_said_and_left_out():
    taken, notes = keymap({"app.dance": "f12", "app.help": " "})
    assert taken == {}
    assert "app.dance" in notes[0] and "app.help" in notes[1]


def test_a_clash_is_said():
    taken, notes = keymap({"app.help": "ctrl+n"})
    assert taken == {"app.help": "ctrl+n"}
    assert len(notes) == 1 and "ctrl+n" in notes[0] and "help" in notes[0] and "new" in notes[0]


def test_one_key_may_mean_different_things_in_different_places():
    assert keymap({"turn.edit": "d"})[1] == ()  # deletes in the list of chats


def test_global_keys_leave_the_editing_keys_that_people_need_in_a_message():
    editing = {"left", "right", "up", "down", "home", "end", "backspace", "delete", "ctrl+left", "ctrl+right", "ctrl+u", "ctrl+k", "ctrl+w", "ctrl+v"}
    bound = {one for key in TABLE if key.where == "everywhere" for one in key.keys.split(",")}
    assert bound & editing == set()
    assert editing & {one for binding in TextArea.BINDINGS for one in binding.key.split(",")}  # they are real keys of it
