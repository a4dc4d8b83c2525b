"""What an engine is made of, as plain data; and the engine made of it, in this process or in a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen2_local import kvcache
from qwen2_local.backends import Plan
from qwen2_local.backends.base import Backend
from qwen2_local.engine import Engine

_log = logging.getLogger("qwen2_local.worker")


@dataclass(frozen=True, slots=True)
class Setup:
    """What to load, and how.

    label: the model's name, under which its KV is listed. draft: a smaller model, whose guesses the other one checks.
    kv_cache: keep KV on the disk, else in memory only. parallel, kv_memory: as in `Engine`.
    tokenizer: the file it is in (tokenizer.json or GGUF), for constraints.
    """

    plan: Plan
    label: str
    draft: Plan | None = None
    kv_cache: bool = True
    parallel: int = 8
    kv_memory: int | None = None
    tokenizer: Path | None = None


class LocalEngine(Engine):
    """The engine of a setup in this process, with its KV cache. `client.RemoteEngine` is the same in another process."""

    def __init__(self, setup: Setup) -> None:
        """Load it. Raises as `Plan.load` and `Engine` do, UsageError for a KV cache that is set up wrongly."""
        self._kv = kvcache.open_default(setup.label, tell=_log.warning) if setup.kv_cache else kvcache.KvCache(None, model=setup.label)
        draft = None if setup.draft is None else self._loading(setup.draft)
        try:
            super().__init__(self._loading(setup.plan), kv=self._kv, draft=draft, parallel=setup.parallel, kv_memory=setup.kv_memory)
        except BaseException:
            self._kv.close()
            raise

    def close(self) -> None:
        """Free the model, end the thread, and write what is still to be kept. Replies under way end as cancelled. Idempotent."""
        super().close()
        self._kv.close()

    def _loading(self, plan: Plan) -> Callable[[], Backend]:
        """How to load it, as long as somebody waits for it."""
        return lambda: plan.load(cancelled=lambda: self.closed)
