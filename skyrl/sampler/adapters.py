"""Which adapter a request uses, and what of it is cached.

Adapters are told apart by object, not by name: a name that is given again is another adapter. A frozen adapter does not
change, so what was cached for it stays valid until it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skyrl.models.lora import Adapter
from skyrl.types import UserError


@dataclass
class Known:
    """An adapter that requests have used: the name they gave, its cache_key in the pool, its unfinished requests."""

    name: str
    adapter: Adapter
    cache_key: int
    unfinished: int = 0


class AdapterRegistry:
    """Adapters by name (a live mapping), with a cache_key of cached contents for each that was used."""

    def __init__(self, adapters: Mapping[str, Adapter], base_name: str, new_cache_key: Callable[[], int]) -> None:
        self._adapters, self._base_name, self._new_key = adapters, base_name, new_cache_key
        self._known: dict[int, Known] = {}  # by id of the adapter, which is kept alive here

    def find(self, name: str, where: str) -> Known | None:
        """The adapter that a request names; None for the base. Raises UserError for an unknown name."""
        if name in ("", self._base_name):
            return None
        adapter = self._adapters.get(name)
        if adapter is None:
            some = ", ".join(sorted(self._adapters)[:5]) or "none"
            raise UserError(
                f"{where}: model={name!r} is not known; allowed: {self._base_name!r} (no adapter) or a published "
                f"adapter (now: {some}{', ..' if len(self._adapters) > 5 else ''})"
            )
        if id(adapter) not in self._known:
            self._known[id(adapter)] = Known(name, adapter, self._new_key())
        return self._known[id(adapter)]

    def count(self, adapter: Adapter | None, change: int) -> None:
        """Books that a request of an adapter came (+1) or went (-1)."""
        if adapter is not None:
            self._known[id(adapter)].unfinished += change

    def drop(self, name: str) -> list[Known]:
        """Forgets all adapters used under a name and returns them. Raises RuntimeError while requests use one."""
        found = [known for known in self._known.values() if known.name == name]
        busy = sum(known.unfinished for known in found)
        if busy:
            raise RuntimeError(f"adapter {name!r} has {busy} unfinished requests; finish or cancel them first")
        for known in found:
            del self._known[id(known.adapter)]
        return found
