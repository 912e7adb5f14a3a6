"""What a runner is, and what it is given: sequences, chunks of prefill, decode inputs, and the paged KV cache.

A runner computes logits over the cache and decides nothing. Everything above it (who runs when, which blocks, when a
sequence ends) is in skyrl/sampler; nothing here imports from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from skyrl.models.attention_calls import LayerShape
from skyrl.models.linear_attention import States
from skyrl.models.lora import Adapter, Segment, segments_of
from skyrl.models.packed import to_device
from skyrl.sampler.runners.sampling import BatchSamplingParams, sample
from skyrl.types import SamplingParams


class KVCache:
    """Keys [blocks, K, block_tokens, C] and values of every layer, or with `tokens_first` [blocks, block_tokens, K, C]
    as paged kernels want them. Block 0 takes the writes of padding. `states`: what a layer of linear attention keeps of
    each sequence, number 0 of which nobody has; None for other layers. `experts` [blocks, block_tokens, layers, k] are
    a mixture's choices for each token, where they are recorded (`choices`: layers, k): they belong to a token as its
    keys do, so that whoever takes over its block has them.

    Zero-filled: a key that is masked out still meets the products, and 0 * NaN is NaN.
    """

    def __init__(
        self,
        shapes: list[LayerShape],
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tokens_first: bool = False,
        states: list[States | None] | None = None,
        choices: tuple[int, int] | None = None,
    ) -> None:
        self.shapes, self.block_tokens, self.dtype, self.device = shapes, block_tokens, dtype, device

        def room(heads: int, size: int) -> Tensor:
            middle = (block_tokens, heads) if tokens_first else (heads, block_tokens)
            return torch.zeros(num_blocks + 1, *middle, size, dtype=dtype, device=device)

        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._own: list[Tensor] = []  # each once
        for shape in shapes:
            if shape.same_as is None:
                self.keys.append(room(shape.num_heads, shape.key_size))
                self.values.append(room(shape.num_heads, shape.value_size))
                self._own += self.keys[-1], self.values[-1]
            else:
                self.keys.append(self.keys[shape.same_as])
                self.values.append(self.values[shape.same_as])
        self.states = states or [None] * len(shapes)
        self.experts: Tensor | None = None
        if choices:
            self.experts = torch.zeros(num_blocks + 1, block_tokens, *choices, dtype=torch.int16, device=device)
            self._own.append(self.experts)

    @staticmethod
    def block_bytes(shapes: list[LayerShape], block_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        own = [shape for shape in shapes if shape.same_as is None]
        channels = sum(shape.num_heads * (shape.key_size + shape.value_size) for shape in own)
        return channels * block_tokens * dtype.itemsize

    def put_experts(self, slots_T: Tensor, chosen: dict[int, Tensor]) -> None:
        """Stores what the routers of each layer chose for a step's tokens."""
        assert self.experts is not None
        new_TLK = torch.stack([chosen[layer] for layer in range(len(chosen))], 1)
        self.experts.flatten(0, 1).index_copy_(0, slots_T, new_TLK.to(self.experts.dtype))

    def experts_of(self, sequence: Sequence) -> np.ndarray | None:
        """The recorded choices of a sequence's tokens but the last, which has not been computed; None without any."""
        if self.experts is None:
            return None
        blocks = torch.tensor(sequence.blocks, device=self.device)
        chosen = self.experts.index_select(0, blocks).flatten(0, 1)[: sequence.length - 1].cpu().numpy()
        if sequence.experts is not None:
            chosen[: len(sequence.experts)] = sequence.experts
        return chosen

    def keep_experts(self, sequence: Sequence) -> None:
        """Keeps the choices of a sequence that is about to lose its blocks: its tokens are computed again, in other
        company, and what was drawn from the first choices is replayed by these."""
        sequence.experts = self.experts_of(sequence)

    def clear(self, blocks: list[int]) -> None:
        """Sets blocks to zero: what is not finite would spoil the next sequence that has the block, masked or not."""
        if blocks:
            index = to_device(sorted(set(blocks)), self.device)
            for tensor in self._own:
                tensor.index_fill_(0, index, 0)

    def copy_states(self, pairs: list[tuple[int, int]]) -> None:
        """Copies the states of sequences: (from, to) each."""
        self._copy(pairs, [tensor for states in self.states if states for tensor in states])

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks: (from, to) each."""
        self._copy(pairs, self._own)

    def _copy(self, pairs: list[tuple[int, int]], tensors: list[Tensor]) -> None:
        if pairs:
            source, target = to_device(pairs, self.device).unbind(1)
            for tensor in tensors:
                tensor.index_copy_(0, target, tensor.index_select(0, source))


@dataclass(eq=False)
class Sequence:
    """One request on its way. tokens [limit] holds context and drawn tokens; the first `length` are valid."""

    order: int
    uid: str
    params: SamplingParams
    tokens: np.ndarray
    start: int  # length of the context
    length: int
    logprobs: np.ndarray  # [limit - start] float32
    stops_at: Callable[[int], bool] | None = None  # told each drawn token; True when a stop string is complete
    adapter: Adapter | None = None
    cache_key: int = 0  # what its cached blocks are found under: one for each adapter (blocks.BASE_KEY without)
    blocks: list[int] = field(default_factory=list)
    state: int = 0  # which of the cache's states is its own, while it prefills or runs
    computed: int = 0  # tokens whose keys and values are in the cache, while prefilling
    waiting: bool = True
    experts: np.ndarray | None = None  # choices recorded before it was preempted
    supports: list[np.ndarray] = field(default_factory=list)  # ids that each drawn token was one of, if recorded

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


@dataclass
class PrefillChunk:
    """Part of a prefill: tokens start .. end of a sequence, whose earlier ones are in the cache."""

    sequence: Sequence
    start: int
    end: int

    @property
    def complete(self) -> bool:
        """Whether its last row gives the logits to draw from."""
        return self.end == self.sequence.length


@dataclass
class DecodeInputs:
    """The running sequences as arrays; numpy, so that bookkeeping costs no tensor calls."""

    tokens_B: np.ndarray  # int64, the newest token of each
    positions_B: np.ndarray  # int64, its position
    table_BW: np.ndarray  # int32, blocks of each; 0 beyond its own
    segments: list[Segment] | None = None  # rows of one adapter lie together; None = all are the base
    state_B: np.ndarray | None = None  # int64, which states are theirs; for models that have some

    def slots(self, size: int) -> np.ndarray:
        """Where the newest token of each sequence is stored, [B] int64, with `size` tokens in a block."""
        blocks_B = self.table_BW[np.arange(len(self.tokens_B)), self.positions_B // size]
        return blocks_B.astype(np.int64) * size + self.positions_B % size


class Runner(ABC):
    """Computes logits over the cache and samples from them. Decides nothing. `name`: which path computes."""

    name: str  # module, fused or kernels

    @abstractmethod
    def prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        """Fills the cache; logits [complete chunks, V] float32 of the last token of each complete chunk, if any."""

    @abstractmethod
    def decode(self, batch: DecodeInputs) -> Tensor:
        """Logits [B, V] float32 of the newest token of each sequence, until the next call; adds it to the cache."""

    def sample(self, logits_BV: Tensor, params: BatchSamplingParams, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """See sampling.sample; may overwrite the logits."""
        return sample(logits_BV, params, uniforms_B)

    def refresh(self) -> None:  # noqa: B027
        """The parameters changed in place; nothing to do where they are read live."""

    def adapter_changed(self, adapter: Adapter) -> None:  # noqa: B027
        """An adapter's weights changed in place; nothing to do where its own tensors are read."""

    def forget(self, adapter: Adapter) -> None:  # noqa: B027
        """Drops what is kept of an adapter; nothing where its own tensors are read."""


def prefill_arrays(chunks: list[PrefillChunk], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a prefill step with `size` tokens in a block: tokens [T], their positions [T] and where they are stored [T],
    int64; the blocks of each sequence [B, W], int32."""
    tokens_T = np.concatenate([p.sequence.tokens[p.start : p.end] for p in chunks])
    positions_T = np.concatenate([np.arange(p.start, p.end) for p in chunks])
    table_BW = np.zeros((len(chunks), max(len(p.sequence.blocks) for p in chunks)), dtype=np.int32)
    for row, p in zip(table_BW, chunks, strict=True):
        row[: len(p.sequence.blocks)] = p.sequence.blocks
    owner_T = np.repeat(np.arange(len(chunks)), [p.end - p.start for p in chunks])
    slots_T = table_BW[owner_T, positions_T // size].astype(np.int64) * size + positions_T % size
    return tokens_T, positions_T, slots_T, table_BW


def chunk_segments(chunks: list[PrefillChunk]) -> tuple[list[Segment] | None, list[Segment] | None]:
    """Segments of a prefill's tokens, and of the rows that give logits (one of each complete chunk)."""
    tokens = segments_of([p.sequence.adapter for p in chunks], [p.end - p.start for p in chunks])
    return tokens, segments_of([p.sequence.adapter for p in chunks if p.complete])


def last_rows(hidden_TC: Tensor, chunks: list[PrefillChunk]) -> Tensor:
    """The rows of `hidden_TC` that give the logits of complete chunks."""
    ends = np.cumsum([p.end - p.start for p in chunks]) - 1
    rows = [int(end) for end, p in zip(ends, chunks, strict=True) if p.complete]
    return hidden_TC.index_select(0, to_device(rows, hidden_TC.device, np.int64))
