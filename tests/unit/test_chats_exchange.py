"""Chats out and in: lossless as JSON, readable as Markdown, understood elsewhere as message lists; and nothing hostile gets in."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore, exchange
from qwen2_local.errors import BadFile
from qwen2_local.types import Sampling, Usage

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
HEADINGS = st.lists(st.sampled_from(["## user", "\\## assistant", "\\\\## system", "", " ", "# x", "text", "```"]), max_size=6).map("\n".join)
NUMBER = st.floats(0, 1e9)
COUNT = st.integers(0, 2**31)


@st.composite
def records(draw: st.DrawFn) -> ChatRecord:
    """Any chat that can be: a tree of messages."""
    messages: list[ChatMessage] = []
    for number in range(1, draw(st.integers(0, 6)) + 1):
        parent = draw(st.sampled_from([None, *(one.id for one in messages)]))
        role: Any = draw(st.sampled_from(["user", "assistant"] if parent else ["user", "assistant", "system"]))
        message = ChatMessage(role, draw(TEXT), number, parent, created=draw(NUMBER))
        if role == "assistant":
            message = replace(
                message,
                state=draw(st.sampled_from(["whole", "partial"])),
                finish_reason=draw(st.sampled_from([None, "stop", "length", "context", "cancelled"])),
                tokens=tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=5))),
                tokenizer=draw(st.sampled_from(["", "0a1b"])),
                model=draw(st.sampled_from(["", "7b:q4_0"])),
                sampling=draw(st.sampled_from([None, Sampling(), Sampling(temperature=0.5, seed=3, logit_bias={7: -2.0})])),
                usage=draw(st.none() | st.builds(Usage, COUNT, COUNT, COUNT, NUMBER, NUMBER, COUNT, COUNT)),
                left_out=draw(st.integers(0, 9)),
            )
        messages.append(message)
    tip = draw(st.sampled_from([None, *(one.id for one in messages)]))
    title = " ".join(draw(TEXT).split())
    return ChatRecord(title, draw(st.booleans()), draw(st.booleans()), draw(NUMBER), draw(NUMBER), tip, tuple(messages))


def only(text: str, form: exchange.Format | None = None) -> ChatRecord:
    (record,) = exchange.read(text.encode(), "x", form)
    return record


def pairs(record: ChatRecord) -> list[tuple[str, str]]:
    return [(one.role, one.text) for one in exchange.conversation(record)]


@given(record=records())
def test_json_is_lossless(record: ChatRecord) -> None:
    line = exchange.to_json(record)
    assert "\n" not in line
    assert only(line) == record


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(record=records())
def test_and_so_is_the_store(record: ChatRecord) -> None:
    with ChatStore.temporary() as store:
        chat, _ = store.insert(record)
        assert exchange.to_json(store.record(chat)) == exchange.to_json(record)


@settings(max_examples=20)
@given(chats=st.lists(records(), min_size=2, max_size=3))
def test_many_chats_are_lines_of_one_file(chats: list[ChatRecord]) -> None:
    data = "".join(exchange.to_json(record) + "\n" for record in chats).encode()
    assert list(exchange.read(data, "x")) == chats


CONVERSATIONS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), TEXT.map(lambda text: text.replace("\r", "")) | HEADINGS), min_size=1, max_size=5
)


def line(turns: list[tuple[Any, str]]) -> ChatRecord:
    messages = tuple(ChatMessage(role, text, number, number - 1 or None) for number, (role, text) in enumerate(turns, 1))
    return ChatRecord("A title", True, False, 0.0, 0.0, len(messages), messages)


@given(turns=CONVERSATIONS)
def test_markdown_keeps_every_text(turns: list[tuple[str, str]]) -> None:
    record = only(exchange.to_markdown(line([("system", "Be terse."), *turns])), "markdown")
    assert pairs(record) == [("system", "Be terse."), *turns]
    assert record.title == "A title"


@given(turns=CONVERSATIONS)
def test_message_lists_keep_every_text(turns: list[tuple[str, str]]) -> None:
    text = exchange.to_openai(line(turns))
    assert json.loads(text) == [{"role": role, "content": content} for role, content in turns]
    assert pairs(only(text)) == turns


def test_only_the_present_conversation_goes_into_markdown() -> None:
    messages = (ChatMessage("user", "old", 1), ChatMessage("user", "new", 2), ChatMessage("assistant", "reply", 3, 2))
    record = ChatRecord("T", False, False, 0.0, 0.0, 3, messages)
    assert exchange.to_markdown(record) == "# T\n\n## user\n\nnew\n\n## assistant\n\nreply\n"


def test_markdown_by_hand() -> None:
    record = only("Notes before.\r\n\r\n# Rivers\r\n## user\r\nWhich?\r\n## assistant\r\n\r\nThe *Mekong*.\r\n\r\n- one\r\n")
    assert (record.title, pairs(record)) == ("Rivers", [("user", "Which?"), ("assistant", "The *Mekong*.\n\n- one")])


def test_message_lists_of_other_programs() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " this?"}]
    given = {"model": "x", "messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": parts, "name": "me"}]}
    assert pairs(only(json.dumps(given))) == [("system", "S"), ("user", "What is this?")]
    assert pairs(only(json.dumps(given, indent=2))) == [("system", "S"), ("user", "What is this?")]
    assert [pairs(one)[1][0] for one in exchange.read(f"{json.dumps(given)}\n{json.dumps(given)}\n".encode(), "x")] == ["user", "user"]


GOOD = json.loads(
    exchange.to_json(
        ChatRecord("T", False, False, 1.0, 2.0, 2, (ChatMessage("user", "a", 1), ChatMessage("assistant", "b", 2, 1, usage=Usage(1, 1, 1, 1.0, 1.0))))
    )
)


def changed(*path: str | int, to: object) -> str:
    """A sound export with one thing in it that is not."""
    chat: Any = json.loads(json.dumps(GOOD))
    place = chat
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return json.dumps(chat)


@pytest.mark.parametrize(
    "text",
    [
        changed("format", to="other"),
        changed("version", to=2),
        changed("version", to=None),
        changed("title", to=5),
        changed("title", to="x" * 20_000_000),
        changed("created", to=-1),
        changed("created", to="now"),
        changed("used", to=1e300),
        changed("pinned", to=1),
        changed("tip", to=2),
        changed("tip", to=-1),
        changed("tip", to=True),
        changed("messages", to={}),
        changed("messages", to=[[]]),
        changed("messages", 0, to=None),
        changed("messages", 0, "role", to="tool"),
        changed("messages", 0, "role", to=["user"]),
        changed("messages", 0, "text", to=None),
        changed("messages", 0, "text", to="\ud800"),
        changed("messages", 0, "parent", to=0),
        changed("messages", 1, "parent", to=1),
        changed("messages", 1, "parent", to=5),
        changed("messages", 1, "parent", to="0"),
        changed("messages", 1, "role", to="system"),
        changed("messages", 1, "state", to="writing"),
        changed("messages", 1, "finish_reason", to="because"),
        changed("messages", 1, "tokens", to="abc"),
        changed("messages", 1, "tokens", to=[-1]),
        changed("messages", 1, "tokens", to=[2**31]),
        changed("messages", 1, "tokens", to=[1.5]),
        changed("messages", 1, "tokens", to=[True]),
        changed("messages", 1, "left_out", to=-1),
        changed("messages", 1, "model", to="x" * 201),
        changed("messages", 1, "sampling", to=[]),
        changed("messages", 1, "sampling", to={"top_k": -1}),
        changed("messages", 1, "sampling", to={"x": 1}),
        changed("messages", 1, "sampling", to={"temperature": "hot"}),
        changed("messages", 1, "usage", to=3),
        changed("messages", 1, "usage", "prefill_s", to=-1),
        changed("messages", 1, "usage", "prompt_tokens", to=1.5),
        changed("messages", 1, "usage", "decode_s", to=float("nan")),
        changed("messages", 1, "usage", "decode_s", to=float("inf")),
        "",
        " ",
        "{",
        "[",
        "{}",
        "[]",
        "[1]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"messages": []}',
        '{"messages": [], "messages": []}',
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "user"}]',
        '[{"role": "user", "content": 5}]',
        '[{"content": "x"}]',
        '[{"role": "user", "content": [{"type": "image_url"}]}]',
        '[{"role": "assistant", "content": "", "tool_calls": [{}]}]',
        '[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]',
        '[{"role": "user", "content": "\\ud800"}]',
        "just some text",
        "# Title only",
        "##user\nx",
        '[{"role": "user", "content": "a"}], "x": [',
        "[],[]",
        '[{"role": "user", "content": "a"}], "x": [1]',
        "[" + "0," * 4_000_001 + "0]",
    ],
    ids=lambda text: text[:60] if len(text) < 1000 else f"{text[:20]}...",
)
def test_what_is_no_chat_is_refused(text: str) -> None:
    with pytest.raises(BadFile, match=r"^x\b") as caught:
        list(exchange.read(text.encode("utf-8", "surrogatepass"), "x"))
    assert len(caught.value.what) < 400
    assert caught.value.hint


def test_bytes_that_are_no_text_and_files_too_large() -> None:
    with pytest.raises(BadFile, match="UTF-8"):
        list(exchange.read(b"\xff\xfe", "x"))
    with pytest.raises(BadFile, match="bytes"):
        list(exchange.read(bytes(exchange.MOST_BYTES + 1), "x"))


@given(data=st.binary(max_size=300), form=st.sampled_from([None, "json", "openai", "markdown"]))
def test_any_bytes_are_chats_or_refused(data: bytes, form: Any) -> None:
    with suppress(BadFile):
        for record in exchange.read(data, "x", form):
            exchange.to_json(record)


@given(
    text=st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8)
)
def test_any_values_in_the_place_of_a_message_are_a_message_or_refused(text: Any) -> None:
    for given_text in (json.dumps([text]), changed("messages", 1, to=text), changed("messages", to=text), changed("messages", 1, "usage", to=text)):
        with suppress(BadFile):
            exchange.to_json(only(given_text))
