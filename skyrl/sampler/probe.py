"""What each layer of a model keeps in the cache, found by running one token through it."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl.models.forward import CausalLM
from skyrl.sampler.paged import LayerShape

_SHAPES: dict[str, list[LayerShape]] = {}


class _Recorder:
    """An Attention that attends to nothing but the token itself and notes the shapes that pass by."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

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
        self.shapes[layer] = LayerShape(key_KTC.shape[0], key_KTC.shape[2], value_KTC.shape[2])
        return value_KTC.repeat_interleave(query_HTC.shape[0] // key_KTC.shape[0], 0).transpose(0, 1)


def signature(model: CausalLM) -> str:
    """Names the architecture, its sizes, its numbers and its device: equal names behave alike."""
    parameter = next(model.parameters())
    config = model.config
    return f"{type(model.net).__name__} {parameter.dtype} {parameter.device.type} {config.to_json_string()}"


@torch.no_grad()
def layer_shapes(model: CausalLM) -> list[LayerShape]:
    """Cache shape of every layer, by layer number. Found once per architecture in this process."""
    name = signature(model)
    if name not in _SHAPES:
        recorder = _Recorder()
        device = next(model.parameters()).device
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        model.hidden(zero, zero, recorder)
        if sorted(recorder.shapes) != list(range(len(recorder.shapes))):
            raise RuntimeError(f"attention ran in layers {sorted(recorder.shapes)}, not in all from 0")
        _SHAPES[name] = [recorder.shapes[layer] for layer in range(len(recorder.shapes))]
    return _SHAPES[name]
