"""What the layers of a model ask of attention, found by running one token through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl.models.attention import AttentionOptions
from skyrl.models.latent import Latent
from skyrl.models.linear_attention import DeltaRule, StateShape

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM

_CALLS: dict[str, list[LayerCall]] = {}


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token. `same_as`: the earlier layer whose keys and values it takes, so keeps none. All
    sizes are 0 for linear attention, which keeps a state of the sequence instead."""

    num_heads: int  # K
    key_size: int
    value_size: int
    same_as: int | None = None


@dataclass(frozen=True)
class LayerCall:
    """How one layer calls attention: its cache shape, query heads and options; or what its linear attention keeps."""

    shape: LayerShape
    num_heads: int
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None = None
    sinks: bool = False
    state: StateShape | None = None


class _Recorder:
    """An Attention that notes how it is called."""

    def __init__(self) -> None:
        self.calls: dict[int, LayerCall] = {}
        self._kept: list[tuple[int, Tensor]] = []

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        """One token sees itself only, so its output is its value."""
        same = next((number for number, key in self._kept if key.data_ptr() == key_KTC.data_ptr()), None)
        if same is None:
            self._kept.append((layer, key_KTC))
        heads, shape = query_HTC.shape[0], LayerShape(key_KTC.shape[0], key_KTC.shape[2], value_KTC.shape[2], same)
        self.calls[layer] = LayerCall(
            shape, heads, options.scale, options.window, options.softcap, options.chunk, options.sinks_H is not None
        )
        return value_KTC.repeat_interleave(heads // key_KTC.shape[0], 0).transpose(0, 1)

    def attend_latent(self, layer: int, query_HTC: Tensor, latent: Latent, *, scale: float) -> Tensor:
        """The same; what is kept has one head, and no values beside it."""
        shape = LayerShape(1, latent.kept_TC.shape[1], 0)
        self.calls[layer] = LayerCall(shape, query_HTC.shape[0], scale, None, None)
        return latent.values(latent.kept_TC[:, None, : latent.rank].expand(-1, query_HTC.shape[0], -1))

    def recur(self, layer: int, rule: DeltaRule, mixed_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor) -> Tensor:
        self.calls[layer] = LayerCall(LayerShape(0, 0, 0), 0, 1.0, None, None, state=rule.shape)
        return rule.run(mixed_TC[None], decay_TH[None], beta_TH[None])[0][0]


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
