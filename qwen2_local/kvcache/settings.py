"""The cache as this computer's user wants it: switched off, or with another budget, by environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from qwen2_local import fit, paths
from qwen2_local.errors import UsageError
from qwen2_local.kvcache.cache import MEMORY, KvCache

SWITCH = "QWEN2_LOCAL_KV"
"""The variable that says "off": nothing is stored on disk."""

BUDGET = "QWEN2_LOCAL_KV_BUDGET"
"""The variable with the bytes that may be stored on disk: "5GB", "500MB", "1000000"."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def open_default(model: str = "", *, memory: int | None = None, tell: Callable[[str], None] = lambda _: None) -> KvCache:
    """The user's cache, as the environment says. Raises UsageError for values that mean nothing. The arguments are `KvCache`'s.

    memory: by default less on a machine that has little, as a model's estimate does not count it (`fit`).
    """
    if memory is None:
        memory = min(MEMORY, fit.machine_memory().available // 32)
    return KvCache(paths.kv() if is_on() else None, budget=budget(), memory=memory, model=model, tell=tell)


def is_on() -> bool:
    """Are chunks stored on disk? Raises UsageError."""
    said = os.environ.get(SWITCH, "").strip().lower()
    if said in ("off", "0", "no", "false"):
        return False
    if said in ("", "on", "1", "yes", "true"):
        return True
    raise UsageError(f"{SWITCH}={said[:40]} means nothing.", hint='Say "off" or "on".')


def budget() -> int | None:
    """The bytes that the user allows; None: the default. Raises UsageError."""
    said = os.environ.get(BUDGET, "").strip()
    if not said:
        return None
    parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([a-z]{0,2})", said.lower(), re.ASCII)
    if parts is None or parts[2] not in _UNITS:
        raise UsageError(f"{BUDGET}={said[:40]} is no size.", hint="Say 5GB, 500MB or a number of bytes; 0 stores nothing.")
    return int(float(parts[1]) * _UNITS[parts[2]])
