"""Streams end, whatever came between their reader and the last event."""

from __future__ import annotations

import pytest

from qwen2_local.engine import Finished, Reply, Token
from qwen2_local.engine.events import Event
from qwen2_local.engine.reply import Mailbox
from qwen2_local.stream import Stream


def stream(*events: Event) -> Stream:
    mailbox: Mailbox[Event] = Mailbox()
    for event in events[:-1]:
        mailbox.put(event)
    mailbox.end(events[-1])
    return Stream(Reply(mailbox, lambda _: None, lambda: None), lambda token: bytes([token]), 1)


def test_pieces_and_the_whole() -> None:
    reply = stream(Token(65), Token(66), Finished("length", 0.1, 0.2))
    assert [piece.text for piece in reply] == ["A", "B"]
    assert reply.completion is not None
    assert (reply.completion.text, reply.completion.finish_reason) == ("AB", "length")


def test_an_interrupt_at_the_last_event_leaves_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = stream(Token(65), Finished("stop", 0.1, 0.2))
    assert next(reply).text == "A"

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(reply, "_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    reply.close()
    assert reply.completion is not None
    assert reply.completion.text == "A"
