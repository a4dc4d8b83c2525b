"""The links that are kept in RAM: a dictionary with a bound in bytes, the least recently used out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from qwen2_local.kvcache import chain
from qwen2_local.kvcache.chain import Link


class Memory:
    """At most `limit` bytes of links' data. Not safe for several threads at once: `KvCache` locks."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, tuple[Link, bytes]] = OrderedDict()
        self._families: dict[str, set[str]] = {}
        self.bytes = 0

    def get(self, name: str) -> bytes | None:
        """The data of a link."""
        held = self._held.get(name)
        return None if held is None else held[1]

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def put(self, link: Link, data: bytes) -> None:
        """Keep a link; those that it begins with go, and as many of the least recently used as it needs. One that is too large is not kept."""
        if link.name in self._held or len(data) > self._limit:
            return
        for name in list(self._families.get(link.family, ())):
            if self._held[name][0].count < link.count and link.packed.startswith(self._held[name][0].packed):
                self.drop(name)
        while self.bytes + len(data) > self._limit:
            self.drop(next(iter(self._held)))
        self._held[link.name] = (link, data)
        self._families.setdefault(link.family, set()).add(link.name)
        self.bytes += len(data)

    def closest(self, wanted: Link) -> tuple[Link, int] | None:
        """The link of the same parent with the most tokens in common with `wanted`, and how many; None if none has any."""
        best, least = None, 0
        for name, most in chain.closest(self._families.get(wanted.family, ()), wanted):
            if most <= least:
                break
            found = self._held[name][0]
            if (count := chain.common(found.packed, wanted.packed)) > least:
                best, least = (found, count), count
        return best

    def use(self, path: Sequence[Link]) -> None:
        """The links of a sequence were used just now, the first the most recently: a link is no use without those before it."""
        for link in reversed(path):
            if link.name in self._held:
                self._held.move_to_end(link.name)

    def drop(self, name: str) -> None:
        """Forget a link, if it is there."""
        found = self._held.pop(name, None)
        if found is not None:
            self.bytes -= len(found[1])
            family = self._families[found[0].family]
            family.discard(name)
            if not family:
                del self._families[found[0].family]

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self._families.clear()
        self.bytes = 0
