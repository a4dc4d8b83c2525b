"""A conversation with a model: turns that can be edited, answered anew, branched and kept.

chat = model.chat(system="You are terse.")
for piece in chat.stream("Name three rivers."):
    print(piece.text, end="", flush=True)
chat.edit(-2, "Name three lakes.")      # the rivers stay, as another branch

What a model wrote goes back to it as the ids that it wrote, never tokenized again, so a turn computes only what is new.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol, Self, Unpack, get_args

from qwen2_local import chatml, kvcache, paths
from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore, deletion, path_to
from qwen2_local.chats.records import title_of
from qwen2_local.errors import InvalidPrompt, Qwen2LocalError, UsageError
from qwen2_local.options import Options, settle
from qwen2_local.tokens import require_text
from qwen2_local.turns import Overflow, Reader, Turns, ids_of, left_out
from qwen2_local.types import Completion, Piece, Role, Sampling

if TYPE_CHECKING:
    from qwen2_local.aio import AsyncStream, Readable

__all__ = ["Chat", "ChatModel", "Overflow", "Reply"]

_SAVE_EVERY_S = 1.0


class ChatModel(Reader, Protocol):
    """What a chat needs of a model; `Qwen2` says what each is."""

    name: str

    @property
    def sampling(self) -> Sampling: ...  # noqa: D102
    def write(self, prompt: Sequence[int], **options: Unpack[Options]) -> Readable: ...  # noqa: D102
    def forget(self, chunks: Iterable[str]) -> None: ...  # noqa: D102


class Reply:
    """A reply of a chat as it comes: iterate for `Piece`s; afterwards `completion` holds the whole. Closing it early stops it.

    It is kept in its chat now and then while it comes, and at its end; what was stopped or broke off is marked as partial.
    """

    def __init__(self, chat: Chat, stream: Readable, message: ChatMessage) -> None:
        """message: the reply as far as it is there already, where it is to go on."""
        self._chat = chat
        self._stream = stream
        self._message = replace(message, state="partial", finish_reason=None, usage=None)
        self._before = (message.text, message.tokens)
        self._pieces: list[Piece] = []
        self._saved = time.monotonic()
        self._lock = threading.Lock()
        self._over = False
        self.completion: Completion | None = None

    @property
    def over(self) -> bool:
        """Has it ended?"""
        return self._over

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if self._over:
            raise StopIteration
        try:
            piece = next(self._stream)
        except StopIteration:
            self._end()
            raise
        except BaseException as error:
            with suppress(Qwen2LocalError):
                self._stream.close()
            self._end(broken=isinstance(error, Exception))
            raise
        self._pieces.append(piece)
        if time.monotonic() - self._saved >= _SAVE_EVERY_S:
            with self._lock:
                if not self._over:
                    self._message = self._chat._keep(self._so_far(), final=False)
            self._saved = time.monotonic()
        return piece

    def cancel(self) -> None:
        """Stop the work, without waiting; whoever reads gets to the end soon. From any thread."""
        self._stream.cancel()

    def close(self) -> None:
        """Stop the reply; what came so far is in `completion`, and in the chat. Idempotent; from any thread."""
        if not self._over:
            self._stream.close()
            self._end()

    def finish(self) -> Completion:
        """Read the rest and give the whole reply."""
        for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    def __del__(self) -> None:
        # Who forgets it half-way does not want the rest.
        if not getattr(self, "_over", True):
            with suppress(Exception):
                try:
                    self.close()
                except UsageError:
                    # The garbage collector came on a thread of the engine's, which waits neither for itself nor for a store.
                    threading.Thread(target=self.close, name="qwen2-local forgotten reply", daemon=True).start()

    def _so_far(self) -> ChatMessage:
        text, tokens = "".join(piece.text for piece in self._pieces), tuple(piece.token for piece in self._pieces)
        return self._grown(text, tokens)

    def _grown(self, text: str, tokens: tuple[int, ...]) -> ChatMessage:
        whole = self._before[0] + text
        return replace(self._message, text=whole, tokens=ids_of(self._chat.model.tokenizer, (*self._before[1], *tokens), whole))

    def _end(self, *, broken: bool = False) -> None:
        """broken: it ended with an error, not because somebody stopped it."""
        with self._lock:
            if self._over:
                return
            try:
                self._keep(broken)
            finally:
                self._over = True

    def _keep(self, broken: bool) -> None:
        self.completion = done = self._stream.completion
        if done is None:
            message, chunks = self._so_far(), tuple[str, ...]()
        else:
            message, chunks = replace(self._grown(done.text, done.tokens), usage=done.usage), done.chunks
            if not broken:
                message = replace(message, finish_reason=done.finish_reason, state="partial" if done.finish_reason == "cancelled" else "whole")
        # A reply that was stopped before its first letter is none.
        if message.text or message.state == "whole" or message.id:
            self._chat._keep(message, chunks, final=True)
        else:
            self._chat._keep_chunks(chunks)


class Chat:
    """A conversation. Not saved unless asked for: `save`, or a chat of a store. One reply at a time; use it from one thread, or with care.

    messages count from 0, the system message included if there is one; negative numbers from the end.
    """

    def __init__(self, model: ChatModel, *, system: str | None = None, store: ChatStore | None = None, overflow: Overflow = "error") -> None:
        """A new conversation, of `model`; `Qwen2.chat` makes them.

        system: the system message, by default the model's own. store: where to keep it from the first turn on; None keeps it in memory only,
        and its KV off the disk.
        """
        if overflow not in get_args(Overflow):
            raise UsageError(f"overflow is {overflow!r}.", hint=f"It may be {', '.join(get_args(Overflow))}.")
        self._model = model
        self.overflow: Overflow = overflow
        self.unsaved = ""
        """Why a chat that is to be saved is not, on a full disk say; "" where all is well. The next turn tries again."""
        self._store = store
        self._number: int | None = None
        self._messages: dict[int, ChatMessage] = {}
        self._tip: int | None = None
        self._local = 0
        # What the store does not know yet: messages by their ids (True: to be indexed as well), and where the conversation ends.
        self._behind: dict[int, bool] = {}
        self._moved = False
        self._chunks: list[str] = []
        self._turns = Turns(model)
        self._current: Callable[[], Reply | None] = lambda: None
        # Held while messages and tip change together: a reply is kept by the thread that reads it, and others look meanwhile.
        self._changing = threading.RLock()
        # Held while the store is told: one thread may go to another branch while the next reply begins in another.
        self._telling = threading.RLock()
        if system is not None:
            require_text(system, "The system message")
            # It is saved with the first question: who only looks leaves no empty chats.
            self._put(ChatMessage("system", system, created=time.time()))

    @classmethod
    def load(cls, model: ChatModel, number: int, store: ChatStore | None = None, *, overflow: Overflow = "error") -> Self:
        """A saved conversation, to go on with: `number` as `qwen2-local chats` shows it. Raises UnknownChat."""
        store = store or _own_store()
        record = store.record(number)
        chat = cls(model, store=store, overflow=overflow)
        chat._number, chat._tip = number, record.tip
        chat._messages = {message.id: message for message in record.messages}
        return chat

    # What is there

    def with_model(self, model: ChatModel) -> Self:
        """The same conversation, to go on with by another model. What could not be saved yet goes along; this one is not to be used any more."""
        self._require_idle()
        other = type(self)(model, store=self._store, overflow=self.overflow)
        with self._telling, self._changing:
            other._number, other._messages, other._tip, other._local = self._number, self._messages, self._tip, self._local
            other._behind, other._moved, other._chunks, other.unsaved = self._behind, self._moved, self._chunks, self.unsaved
        return other

    @property
    def model(self) -> ChatModel:
        """The model that replies."""
        return self._model

    @property
    def number(self) -> int | None:
        """The number under which it is saved, or None."""
        return self._number

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The conversation as it is now, without the alternatives beside it."""
        with self._changing:
            return tuple(path_to(self._messages, self._tip))

    @property
    def left_out(self) -> int:
        """How many messages the model did not see when it wrote its last reply, by the policy `overflow`."""
        return left_out(self.messages)

    @property
    def title(self) -> str:
        """Its title: given by `rename`, or from the first question."""
        if self._number is not None and self._store is not None:
            return self._store.summary(self._number).title
        with self._changing:
            return next((title_of(one.text) for one in self._messages.values() if one.role == "user"), "")

    def branches(self, turn: int) -> tuple[ChatMessage, ...]:
        """The message `turn` and its alternatives, oldest first: other wordings of a question, other replies to the same."""
        with self._changing:
            parent = self._at(turn).parent
            return tuple(one for one in self._messages.values() if one.parent == parent)

    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each message, which of how many alternatives it is, counted from 1."""
        with self._changing:
            siblings: dict[int | None, dict[int, int]] = {}
            for one in self._messages.values():
                among = siblings.setdefault(one.parent, {})
                among[one.id] = len(among) + 1
            return tuple((siblings[one.parent][one.id], len(siblings[one.parent])) for one in self.messages)

    # In tokens, of `model`. What is not fit to be read yet is tokenized on the first call, which takes a while for a long conversation.

    def count(self, text: str = "") -> int:
        """How many tokens the model would read if `text` were sent now, the opening of its reply included; "" for the conversation as it is.

        Exact, and by the policy `overflow`; more than the context holds is no error here. Raises InvalidPrompt for lone surrogates.
        """
        before, opening = list(self.messages), len(chatml.open_reply(self.model.tokenizer))
        if text:
            if before and before[-1].role == "user":  # it makes way, as in `stream`
                before.pop()
            before.append(ChatMessage("user", text))
        return sum(map(len, self._turns.seen(before, self.overflow, opening)[0])) + opening

    def room(self) -> int:
        """How many tokens the context still holds: for the next question and its reply together. Below 0 where it is too full already."""
        return self.model.longest - self.count()

    def prompt(self, turn: int = -1) -> tuple[int, ...]:
        """The ids that the model read before it wrote the reply `turn`; for any other message, those of a reply that would be written to it."""
        *before, message = self._up_to(turn)
        opening = chatml.open_reply(self.model.tokenizer)
        if message.role == "assistant":
            turns = self._turns.saw(message, before, self.overflow)
        else:
            turns, _ = self._turns.seen([*before, message], self.overflow, len(opening))
        return (*chain.from_iterable(turns), *opening)

    def ids(self, turn: int = -1) -> tuple[int, ...]:
        """All ids up to the end of message `turn`, its closing mark and newline included. Those of a reply begin with `prompt(turn)`."""
        message, before, tokenizer = self._at(turn), self.prompt(turn), self.model.tokenizer
        if message.role != "assistant":
            return before[: -len(chatml.open_reply(tokenizer))]
        return (*before, *self._turns.reply(message), *chatml.close_reply(tokenizer))

    # To write. options: see `options.Options`; those of `stream` and its like take `progress` and `schema`, too.

    def send(self, text: str, **options: Unpack[Options]) -> Completion:
        """The reply to `text`. Raises ContextOverflow, with the counts, before anything is kept; see `overflow`."""
        return self.stream(text, **options).finish()

    def stream(self, text: str, **options: Unpack[Options]) -> Reply:
        """The same, piece by piece. The question is kept before the model begins; one that got no reply makes way for it, as a branch."""
        last = self._messages.get(self._tip) if self._tip is not None else None
        parent = last.parent if last is not None and last.role == "user" else self._tip
        return self._answer(_question(text, parent), **options)

    def edit(self, turn: int, text: str, **options: Unpack[Options]) -> Completion:
        """The reply to another wording of the question `turn`; what came of the old one stays, as a branch."""
        return self.stream_edit(turn, text, **options).finish()

    def stream_edit(self, turn: int, text: str, **options: Unpack[Options]) -> Reply:
        """The same, piece by piece."""
        old = self._at(turn)
        if old.role != "user":
            hint = "Edit a question; `regenerate` gives another reply, `continue_reply(text)` one that begins as you say."
            raise UsageError(f"Message {turn} is no question but a {_NAMES[old.role]}.", hint=hint)
        return self._answer(_question(text, old.parent), **options)

    def regenerate(self, turn: int = -1, **options: Unpack[Options]) -> Completion:
        """Another reply to the last question, or in place of the reply `turn`; the old one stays, as a branch. With the same seed, it is the same."""
        return self.stream_regenerate(turn, **options).finish()

    def stream_regenerate(self, turn: int = -1, **options: Unpack[Options]) -> Reply:
        """The same, piece by piece."""
        return self._answer(ChatMessage("assistant", "", parent=self._asked(turn)), **options)

    def continue_reply(self, text: str | None = None, turn: int = -1, **options: Unpack[Options]) -> Completion:
        """The last reply, or the reply `turn`, goes on from where it ended, or, as a branch, one that begins with `text`. Gives what was added.

        A reply that others follow stays as it is: the longer one is a branch, too.
        """
        return self.stream_continue(text, turn, **options).finish()

    def stream_continue(self, text: str | None = None, turn: int = -1, **options: Unpack[Options]) -> Reply:
        """The same, piece by piece."""
        if text is not None:
            require_text(text)
            begun = ChatMessage("assistant", text, parent=self._asked(turn))
        else:
            begun = self._at(turn)
            if begun.role != "assistant":
                raise UsageError("There is no reply to continue: the last message is a question.", hint="`regenerate` answers it.")
            if any(one.parent == begun.id for one in self._messages.values()):
                begun = replace(begun, id=0, created=0.0)
        return self._answer(begun, **options)

    # Async twins: a cancelled task stops the reply.

    async def asend(self, text: str, **options: Unpack[Options]) -> Completion:
        """`send`, awaited."""
        return await self.astream(text, **options).finish()

    def astream(self, text: str, **options: Unpack[Options]) -> AsyncStream:
        """`stream`, for `async for`. The question is kept when the first piece is awaited."""
        return _later(lambda: self.stream(text, **options))

    async def aedit(self, turn: int, text: str, **options: Unpack[Options]) -> Completion:
        """`edit`, awaited."""
        return await _later(lambda: self.stream_edit(turn, text, **options)).finish()

    async def aregenerate(self, turn: int = -1, **options: Unpack[Options]) -> Completion:
        """`regenerate`, awaited."""
        return await _later(lambda: self.stream_regenerate(turn, **options)).finish()

    async def acontinue_reply(self, text: str | None = None, turn: int = -1, **options: Unpack[Options]) -> Completion:
        """`continue_reply`, awaited."""
        return await _later(lambda: self.stream_continue(text, turn, **options)).finish()

    # To arrange

    def branch(self, turn: int) -> None:
        """The conversation now ends with message `turn`; what came after it stays, as a branch. The next `send` goes on from here."""
        self._end_with(self._at(turn).id)

    def switch(self, turn: int, number: int, *, keep: bool = True) -> None:
        """To the alternative `number` of `branches(turn)`, and to the latest that came of it.

        keep: False leaves the writing to the next turn, or to `save`: then this takes no time.
        """
        choices = self.branches(turn)
        if not 0 <= number < len(choices):
            raise UsageError(f"Message {turn} has no alternative {number}.", hint=f"It has {len(choices)}, counted from 0.")
        tip = choices[number].id
        latest = {message.parent: message.id for message in self._messages.values()}
        while tip in latest:
            tip = latest[tip]
        if keep:
            self._end_with(tip)
        else:
            self._require_idle()
            self._tip, self._moved = tip, True

    def save(self, title: str = "", *, store: ChatStore | None = None) -> int:
        """Keep the conversation, from now on after every turn, too; its number. title: by default from the first question."""
        self._require_idle()
        if self._store is None or (store is not None and store is not self._store):
            self._store, self._number, self.unsaved = store or _own_store(), None, ""
        with self._telling:
            self._catch_up()
            self.unsaved = ""
        assert self._number is not None
        self._keep_chunks(())
        if title:
            self._store.rename(self._number, title)
        return self._number

    def rename(self, title: str) -> None:
        """Gives a saved chat another title; with "", that from its first question."""
        if self._number is None or self._store is None:
            raise UsageError("The chat is not saved, so it has no title.", hint="`save(title)` keeps it under one.")
        self._store.rename(self._number, title)

    def delete(self) -> None:
        """Deletes it for good, with what is kept of its KV; it is then empty, and not saved."""
        self._require_idle()
        if self._number is not None and self._store is not None:
            deletion.delete(self._store, [self._number], disk=kvcache.Disk(paths.kv()), forget=self.model.forget)
        if self._chunks:
            self.model.forget(self._chunks)
        self._store, self._number, self._tip, self.unsaved = None, None, None, ""
        self._messages, self._turns, self._chunks, self._behind, self._moved = {}, Turns(self.model), [], {}, False

    # Inside

    def _at(self, turn: int) -> ChatMessage:
        return self._up_to(turn)[-1]

    def _up_to(self, turn: int) -> tuple[ChatMessage, ...]:
        """The message `turn` behind those before it."""
        messages = self.messages
        if type(turn) is not int or not -len(messages) <= turn < len(messages):
            hint = f"It has {len(messages)}, counted from 0." if messages else "It is empty: `send` begins it."
            raise UsageError(f"The conversation has no message {turn!r}.", hint=hint)
        return messages[: turn % len(messages) + 1]

    def _asked(self, turn: int) -> int:
        """The id of the question `turn`, or of that to which `turn` replies."""
        message = self._at(turn)
        if message.role == "user":
            return message.id
        if message.role == "system" or message.parent is None:
            raise UsageError("There is no question to reply to.", hint="`send` asks one.")
        return message.parent

    def _require_idle(self) -> None:
        current = self._current()
        if current is not None and not current.over:
            raise UsageError("The chat is still writing its last reply.", hint="Read it to its end, or close it.")

    def _end_with(self, message: int) -> None:
        self._require_idle()
        with self._storing():
            self._tip, self._moved = message, True
            if self._store is not None and self._number is not None:
                self._catch_up()

    def _answer(self, message: ChatMessage, **options: Unpack[Options]) -> Reply:
        """A reply to the question `message`, or the reply `message` itself, as far as it is there already."""
        self._require_idle()
        wish = settle(self.model.sampling, **options)  # what cannot be is refused before anything is kept
        tokenizer = self.model.tokenizer
        opening = chatml.open_reply(tokenizer)
        asked = message.role == "user"
        if not asked:
            message = self._turns.begun(message)
            opening += message.tokens
        before = path_to(self._messages, message.parent) + ([message] if asked else [])
        prompt, unseen = self._turns.prompt(before, self.overflow, opening, wish.max_tokens)
        if asked:
            number = self._keep(message, final=True).id
            message = ChatMessage("assistant", "", parent=number)
        message = replace(message, model=self.model.name, tokenizer=tokenizer.identity, sampling=wish.sampling, left_out=unseen)
        options["persist"] = wish.persist and self._saved
        reply = Reply(self, self.model.write(prompt, **options), message)
        self._current = weakref.ref(reply)
        return reply

    # Keeping

    @property
    def _saved(self) -> bool:
        return self._store is not None and self._store.kept and not self.unsaved

    def _put(self, message: ChatMessage) -> ChatMessage:
        """A message into memory only; numbers below 0 say that no store knows it."""
        self._local -= 1
        message = replace(message, id=self._local)
        with self._changing:
            self._messages[message.id] = message
            self._tip = message.id
        self._behind[message.id] = True
        return message

    def _keep(self, message: ChatMessage, chunks: Sequence[str] = (), *, final: bool) -> ChatMessage:
        """A new message, or one that has grown, into memory and the store. final: False for a reply that is still being written."""
        message = replace(message, created=message.created or time.time())
        with self._storing():
            if message.id:
                # Its question may have got another id meanwhile.
                with self._changing:
                    message = replace(message, parent=self._messages[message.id].parent)
                    self._messages[message.id] = message
            else:
                message = self._put(message)
            self._behind[message.id] = final
            if self._store is not None:
                numbers = self._catch_up()
                message = self._messages[numbers.get(message.id, message.id)]
        self._keep_chunks(chunks)
        return self._messages.get(message.id, message)

    def _keep_chunks(self, chunks: Sequence[str]) -> None:
        self._chunks.extend(chunks)
        if self._chunks and self._number is not None and self._store is not None:
            with self._storing():
                self._store.keep_chunks(self._number, self._chunks)
                self._chunks.clear()

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """A store that fails costs no reply: the chat goes on in memory, and `unsaved` says so."""
        with self._telling:
            try:
                yield
                if not self._behind:
                    self.unsaved = ""
            except Qwen2LocalError as error:
                self.unsaved = error.what

    def _catch_up(self) -> dict[int, int]:
        """Puts what the store does not know yet into the store; the new ids by the old ones."""
        assert self._store is not None
        numbers: dict[int, int] = {}
        if self._number is None:
            now = time.time()
            record = ChatRecord(self.title, False, False, now, now, self._tip, tuple(self._messages.values()))
            self._number, numbers = self._store.insert(record)
            self._renumber(numbers)
            # A reply that is still being written is updated, and indexed, once more.
            self._behind.clear()
        while self._behind:
            old, final = next(iter(self._behind.items()))
            message = self._messages[old]
            if old < 0:
                numbers[old] = self._store.add(self._number, message, index=final)
                self._renumber({old: numbers[old]})
                self._moved = self._tip != numbers[old]
            else:
                self._store.update(self._number, message, index=final)
            del self._behind[old]
        while self._moved:
            self._moved = False  # another thread may move on meanwhile
            try:
                self._store.end_with(self._number, self._tip)
            except BaseException:
                self._moved = True
                raise
        return numbers

    def _renumber(self, numbers: dict[int, int]) -> None:
        def new(number: int | None) -> int | None:
            return None if number is None else numbers.get(number, number)

        with self._changing:
            messages = [replace(one, id=new(one.id) or 0, parent=new(one.parent)) for one in self._messages.values()]
            self._messages = {message.id: message for message in messages}
            self._turns.renumber(numbers)
            self._tip = new(self._tip)


def _own_store() -> ChatStore:
    """This person's, with its notes as warnings: nobody else looks at them."""
    store = ChatStore.open()
    for note in store.notes:
        warnings.warn(note, stacklevel=3)
    return store


def _later(begin: Callable[[], Reply]) -> AsyncStream:
    from qwen2_local.aio import AsyncStream

    return AsyncStream(begin)


_NAMES: dict[Role, str] = {"system": "system message", "user": "question", "assistant": "reply"}


def _question(text: str, parent: int | None) -> ChatMessage:
    require_text(text, "The message")
    if not text.strip():
        raise InvalidPrompt("The message is empty.", hint="Give some text.")
    return ChatMessage("user", text, parent=parent, created=time.time())
