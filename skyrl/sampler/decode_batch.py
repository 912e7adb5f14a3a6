"""Sequences that are decoded together, as arrays, so that a step costs no Python loop over sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from skyrl.models.lora import segments_of
from skyrl.models.packed import to_device
from skyrl.sampler.runners import sampling
from skyrl.sampler.runners.base import DecodeInputs, KVCache, Runner, Sequence
from skyrl.types import StopReason


class DecodeBatch:
    """Sequences that draw together, as arrays that are built once and then advanced."""

    def __init__(self, sequences: list[Sequence], cache: KVCache, vocab_size: int) -> None:
        self.sequences = list(sequences)
        device, params = cache.device, [s.params for s in self.sequences]
        self._device = device
        self.lengths_B = np.array([s.length for s in self.sequences], dtype=np.int64)
        self._starts_B = np.array([s.start for s in self.sequences], dtype=np.int64)
        self._limits_B = np.array([len(s.tokens) for s in self.sequences], dtype=np.int64)
        self._streams_B = sampling.stream([p.seed for p in params])
        self._params = sampling.BatchSamplingParams.of(params, vocab_size, device)
        width = max((len(p.stop_token_ids) for p in params), default=0)
        self._stops_BN = np.full((len(params), width), -1, dtype=np.int64)
        for row, p in zip(self._stops_BN, params, strict=True):
            row[: len(p.stop_token_ids)] = p.stop_token_ids
        self._strings = [(index, s.stops_at) for index, s in enumerate(self.sequences) if s.stops_at is not None]
        self._size = cache.block_tokens
        blocks = -(-int(self._limits_B.max(initial=1)) // self._size)
        table_BW = np.zeros((len(params), blocks), dtype=np.int32)
        self._known_B = np.zeros(len(params), dtype=np.int64)
        tokens_B = np.array([s.tokens[s.length - 1] for s in self.sequences], dtype=np.int64)
        parts = segments_of([s.adapter for s in self.sequences])
        state_B = np.array([s.state for s in self.sequences], dtype=np.int64)
        self.batch = DecodeInputs(tokens_B, self.lengths_B - 1, table_BW, parts, state_B)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []  # drawn but not yet in the sequences
        self._supports: list[list[np.ndarray]] = []  # of the same draws, where the log-probabilities are of them
        self._index: dict[int, int] | None = None  # rows of the sequences, by id; made when asked for

    def extend_tables(self) -> None:
        """Takes over the blocks that the scheduler added since the last call."""
        for index in np.flatnonzero(self.lengths_B > self._known_B * self._size):
            blocks = self.sequences[index].blocks
            self.batch.table_BW[index, : len(blocks)] = blocks
            self._known_B[index] = len(blocks)

    def sample(self, runner: Runner, logits_BV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Draws one token of each sequence from its row: tokens, log-probabilities."""
        uniforms_B = to_device(sampling.uniforms(self._streams_B, self.lengths_B - self._starts_B), self._device)
        given = logits_BV, self._params, uniforms_B
        if self._params.processed_B is None:
            tokens_B, logprobs_B = runner.sample(*given)
        else:
            tokens_B, logprobs_B, supports = sampling.sample_with_support(*given)
            self._supports.append(supports)
        if self._device.type == "cpu":
            return tokens_B.numpy(), logprobs_B.numpy()
        both = torch.stack((tokens_B.double(), logprobs_B.double())).cpu().numpy()  # by one copy; exact
        return both[0].astype(np.int64), both[1].astype(np.float32)

    def append(self, tokens_B: np.ndarray, logprobs_B: np.ndarray) -> list[tuple[int, StopReason]]:
        """Adds a token to each sequence; returns (index, stop reason) of those that end."""
        self._pending.append((tokens_B, logprobs_B))
        self.lengths_B += 1
        self.batch.tokens_B[:] = tokens_B
        self.batch.positions_B += 1
        stopped_B = (self._stops_BN == tokens_B[:, None]).any(1)
        for index, stops_at in self._strings:
            stopped_B[index] |= stops_at(int(tokens_B[index]))
        ended = np.flatnonzero(stopped_B | (self.lengths_B >= self._limits_B))
        if len(ended) or self.crowded():
            self.flush()
        return [(int(i), "stop" if stopped_B[i] else "length") for i in ended]

    def pending(self, sequence: Sequence) -> list[np.ndarray]:
        """What was drawn for a sequence and is not in it yet, one token in each array."""
        if not self._pending:
            return []
        if self._index is None:
            self._index = {id(one): row for row, one in enumerate(self.sequences)}
        row = self._index.get(id(sequence))
        return [] if row is None else [tokens[row : row + 1] for tokens, _ in self._pending]

    def crowded(self) -> bool:
        """Whether some sequence needs a block that it does not have yet."""
        return bool((self.lengths_B > self._known_B * self._size).any())

    def flush(self) -> None:
        """Writes what was drawn since the last call into the sequences; the scheduler looks at them only then."""
        if not self._pending:
            return
        tokens_BN = np.stack([tokens for tokens, _ in self._pending], 1)
        logprobs_BN = np.stack([logprobs for _, logprobs in self._pending], 1)
        for sequence, tokens, logprobs in zip(self.sequences, tokens_BN, logprobs_BN, strict=True):
            start = sequence.length
            sequence.length = end = start + len(tokens)
            sequence.tokens[start:end] = tokens
            sequence.logprobs[start - sequence.start : end - sequence.start] = logprobs
        for supports in self._supports:
            for sequence, ids in zip(self.sequences, supports, strict=True):
                sequence.supports.append(ids)
        self._pending, self._supports = [], []
