"""A title for a chat, proposed by the model. Nothing of it is kept, neither text nor KV."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen2_local.catalog import lookup
from qwen2_local.chats import ChatMessage
from qwen2_local.chats.attached import split
from qwen2_local.sanitize import clean, clean_line
from qwen2_local.types import Message

if TYPE_CHECKING:
    from qwen2_local.aio import Readable
    from qwen2_tui.model import Model

_LONGEST = 60
_READ = 800
_TOKENS = 32
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA = re.compile("[\u3040-\u30ff]")
_PAIRS = ('""', "''", "“”", "„“", "‘’", "‚‘", "«»", "»«", "‹›", "「」", "『』", "《》", "()", "[]", "<>")
_MARKS = re.compile(r"^[\s*_`#]+|[\s*_`]+$|\s#+$")
_STOPS = ".。!！:：;；,，"


def can_propose(model: Model) -> bool:
    """Not the built-in guide, which knows this program only, and no base model, which follows no request."""
    known = lookup(model.name)
    return model.name.partition(":")[0] != "guide" and (known is None or known[0].instruct)


class Proposal:
    """A title for the conversation `messages`, wanted from `model`."""

    def __init__(self, model: Model, messages: Sequence[ChatMessage]) -> None:
        self._model = model
        self._asked = asked_for(messages)
        self._lock = threading.Lock()
        self._cancelled = False
        self._stream: Readable | None = None

    def read(self) -> str:
        """The title; "" where there is nothing to name, or no title came. Takes as long as a short reply. Raises what a reply may raise."""
        with self._lock:
            if self._cancelled or not self._asked:
                return ""
            self._stream = self._model.respond([Message("user", self._asked)], temperature=0, max_tokens=_TOKENS, persist=False)
        text = "".join(piece.text for piece in self._stream)
        return "" if self._cancelled else cleaned(text)

    def cancel(self) -> None:
        """It is not wanted any more. From any thread."""
        with self._lock:
            self._cancelled = True
            if self._stream is not None:
                self._stream.cancel()


def asked_for(messages: Sequence[ChatMessage]) -> str:
    """What the model is asked: the beginning of the conversation, and for a title in its language. "" where nothing was said yet."""
    question = next((split(one.text)[0] for one in messages if one.role == "user"), "").strip()
    if not question:
        return ""
    reply = next((one.text for one in messages if one.role == "assistant"), "").strip()
    said = f"{question[:_READ]}\n\n{reply[:_READ]}".strip()
    letters = sum(map(str.isalpha, question))
    if letters and len(_CHINESE.findall(question)) > letters // 3 and not _KANA.search(question):
        return f"{said}\n\n---\n为上面的对话起一个标题：不超过十二个字，不加引号，只写标题。"
    return f"{said}\n\n---\nName the conversation above in its own language: at most five words, no quotation marks. Write the title only."


def cleaned(text: str) -> str:
    """What a model wrote, as a title: its first line without marks around it, cut between words. "" where nothing is left."""
    lines = (line for line in clean(text).split("\n") if any(map(str.isalnum, line)))
    line = clean_line(next(lines, ""))
    line = re.sub(r"^[\W_]*(title|titel|titre|título|titolo|标题|題目|标题是|タイトル)[\W_]*[:：]", "", line, flags=re.IGNORECASE)
    line = " ".join(_bare(line).split())
    if len(line) <= _LONGEST:
        return line
    head = line[:_LONGEST].rpartition(" ")[0]
    return (head if len(head) > _LONGEST // 2 else line[: _LONGEST - 1]) + "…"


def _bare(line: str) -> str:
    """Without Markdown, full stops, and quotation marks around all of it."""
    while True:
        bare = _MARKS.sub("", line).rstrip(_STOPS)
        if len(bare) > 1 and bare[0] + bare[-1] in _PAIRS:
            bare = bare[1:-1]
        if bare == line:
            return line
        line = bare
