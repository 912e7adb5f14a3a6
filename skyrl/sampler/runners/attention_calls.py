"""What the layers of a model ask of attention, found by running one token through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from skyrl.sampler.runners.paged import DecodeInputs, KVCache, LayerShape
from skyrl.sampler.scheduler import PrefillChunk, Sequence
from skyrl.types import SamplingParams

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM
    from skyrl.sampler.sampler import Runner

_CALLS: dict[str, list[LayerCall]] = {}


@dataclass(frozen=True)
class LayerCall:
    """How one layer calls attention: its cache shape, query heads and options."""

    shape: LayerShape
    num_heads: int
    scale: float
    window: int | None
    softcap: float | None


class _Recorder:
    """An Attention that notes how it is called."""

    def __init__(self) -> None:
        self.calls: dict[int, LayerCall] = {}

    def attend(
        self,
        layer: int,
        query_HTC: Tensor,
        key_KTC: Tensor,
        value_KTC: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One token sees itself only, so its output is its value."""
        heads, shape = query_HTC.shape[0], LayerShape(key_KTC.shape[0], key_KTC.shape[2], value_KTC.shape[2])
        self.calls[layer] = LayerCall(shape, heads, scale, window, softcap)
        return value_KTC.repeat_interleave(heads // key_KTC.shape[0], 0).transpose(0, 1)


def signature(model: CausalLM) -> str:
    """Names the architecture, its sizes, its numbers and its device: equal names behave alike."""
    parameter = next(model.parameters())
    return f"{type(model.net).__name__} {parameter.dtype} {parameter.device.type} {model.config.to_json_string()}"


@torch.no_grad()
def layer_calls(model: CausalLM) -> list[LayerCall]:
    """How every layer calls attention, by layer number. Found once per architecture in this process."""
    name = signature(model)
    if name not in _CALLS:
        recorder = _Recorder()
        zero = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
        model.hidden(zero, zero, recorder)
        if sorted(recorder.calls) != list(range(len(recorder.calls))):
            raise RuntimeError(f"attention ran in layers {sorted(recorder.calls)}, not in all from 0")
        _CALLS[name] = [recorder.calls[layer] for layer in range(len(recorder.calls))]
    return _CALLS[name]


@torch.no_grad()
def disagreement(runner: Runner, module: Runner, cache: KVCache) -> str:
    """How the log-probabilities of `runner` differ from those of the module path, or "" when only by rounding.

    Two short sequences are prefilled and decoded by one step. Writes blocks 0 to 2 of the cache, so only before use.
    """
    size = cache.block_tokens
    lengths = [min(7, size), min(3, size)]
    results = []
    for each in (runner, module):
        sequences = []
        for order, length in enumerate(lengths):
            tokens = np.arange(1, length + 1, dtype=np.int64) * (order + 1) % 50
            params = SamplingParams(max_tokens=1)
            block = [min(order + 1, cache.keys[0].shape[0] - 1)]
            sequences.append(Sequence(order, "", params, tokens, length, length, np.zeros(0), blocks=block))
        logits = []
        for sequence in sequences:  # one after the other: they may have to share a block
            end = sequence.length - 1
            if end:
                each.prefill([PrefillChunk(sequence, 0, end)])
            batch = DecodeInputs(
                sequence.tokens[end:], np.array([end], dtype=np.int64), np.array([sequence.blocks], dtype=np.int32)
            )
            logits.append(each.decode(batch).clone())
        results.append(torch.log_softmax(torch.cat(logits), -1))
    gap = (results[0] - results[1]).abs().max().item()
    allowed = {torch.float64: 1e-8, torch.float32: 1e-4}.get(cache.dtype, 0.25)
    return "" if gap <= allowed else f"its log-probabilities differ by {gap:.3g} from the module's"
