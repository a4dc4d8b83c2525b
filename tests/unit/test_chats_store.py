"""The chats on disk: kept, ordered, found by their words, and gone once deleted."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore, deletion, path_to
from qwen2_local.chats.attached import Attached, joined
from qwen2_local.chats.records import load_sampling, title_of
from qwen2_local.errors import BackendError, InvalidPrompt, UnknownChat, UsageError
from qwen2_local.kvcache import Disk
from qwen2_local.types import Sampling, Usage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


@pytest.fixture
def store(path: Path) -> Iterator[ChatStore]:
    with ChatStore.open(path) as store:
        yield store


def talk(store: ChatStore, *texts: str) -> int:
    """A chat of questions and replies, in turns."""
    chat, parent = store.create(), None
    for number, text in enumerate(texts):
        parent = store.add(chat, ChatMessage("assistant" if number % 2 else "user", text, parent=parent))
    return chat


def delete(store: ChatStore, *chats: int) -> list[str]:
    """Deletes chats; the KV chunks that are to be forgotten with them."""
    names: list[str] = []
    store.delete(chats, forget=names.extend)
    return names


def texts(record: ChatRecord) -> list[str]:
    return [message.text for message in path_to({message.id: message for message in record.messages}, record.tip)]


def test_every_field_of_a_message_comes_back(store: ChatStore, path: Path) -> None:
    chat = store.create()
    asked = store.add(chat, ChatMessage("user", "a\0b 汉字\r\n", created=5.0))
    reply = ChatMessage(
        role="assistant",
        text="é",
        parent=asked,
        state="partial",
        created=7.5,
        tokens=(0, 151_000, 2**31 - 1),
        tokenizer="ab12",
        model="7b:q4_0",
        sampling=Sampling(temperature=0.7, seed=2**64 - 1, logit_bias={5: -1.5}),
        finish_reason="cancelled",
        usage=Usage(100, 90, 3, 0.25, 0.5, 8, 6),
        left_out=4,
    )
    number = store.add(chat, reply)
    with ChatStore.open(path) as other:
        record = other.record(chat)
    assert record.messages == (ChatMessage("user", "a\0b 汉字\r\n", asked, created=5.0), replace(reply, id=number))
    assert record.tip == number


def test_messages_with_one_parent_are_alternatives(store: ChatStore) -> None:
    chat = talk(store, "rivers", "Mekong")
    store.add(chat, ChatMessage("user", "lakes"))
    assert texts(store.record(chat)) == ["lakes"]
    assert len(store.record(chat).messages) == 3
    store.end_with(chat, store.record(chat).messages[1].id)
    assert texts(store.record(chat)) == ["rivers", "Mekong"]


def test_a_reply_may_grow(store: ChatStore) -> None:
    chat = talk(store, "question")
    number = store.add(chat, ChatMessage("assistant", "Once", state="partial", parent=store.record(chat).tip), index=False)
    grown = ChatMessage("assistant", "Once upon", number, tokens=(1, 2))
    store.update(chat, grown)
    last = store.record(chat).messages[-1]
    assert (last.text, last.state, last.tokens) == ("Once upon", "whole", (1, 2))
    assert [hit.message for hit in store.search("upon")] == [number]


def test_pinned_chats_come_first_then_the_last_used(store: ChatStore) -> None:
    first, second, third = (talk(store, text) for text in ("one", "two", "three"))
    store.add(second, ChatMessage("user", "again", parent=store.record(second).tip))
    store.pin(first)
    assert [one.id for one in store.summaries()] == [first, second, third]
    assert [one.id for one in store.summaries(limit=1, offset=1)] == [second]
    store.pin(first, False)
    assert [one.id for one in store.summaries()][-1] == first
    assert [(one.messages, one.pinned) for one in store.summaries()] == [(2, False), (1, False), (1, False)]


def test_the_title_is_the_first_question_until_one_is_given(store: ChatStore) -> None:
    chat = talk(store, "\n  Which rivers\tcross Laos?\nGive lengths.", "The Mekong.", "And dams?")
    assert (store.summary(chat).title, store.summary(chat).named) == ("Which rivers cross Laos?", False)
    store.rename(chat, " Rivers \n of Laos ")
    store.add(chat, ChatMessage("user", "more", parent=store.record(chat).tip))
    assert (store.summary(chat).title, store.summary(chat).named) == ("Rivers of Laos", True)
    store.rename(chat, "")
    assert (store.summary(chat).title, store.summary(chat).named) == ("Which rivers cross Laos?", False)


@pytest.mark.parametrize(
    ("question", "title"),
    [("", ""), (" \n ", ""), ("a" * 60, "a" * 60), ("a" * 61, "a" * 59 + "…"), ("word " * 20, "word " * 11 + "word…"), ("\x1b[31mred", "[31mred")],
)
def test_titles_are_short_and_harmless(question: str, title: str) -> None:
    assert title_of(question) == title


def test_chats_that_are_not_there(store: ChatStore) -> None:
    gone = talk(store, "x")
    delete(store, gone)
    assert talk(store, "y") != gone, "no number is given twice"
    calls = (
        store.record,
        store.summary,
        store.pin,
        lambda chat: store.rename(chat, "a"),
        lambda chat: delete(store, chat),
        store.draft,
        store.options,
    )
    calls += (lambda chat: store.trash([chat]), lambda chat: store.keep_draft(chat, "a"), lambda chat: store.keep_options(chat, {}))
    for call in (*calls, lambda chat: store.add(chat, ChatMessage("user", "a")), lambda chat: store.keep_chunks(chat, ["a"])):
        for number in (gone, -1, 2**64, 10**6):
            with pytest.raises(UnknownChat, match=str(number)):
                call(number)
    assert len(store.summaries()) == 1


def test_what_a_ctrl_c_left_half_done_is_undone(store: ChatStore) -> None:
    store._connection.execute("BEGIN IMMEDIATE")
    store._connection.execute("INSERT INTO chats(title, named, pinned, created, used) VALUES ('half', 0, 0, 0, 0)")
    chat = talk(store, "x")
    assert [one.id for one in store.summaries()] == [chat]


def test_a_closed_store_says_so(store: ChatStore) -> None:
    store.close()
    store.close()
    with pytest.raises(UsageError, match="closed"):
        store.create()


# Search


CHINESE = "天空为什么是蓝色的？因为空气分子散射阳光。"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("天空", True),
        ("蓝色", True),
        ("空", True),
        ("散射阳光", True),
        ("天空 阳光", True),
        ("色蓝", False),
        ("天色", False),
        ("quantization", True),
        ("QUANT", True),
        ("cafe", True),
        ("CAFÉ", True),
        ("uantization", False),
        ("Q4_K_M", True),
        ("quantization 蓝色", True),
        ("quantization weather", False),
        ("ไทย", True),
        ("にほん", True),
        ("русский", True),
        ("Русс", True),
        ('"quoted" AND', False),
        ("NEAR(", False),
        ("café*", True),
        ("x OR quantization", False),
        ("text:cafe", False),
        ("", False),
        ("***", False),
        ("\0", False),
        ('""', False),
    ],
)
def test_what_is_found(store: ChatStore, query: str, found: bool) -> None:
    talk(store, CHINESE, "Quantization to Q4_K_M in a café; ภาษาไทย, にほんご, русский язык")
    chat = talk(store, f"{CHINESE} Quantization to Q4_K_M in a café; ภาษาไทย, にほんご, русский язык")
    assert [hit.chat.id for hit in store.search(query)][:1] == ([chat] if found else [])


def test_a_chat_is_found_once_with_its_newest_message(store: ChatStore) -> None:
    old, new = talk(store, "zebra one", "zebra two", "horse"), talk(store, "horse", "a zebra, at last, behind " + "many words " * 30)
    hits = store.search("zebra")
    assert [hit.chat.id for hit in hits] == [new, old]
    assert hits[1].excerpt == "zebra two"
    assert hits[0].excerpt.startswith("a zebra, at last")
    assert hits[0].excerpt.endswith("…")
    assert [hit.chat.id for hit in store.search("zebra", limit=1)] == [new]


def test_titles_that_were_given_are_found(store: ChatStore) -> None:
    chat = talk(store, "something else")
    store.rename(chat, "Rivers of Laos 老挝的河流")
    for query in ("rivers laos", "河流"):
        assert [(hit.chat.id, hit.message, hit.excerpt) for hit in store.search(query)] == [(chat, None, "Rivers of Laos 老挝的河流")]


def test_a_reply_that_broke_off_is_found(store: ChatStore, path: Path) -> None:
    chat = talk(store, "question")
    store.add(chat, ChatMessage("assistant", "a giraffe and", state="partial", parent=store.record(chat).tip), index=False)
    with ChatStore.open(path) as other:
        assert [hit.chat.id for hit in other.search("giraffe")] == [chat]


def test_a_query_that_is_no_text(store: ChatStore) -> None:
    with pytest.raises(InvalidPrompt):
        store.search("a\udc80")


def test_nothing_but_a_deletion_looks_at_all_messages(store: ChatStore) -> None:
    """What a turn costs does not depend on how many there are."""
    chat = talk(store, "one", "two", "three")
    asked: list[str] = []
    store._connection.set_trace_callback(asked.append)
    number = store.add(chat, ChatMessage("assistant", "four", parent=store.record(chat).tip), index=False)
    store.update(chat, ChatMessage("assistant", "four five", number))
    store.keep_chunks(chat, ["a"])
    store.end_with(chat, 1)
    store.rename(chat, "Title")
    store.search("three")
    store.broke_off([chat])
    store.summaries()
    store.keep_draft(chat, "five")
    store.keep_options(chat, {"lookup": True})
    store.last_broken()
    store.questions()
    store.trash([chat])
    store.restore(store.trashed())
    store._connection.set_trace_callback(None)
    plans = []
    for statement in asked:
        if statement.startswith(("SELECT", "UPDATE", "INSERT", "DELETE")) and "fts5" not in statement and "'words'" not in statement:
            plans += [row[3] for row in store._connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
    assert any("SEARCH messages" in plan for plan in plans)
    bounded = ("messages_not_indexed", "INDEX questions")
    assert [plan for plan in plans if ("SCAN messages" in plan and not any(name in plan for name in bounded)) or "SCAN chunks" in plan] == []


# Deletion


def everything_on_disk(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


def index_terms(path: Path) -> set[str]:
    with sqlite3.connect(path) as db:
        db.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab('main', 'words', 'row')")
        terms = {term for (term,) in db.execute("SELECT term FROM temp.terms")}
    db.close()
    return terms


def test_what_is_deleted_is_nowhere_on_the_disk(store: ChatStore, path: Path) -> None:
    stays = talk(store, "ordinary words stay", "普通")
    secrets = ("xylophonequartz", "wildebeestorbit", "秘密口令")
    chats = [talk(store, f"{secret} number {number}", f"of {secret}", "long " * 3000 + secret) for number, secret in enumerate(secrets * 5)]
    for chat in chats:
        store.rename(chat, f"titled {secrets[0]}")
    before = everything_on_disk(path.parent)
    assert all(secret.encode() in before for secret in secrets), "the test can see what is there"
    delete(store, *chats)
    after = everything_on_disk(path.parent)
    for secret in secrets:
        # The index cuts words where the one before begins alike.
        for part in (secret, secret[1:], secret[2:], secret[-6:]):
            assert part.encode() not in after
        assert "秘".encode() not in after
    assert index_terms(path) == {"ordinary", "words", "stay", "普", "通"}
    assert [hit.chat.id for hit in store.search("普通")] == [stays]
    assert [one.id for one in store.summaries()] == [stays]


def test_also_text_that_a_growing_reply_replaced(store: ChatStore, path: Path) -> None:
    chat = talk(store, "question")
    number = store.add(chat, ChatMessage("assistant", "hippogriffin", state="partial", parent=store.record(chat).tip))
    store.update(chat, ChatMessage("assistant", "something else", number))
    delete(store, chat)
    assert b"ippogriff" not in everything_on_disk(path.parent)


def test_deleting_names_the_kv_chunks_that_no_other_chat_has(store: ChatStore) -> None:
    one, two, three = (talk(store, "x") for _ in range(3))
    store.keep_chunks(one, ["common", "a", "a"])
    store.keep_chunks(two, ["common", "b"])
    store.keep_chunks(three, ["common", "a", "c"])
    assert set(delete(store, two)) == {"b"}
    assert set(delete(store, one, three)) == {"common", "a", "c"}


def test_deleting_is_all_or_nothing(store: ChatStore) -> None:
    chat = talk(store, "x")
    with pytest.raises(UnknownChat):
        delete(store, chat, 999)
    assert [one.id for one in store.summaries()] == [chat]
    assert store.search("x")
    assert delete(store) == []


def test_chats_stay_where_their_kv_does(store: ChatStore) -> None:
    chat = talk(store, "x")
    store.keep_chunks(chat, ["a"])

    def fail(names: object) -> None:
        raise BackendError("The worker died.")

    with pytest.raises(BackendError):
        store.delete([chat], forget=fail)
    assert [hit.chat.id for hit in store.search("x")] == [chat]
    assert delete(store, chat) == ["a"]


def test_a_chain_of_any_length_can_be_deleted(store: ChatStore) -> None:
    # SQLite follows references a thousand deep at most.
    messages = tuple(ChatMessage("user", f"number {number}", number, number - 1 or None) for number in range(1, 1501))
    chat, _ = store.insert(ChatRecord("long", False, False, 0.0, 0.0, 1500, messages))
    delete(store, chat)
    assert store.search("number") == []


def test_drafts_options_and_the_trash_are_deleted_too(store: ChatStore, path: Path) -> None:
    stays = talk(store, "ordinary words stay")
    store.keep_draft(stays, "an ordinary draft")
    chat = talk(store, "xylophonequartz")
    for number in range(50):  # a draft is kept as it is typed
        store.keep_draft(chat, "marimbaharbour " * number)
    store.keep_options(chat, {"system": "glockenspielvalley"})
    store.keep_draft(None, "theremincanyon")
    store.trash([chat])
    secrets = [b"xylophone", b"marimba", b"glockenspiel", b"theremin"]
    before = everything_on_disk(path.parent)
    assert all(secret in before for secret in secrets), "the test can see what is there"
    store.keep_draft(None, "")
    deletion.purge(store, disk=Disk(path.parent / "kv"), chats=[chat])
    after = everything_on_disk(path.parent)
    assert [secret for secret in secrets if secret in after] == []
    assert store.draft(stays) == "an ordinary draft"
    assert index_terms(path) == {"ordinary", "words", "stay"}


def test_a_draft_that_was_taken_back_is_gone_once_the_file_is_closed(path: Path) -> None:
    with ChatStore.open(path) as store:
        chat = talk(store, "x")
        for place in (chat, None):
            store.keep_draft(place, "xylophonequartz")
            store.keep_draft(place, "")
    assert b"xylophone" not in everything_on_disk(path.parent)


def test_a_temporary_store_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    plain = os.open
    monkeypatch.setattr(os, "open", lambda name, *more, **keywords: (opened.append(str(name)), plain(name, *more, **keywords))[1])
    with ChatStore.temporary() as store:
        chat = talk(store, "a secret " * 10_000, "a reply")
        assert store.search("secret")
        assert not store.kept
        delete(store, chat)
    assert opened == []
    assert list(tmp_path.iterdir()) == []


# Drafts, options, the trash


def test_a_draft_is_kept_with_its_chat(store: ChatStore, path: Path) -> None:
    chat, used = talk(store, "x"), store.summaries()[0].used
    assert (store.draft(chat), store.draft(None)) == ("", "")
    store.keep_draft(chat, "half a quest")
    store.keep_draft(None, "of a new chat\n")
    store.keep_draft(chat, "half a question \0 汉")
    with ChatStore.open(path) as other:
        assert (other.draft(chat), other.draft(None)) == ("half a question \0 汉", "of a new chat\n")
    assert store.summary(chat).used == used, "typing is no use"
    store.keep_draft(None, "")
    assert store.draft(None) == ""
    with pytest.raises(InvalidPrompt):
        store.keep_draft(chat, "\udc80")


def test_options_are_kept_with_their_chat(store: ChatStore) -> None:
    chat = talk(store, "x")
    assert store.options(chat) == {}
    store.keep_options(chat, {"model": "7b", "chat": {"temperature": 0.5, "seed": None}})
    assert store.options(chat) == {"model": "7b", "chat": {"temperature": 0.5, "seed": None}}
    with pytest.raises(UsageError, match="more than"):
        store.keep_options(chat, {"system": "x" * 100_000})
    for other in ("", "{", "[1]"):
        store._connection.execute("UPDATE chats SET options = ?", (other,))
        assert store.options(chat) == {}


def test_what_is_in_the_trash_is_in_no_list_and_may_come_back(store: ChatStore) -> None:
    stays, first, second = talk(store, "zebra one"), talk(store, "zebra two"), talk(store, "zebra three")
    store.rename(first, "A zebra's title")
    store.trash([second, first])
    assert [one.id for one in store.summaries()] == [stays]
    assert [hit.chat.id for hit in store.search("zebra")] == [stays]
    assert store.questions() == ["zebra one"]
    assert store.last_broken() == stays
    assert store.trashed() == [first, second]
    assert texts(store.record(first)) == ["zebra two"], "who has it open goes on"
    with pytest.raises(UnknownChat):
        store.require_listed(first)
    store.require_listed(stays)
    store.restore([first])
    assert {one.id for one in store.summaries()} == {stays, first}
    assert [hit.chat.id for hit in store.search("zebra")] == [first, stays]
    with pytest.raises(UnknownChat):
        store.trash([stays, 999])
    assert store.trashed() == [second], "all or none"


def test_who_asks_in_a_chat_that_was_deleted_elsewhere_takes_it_out_of_the_trash(store: ChatStore) -> None:
    chat = talk(store, "a", "b")
    store.trash([chat])
    question = store.add(chat, ChatMessage("user", "c", parent=store.record(chat).tip))
    assert store.trashed() == []
    store.trash([chat])
    store.add(chat, ChatMessage("assistant", "d", parent=question))
    assert store.trashed() == [chat], "a reply that was under way does not"


def test_the_trash_is_emptied_after_a_while_or_by_name(store: ChatStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, fresh, named, stays = (talk(store, text) for text in ("old", "fresh", "named", "stays"))
    monkeypatch.setattr("time.time", lambda: 1000.0)
    store.trash([old])
    monkeypatch.setattr("time.time", lambda: 2000.0)
    store.trash([fresh, named])
    forgotten: list[str] = []
    store.keep_chunks(old, ["a"])
    store.keep_chunks(named, ["b"])
    store.keep_chunks(stays, ["c"])
    for chat in (old, named):
        store.add(chat, ChatMessage("assistant", "a reply", parent=store.record(chat).tip))
    deletion.purge(store, disk=Disk(path.parent / "kv"), forget=forgotten.extend, chats=[named, stays])
    assert store.trashed() == [fresh]
    assert set(forgotten) == {"a", "b"}
    assert [one.id for one in store.summaries()] == [stays], "only the trash is emptied"
    for gone in (old, named):
        with pytest.raises(UnknownChat):
            store.restore([gone])


def test_earlier_questions_come_newest_first_and_once(store: ChatStore) -> None:
    talk(store, "one", "a reply", "two")
    talk(store, "one", "a reply", joined("three", [Attached("a.txt", "x" * 100)]))
    assert store.questions() == ["three", "one", "two"]
    assert store.questions(limit=2) == ["three", "one"]
    assert store.questions(limit=0) == []


@pytest.mark.parametrize(
    ("reply", "broken"),
    [
        (None, True),
        (ChatMessage("assistant", "half", state="partial"), True),
        (ChatMessage("assistant", "half", state="partial", finish_reason="cancelled"), False),
        (ChatMessage("assistant", "whole", finish_reason="stop"), False),
    ],
)
def test_the_last_chat_may_have_broken_off(store: ChatStore, reply: ChatMessage | None, broken: bool) -> None:
    assert store.last_broken() is None
    talk(store, "an older one, without a reply")
    chat = talk(store, "x")
    if reply is not None:
        store.add(chat, replace(reply, parent=store.record(chat).tip))
    assert store.last_broken() == (chat if broken else None)
    store.create()
    assert store.last_broken() is None, "a chat without messages has nothing to go on with"


# Files


def test_the_file_is_for_its_owner_only(store: ChatStore, path: Path) -> None:
    talk(store, "x")
    assert {file.name for file in path.parent.iterdir()} >= {"chats.db", "chats.db-wal"}
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_two_that_have_it_open_see_each_other(store: ChatStore, path: Path) -> None:
    with ChatStore.open(path) as other:
        chat = talk(store, "x")
        other.rename(chat, "y")
        assert store.summary(chat).title == "y"
        assert [hit.chat.id for hit in other.search("x")] == [chat]


def test_samplings_of_other_versions_are_none() -> None:
    assert load_sampling('{"top_k": 5}') == Sampling(top_k=5)
    assert [load_sampling(text) for text in (None, "", "[]", '{"new": 1}', '{"top_k": -1}', '{"logit_bias": {"x": 1}}')] == [None] * 6
