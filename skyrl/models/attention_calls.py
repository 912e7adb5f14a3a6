"""What the layers of a model ask of attention, found by running one token through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM

_CALLS: dict[str, list[LayerCall]] = {}


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token."""

    num_heads: int  # K
    key_size: int
    value_size: int


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
