"""How often, and how long, a server is given another chance."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qwen2_converters.remote import Address, Resolve
from qwen2_converters.web import Expired, TryAgain
from qwen2_local.errors import Cancelled, FetchFailed, Offline

_PROGRESS = 1 << 20
"""Bytes beyond all that was reached before, for which earlier failures are forgotten. So a server that gives a byte at a time has an end."""

_T = TypeVar("_T")
_KEPT = "Run the same command again: what has come is kept."


@dataclass(frozen=True, slots=True)
class Patience:
    """tries: failures in a row, without progress, that are put up with. Pauses, in seconds, double from `first_s` to `longest_s`, with jitter.

    A server may ask for a pause (Retry-After) of up to `asked_s`; if it asks for more, that is the end.
    """

    tries: int = 8
    first_s: float = 0.5
    longest_s: float = 30.0
    asked_s: float = 120.0


def persist(
    name: str, resolve: Resolve, attempt: Callable[[Address], _T], reached: Callable[[], int], *, patience: Patience, stop: threading.Event
) -> _T:
    """What `attempt` gives, tried again while it raises TryAgain, and with a new address once when it raises Expired.

    name: of the file, for messages. reached: bytes so far. Raises FetchFailed, Offline if no try met an answer, Cancelled when `stop` is set.
    """
    address: Address | None = None
    highest, failures, answered, renewed = reached(), 0, False, False
    while True:
        if stop.is_set():
            raise stopped()
        pause = 0.0
        try:
            if address is None:
                address = resolve()
            return attempt(address)
        except Expired as error:
            if renewed:
                raise FetchFailed(f"{name}: {error.what}.", hint="It may need a login (HF_TOKEN), or that you accept its licence there.") from error
            address, renewed, answered, last = None, True, True, error.what
        except Offline as error:
            last = error.what.rstrip(".")
            failures += 1
        except TryAgain as error:
            last = error.what
            answered, renewed = answered or not error.unreachable, renewed and error.unreachable
            failures += 1
            if error.after_s > patience.asked_s:
                raise FetchFailed(f"{name}: {last}, and asks to wait {error.after_s:.0f} seconds.", hint=_KEPT) from error
            pause = error.after_s
        if reached() >= highest + _PROGRESS:
            highest, failures, renewed = reached(), min(failures, 1), False
        if failures >= patience.tries:
            kind = FetchFailed if answered else Offline
            raise kind(f"{name} could not be fetched: {last} ({failures} tries).", hint=f"Check the network. {_KEPT}")
        if failures:
            backoff = min(patience.longest_s, patience.first_s * 2 ** (failures - 1))
            stop.wait(max(pause, backoff * random.uniform(0.5, 1.0)))


def stopped() -> Cancelled:
    """The error for a download that the caller ended."""
    return Cancelled("The download was stopped.", hint=_KEPT)
