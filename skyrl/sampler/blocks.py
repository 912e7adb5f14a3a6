"""Paged blocks of the KV cache: who holds which, which can be shared, which can be thrown away. Holds no tensors.

A block is free, held (by one or more sequences) or cached (held by nobody, content still valid). Content is found again
by exact comparison: a block's key is the id of the block content before it and the bytes of its own tokens, so two
contents never meet by a hash collision. Contents begin at a cache key, one for each adapter: the same tokens below two
keys are two contents, since keys and values depend on the adapter.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

BASE_KEY = 0  # the content id before the first block of a sequence without an adapter
Key = tuple[int, bytes]


class BlockPool:
    """Blocks 1 .. num_blocks, each of `block_tokens` tokens. Block 0 is never handed out: padding writes there."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._free = list(range(num_blocks, 0, -1))
        self._holders = [0] * (num_blocks + 1)
        self._key: list[Key | None] = [None] * (num_blocks + 1)
        self._content: dict[Key, tuple[int, int]] = {}  # key -> (content id, block)
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._next_id = BASE_KEY + 1
        self.peak = 0

    def available(self) -> int:
        """Blocks that can be allocated now: free or cached."""
        return len(self._free) + len(self._cached)

    def held(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.available()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, one holder each. The caller has checked available()."""
        assert count <= self.available(), f"{count} blocks asked for, {self.available()} available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._uncache(block)
            self._holders[block] = 1
            blocks.append(block)
        self.peak = max(self.peak, self.held())
        return blocks

    def share(self, blocks: list[int]) -> list[int]:
        """The same blocks with one more holder each."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1
        self.peak = max(self.peak, self.held())
        return list(blocks)

    def release(self, blocks: list[int]) -> None:
        """Takes one holder from each. Those with known content stay cached.

        In reverse, so that the end of a sequence is evicted before its start, without which it cannot be found."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} released more often than held"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def new_cache_key(self) -> int:
        """A new cache_key: contents below it meet no others."""
        self._next_id += 1
        return self._next_id - 1

    def longest_cached_prefix(self, tokens: np.ndarray, cache_key: int = BASE_KEY) -> list[int]:
        """The blocks that hold the longest known beginning of `tokens` in whole blocks; takes no holder."""
        blocks: list[int] = []
        parent, size = cache_key, self.block_tokens
        for end in range(size, len(tokens) + 1, size):
            found = self._content.get((parent, tokens[end - size : end].tobytes()))
            if found is None:
                break
            parent, block = found
            blocks.append(block)
        return blocks

    def cache_full_blocks(self, tokens: np.ndarray, blocks: list[int], cache_key: int = BASE_KEY) -> None:
        """Makes the whole blocks of `tokens`, held in `blocks`, findable. Known content keeps its first block."""
        parent, size = cache_key, self.block_tokens
        for index in range(len(tokens) // size):
            key = (parent, tokens[index * size : (index + 1) * size].tobytes())
            found = self._content.get(key)
            if found is None:
                block = blocks[index]
                self._uncache(block)  # its old key leads nowhere when the content before it was evicted
                found = (self._next_id, block)
                self._next_id += 1
                self._content[key], self._key[block] = found, key
            parent = found[0]

    def uncache(self, blocks: list[int]) -> None:
        """Makes held blocks unfindable: their content was announced and will not be computed."""
        for block in blocks:
            self._uncache(block)

    def unused(self, blocks: list[int]) -> list[int]:
        """Those that nobody holds and whose content is not known."""
        return [block for block in blocks if self._holders[block] == 0 and self._key[block] is None]

    def reset_prefix_cache(self, cache_key: int | None = None) -> list[int]:
        """Drops every cached content, or that below `cache_key`; its cached blocks become free. Returns those."""
        below, freed = {cache_key}, []
        for key, (content, block) in list(self._content.items()):  # in the order of ids: parents before children
            if cache_key is not None and key[0] not in below:
                continue
            below.add(content)
            self._uncache(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)
                freed.append(block)
        return freed

    def _uncache(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._content[key]
            self._key[block] = None
