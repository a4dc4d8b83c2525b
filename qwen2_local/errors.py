"""Every error a caller can see. Each says what is wrong, where, and what to do next.

Qwen2LocalError                 exit code 1
 ├─ UsageError                  2   the request itself is wrong
 │   ├─ UnknownModel
 │   ├─ UnknownChat
 │   ├─ InvalidSampling
 │   ├─ InvalidPrompt
 │   └─ UnsupportedSchema           a form that replies cannot be made to keep to
 ├─ BadFile                     3   a file is damaged, hostile or not what it claims to be
 │   └─ UnsupportedModel            a sound file, of an architecture or kind that we do not run
 ├─ BackendError                4   a backend is missing, crashed or computed nonsense
 │   ├─ BackendUnavailable
 │   └─ WorkerDied                  the process that a model runs in crashed, or was killed
 ├─ DoesNotFit                  5   memory, disk or context
 │   └─ ContextOverflow
 ├─ FetchFailed                 6   a server does not give a file: refused, broken off, too slow, not what was announced
 │   └─ Offline                     no server can be reached
 ├─ SchemaError                 7   a reply is not what its schema asks for
 │   └─ TruncatedReply              it was cut short by a limit
 └─ Cancelled                   130 stopped by the caller
"""

from __future__ import annotations


class Qwen2LocalError(Exception):
    """Base of all errors of this program.

    `what` is one sentence naming the thing and the cause; `hint` the next step. `str(error)` is both, on two lines.
    """

    exit_code = 1

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}" if self.hint else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling of exceptions.
        return _rebuild, (type(self), self.what, self.hint)


def _rebuild(kind: type[Qwen2LocalError], what: str, hint: str) -> Qwen2LocalError:
    return kind(what, hint=hint)


class UsageError(Qwen2LocalError):
    """The request itself is wrong: an option, a value, a combination."""

    exit_code = 2


class UnknownModel(UsageError):
    """No installed model, built-in model, file or folder has this name."""


class UnknownChat(UsageError):
    """No chat has this number."""


class InvalidSampling(UsageError):
    """A sampling value outside its range, or not a number."""


class InvalidPrompt(UsageError):
    """A prompt that is empty, or no valid text."""


class UnsupportedSchema(UsageError):
    """A JSON schema, regular expression or choice that replies cannot be made to keep to: unknown keywords, no text at all, too complex."""


class BadFile(Qwen2LocalError):
    """A file that is damaged, hostile, half-written, or not what it claims to be. Names the file."""

    exit_code = 3


class UnsupportedModel(BadFile):
    """A sound file of an architecture, tokenizer or quantization that this program does not run."""


class BackendError(Qwen2LocalError):
    """A backend failed: it crashed, could not load, or computed values that are no numbers."""

    exit_code = 4


class BackendUnavailable(BackendError):
    """The backend's library is not installed, or does not work on this machine."""


class WorkerDied(BackendError):
    """The process that a model runs in ended unexpectedly. Its requests are lost; the next one starts another process."""


class DoesNotFit(Qwen2LocalError):
    """Not enough memory, disk or context. Says how much is needed and how much there is."""

    exit_code = 5


class ContextOverflow(DoesNotFit):
    """Prompt and reply do not fit into the context. Says the counts."""


class FetchFailed(Qwen2LocalError):
    """A file or listing could not be fetched: the server refused it or kept breaking off. What had come is kept, and used the next time."""

    exit_code = 6


class Offline(FetchFailed):
    """The server could not be reached at all, or the network is switched off (HF_HUB_OFFLINE)."""


class SchemaError(Qwen2LocalError):
    """A reply is not what its schema asks for."""

    exit_code = 7


class TruncatedReply(SchemaError):
    """A reply in a schema's form was cut short, by `max_tokens`, the context or its caller."""


class Cancelled(Qwen2LocalError):
    """The caller stopped the work (Ctrl-C, or `cancel`)."""

    exit_code = 130
