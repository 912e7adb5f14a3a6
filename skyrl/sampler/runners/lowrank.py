"""Adapters in the form that kernels/lowrank.h reads: packed once, at the first use of each."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl.kernels import MULTIPLE, PANEL
from skyrl.models.decode_plan import DecodePlan

if TYPE_CHECKING:
    from skyrl.models.lora import Adapter, Segment

_POINTER = ctypes.c_void_p


class _Delta(ctypes.Structure):
    _fields_ = [("a", _POINTER), ("b", _POINTER)]


class _Deltas(ctypes.Structure):
    _fields_ = [(name, _Delta) for name in ("qkv", "out", "gate_up", "down")]


class _Adapter(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32), ("scale", ctypes.c_float), ("layer", ctypes.POINTER(_Deltas)), ("head", _Delta),
    ]  # fmt: skip


class SegmentStruct(ctypes.Structure):
    """Rows start .. stop and their adapter, as the kernels read it."""

    _fields_ = [("start", ctypes.c_int32), ("stop", ctypes.c_int32), ("adapter", ctypes.POINTER(_Adapter))]


STRUCTS = (_Adapter, SegmentStruct, _Deltas)  # sizes are compared with the library's


class PackedAdapters:
    """The adapters that were used, packed, until they are forgotten."""

    def __init__(self, library: ctypes.CDLL, plan: DecodePlan, dtype: torch.dtype) -> None:
        self._library, self._plan, self._dtype = library, plan, dtype
        self._packed: dict[int, _Packed] = {}  # by id of the adapter, which lives as long as its entry
        self._last: tuple[list[Segment] | None, ctypes.Array | None] = (None, None)

    def segments(self, parts: list[Segment] | None) -> ctypes.Array | None:
        """The same segments as the kernels read them; None for None. The last ones are kept: a decode batch asks for
        the same list at every step."""
        if parts is None:
            return None
        if parts is not self._last[0]:
            array = (SegmentStruct * len(parts))()
            for to, (start, stop, adapter) in zip(array, parts, strict=True):
                to.start, to.stop = start, stop
                if adapter is not None:
                    to.adapter = ctypes.pointer(self._pack(adapter).struct)
            self._last = (parts, array)
        return self._last[1]

    def forget(self, adapter: Adapter) -> None:
        """Drops the packed form."""
        self._packed.pop(id(adapter), None)
        self._last = (None, None)

    def _pack(self, adapter: Adapter) -> _Packed:
        if id(adapter) not in self._packed:
            self._plan.check(adapter)
            self._packed[id(adapter)] = _Packed(self._library, self._plan, self._dtype, adapter)
        return self._packed[id(adapter)]


class _Packed:
    """One adapter and the memory that its struct points to."""

    def __init__(self, library: ctypes.CDLL, plan: DecodePlan, dtype: torch.dtype, adapter: Adapter) -> None:
        self._library, self._plan, self._dtype, self._adapter = library, plan, dtype, adapter
        self._alive: list[Tensor] = []
        most = max((down.shape[0] for down, _ in adapter.pairs.values()), default=1)
        self._rank = -(-most // MULTIPLE) * MULTIPLE
        self._layers = (_Deltas * len(plan.layers))()
        for to, layer in zip(self._layers, plan.layers, strict=True):
            to.qkv, to.out = self._delta(layer.qkv), self._delta([layer.out])
            to.gate_up, to.down = self._delta(layer.gate_up), self._delta([layer.down])
        layers = ctypes.cast(self._layers, ctypes.POINTER(_Deltas))
        self.struct = _Adapter(self._rank, adapter.scale, layers, self._delta([plan.head]))

    def _delta(self, parts: list[nn.Linear]) -> _Delta:
        """A of all parts as one packed weight, B of all parts in groups of columns; see kernels/lowrank.h."""
        pairs = self._plan.adapted(self._adapter, parts)
        if all(pair is None for pair in pairs):
            return _Delta(None, None)
        half, inner, rank = int(self._dtype == torch.bfloat16), parts[0].in_features, self._rank
        size = self._library.skyrl_packed_size(half, rank * len(parts), inner)
        packed, groups, lanes = torch.zeros(size, dtype=self._dtype), [], self._library.skyrl_lanes()
        for number, (part, pair) in enumerate(zip(parts, pairs, strict=True)):
            # the head may end inside a panel; the other products have parts of whole groups
            columns = -(-part.out_features // PANEL) * PANEL if len(parts) == 1 else part.out_features
            up_GIR = torch.zeros(columns // lanes, lanes, rank, dtype=self._dtype)
            if pair is not None:
                down, up = (tensor.detach().to("cpu", self._dtype) for tensor in pair)
                down = F.pad(down, (0, 0, 0, rank - down.shape[0])).contiguous()
                self._library.skyrl_pack(half, packed.data_ptr(), down.data_ptr(), rank, inner, rank * number, 0, 1)
                up_GIR.view(columns, rank)[: up.shape[0], : up.shape[1]] = up
            pairs_of = 2 if half else 1  # neighbours along the rank that lie side by side
            groups.append(up_GIR.unflatten(2, (-1, pairs_of)).transpose(1, 2).reshape(-1))
        self._alive += [packed, torch.cat(groups)]
        return _Delta(self._alive[-2].data_ptr(), self._alive[-1].data_ptr())
