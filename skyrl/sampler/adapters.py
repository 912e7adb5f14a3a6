"""Which adapter a request uses, and stretches of rows with one adapter.

Adapters are told apart by object, not by name: a name that is published again is another adapter. A published adapter
does not change, so what was cached for it stays valid until it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl.models.logprobs import finish_logits, matmul_float
from skyrl.models.lora import Adapter, Segment, low_rank, merged
from skyrl.sampler.blocks import ROOT
from skyrl.sampler.scheduler import PrefillChunk
from skyrl.types import UserError

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM


def segments(adapters: list[Adapter | None], lengths: list[int] | None = None) -> list[Segment] | None:
    """Stretches of one adapter over rows that lie end to end, `lengths` rows of each (None: 1); None where all of them
    are the base."""
    if all(adapter is None for adapter in adapters):
        return None
    out, at = [], 0
    for adapter, length in zip(adapters, lengths or [1] * len(adapters), strict=True):
        out.append((at, at + length, adapter))
        at += length
    return merged(out)


def chunk_segments(chunks: list[PrefillChunk]) -> tuple[list[Segment] | None, list[Segment] | None]:
    """Segments of a prefill's tokens, and of the rows that give logits (one of each complete chunk)."""
    tokens = segments([p.sequence.adapter for p in chunks], [p.end - p.start for p in chunks])
    return tokens, segments([p.sequence.adapter for p in chunks if p.complete])


def logits(model: CausalLM, hidden_TC: Tensor, parts: list[Segment] | None) -> Tensor:
    """As model.logits, [T, V] float32, with each row's adapter of the output embedding."""
    if parts is None:
        return model.logits(hidden_TC)
    weight_VC, bias_V = model.output_weight()
    with torch.no_grad():
        product = matmul_float(hidden_TC, weight_VC, bias_V)
        for start, stop, adapter in parts:
            if adapter is not None and adapter.head is not None:
                down, up = adapter.pairs[adapter.head]
                product[start:stop] += matmul_float(low_rank(hidden_TC[start:stop], down, adapter.scale), up)
        return finish_logits(product, model.head_spec)


@dataclass
class Known:
    """An adapter that requests have used: the name they gave, its root in the pool, its unfinished requests."""

    name: str
    adapter: Adapter
    root: int
    unfinished: int = 0


class AdapterRegistry:
    """Adapters by name (a live mapping), with a root of cached contents for each that was used."""

    def __init__(self, adapters: Mapping[str, Adapter], base_name: str, new_root: Callable[[], int]) -> None:
        self._adapters, self._base_name, self._new_root = adapters, base_name, new_root
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
            self._known[id(adapter)] = Known(name, adapter, self._new_root())
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


def root_of(known: Known | None) -> int:
    """Where cached contents of a request begin."""
    return ROOT if known is None else known.root
