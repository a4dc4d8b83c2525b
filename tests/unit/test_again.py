"""What a stopped pull leaves to go on with."""

from __future__ import annotations

import json

import pytest

from qwen2_converters.again import Order, Unfinished, free, remember, tidy, unfinished
from qwen2_local.errors import UsageError
from qwen2_local.store import Store

ORDER = Order("some/tune", ("gguf:q8_0", "mlx:4bit"), discard_source=True)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def begin(store, name="tune:original", order=ORDER):
    """A pull that is stopped after 5,000 bytes."""
    with pytest.raises(KeyboardInterrupt), store.resume(name) as draft:
        remember(draft.folder.parent, order, "tune", ["tune:q8_0", "tune:mlx-4bit"], 9000)
        (draft.folder / "x.part").write_bytes(b"x" * 5000)
        raise KeyboardInterrupt


def test_it_says_what_was_asked_for_and_what_is_kept(store):
    begin(store)
    (found,) = unfinished(store)
    assert found == Unfinished(ORDER, "tune", "tune:original", ("tune:q8_0", "tune:mlx-4bit"), 9000, found.kept)
    assert found.kept >= 5000


def test_what_is_converted_already_counts_and_is_freed_too(store):
    begin(store)
    (before,) = unfinished(store)
    made = store.folder / ".qwen2-partial-tune@q8_0"
    made.mkdir()
    (made / "tune.gguf").write_bytes(b"x" * 70_000)
    (found,) = unfinished(store)
    assert found.kept >= before.kept + 70_000
    free(store, found)
    assert unfinished(store) == [] and not made.exists() and store.kept("tune:original") == 0


def test_what_somebody_works_on_is_not_freed(store):
    begin(store)
    (found,) = unfinished(store)
    with store.resume("tune:original"), pytest.raises(UsageError, match="in use by process"):
        free(store, found)


def test_what_is_finished_leaves_nothing(store):
    begin(store)
    with store.resume("tune:original"):
        pass
    assert unfinished(store) == []


def test_what_a_pull_left_that_was_killed_at_its_end_is_deleted(store):
    begin(store)
    made = store.folder / ".qwen2-partial-tune@q8_0"
    made.mkdir()
    tidy(store, "tune:original", ["tune:q8_0", "tune:mlx-4bit"])
    assert store.drafts() == ()


def test_what_another_pull_of_the_same_original_needs_stays(store):
    begin(store)
    (store.folder / ".qwen2-partial-tune@q8_0").mkdir()
    tidy(store, "tune:original", ["tune:q8_0"])
    assert store.drafts() == ("tune:original",)


def test_what_was_being_deleted_is_deleted(store):
    begin(store)
    store.unfinished("tune:original").with_name("pull.json").unlink()
    tidy(store, "tune:original", ["tune:q8_0"])
    assert store.drafts() == ()


def test_what_somebody_works_on_is_left_to_them(store):
    begin(store)
    with store.resume("tune:original"):
        tidy(store, "tune:original", ["tune:q8_0", "tune:mlx-4bit"])
        assert store.drafts() == ("tune:original",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: b"",
        lambda kept: b"[]",
        lambda kept: b"\xff\xfe{",
        lambda kept: b"[" * 100_000,
        lambda kept: {**kept, "total": None},
        lambda kept: {**kept, "models": ["../../etc"]},
        lambda kept: {**kept, "title": 7},
        lambda kept: {**kept, "order": {**kept["order"], "name": "--yes"}},
        lambda kept: {**kept, "order": {**kept["order"], "more": 1}},
        lambda kept: {**kept, "order": {**kept["order"], "targets": None}},
    ],
)
def test_what_is_damaged_is_left_out(store, damage):
    begin(store)
    path = store.unfinished("tune:original").with_name("pull.json")
    made = damage(json.loads(path.read_text()))
    path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    begin(store, "other:q8_0", Order("other"))
    assert [one.order.name for one in unfinished(store)] == ["other"]


def test_what_a_conversion_has_begun_is_no_pull(store):
    (store.folder / ".qwen2-partial-mine@q8_0").mkdir()
    (store.folder / ".qwen2-partial-..").mkdir()
    assert store.drafts() == ("mine:q8_0",)
    assert unfinished(store) == []
