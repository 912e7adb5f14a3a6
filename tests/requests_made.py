"""Requests as the codec makes them of what clients send, in the short form that tests write."""

from typing import Any

import numpy as np

from skyrl.service.messages import (
    AdamSettings,
    CreateModel,
    LoadWeights,
    LoraSettings,
    OptimStep,
    SamplingRequest,
    SamplingSettings,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
)

SAVES = {kind.kind: kind for kind in (SaveWeights, SaveWeightsForSampler, SaveWeightsExternal)}


def create_model(session: str, number: int, base: str = "tiny", rank: int = 4, seed: int | None = None) -> CreateModel:
    lora = LoraSettings(rank=rank, seed=seed)
    return CreateModel(session_id=session, model_seq_id=number, base_model=base, lora_config=lora)


def optim_step(model: str, seq_id: int, **adam: Any) -> OptimStep:
    return OptimStep(model_id=model, seq_id=seq_id, adam_params=AdamSettings.model_construct(**adam))


def save_weights(model: str, seq_id: int, kind: str = "weights", name: str | None = None, **more: Any) -> SaveWeights:
    return SAVES[kind](model_id=model, seq_id=seq_id, name=name, **more)


def load_weights(path: str, optimizer: bool, **more: Any) -> LoadWeights:
    return LoadWeights(path=path, optimizer=optimizer, **more)


def sampling_request(seq_id: int, prompt: np.ndarray, **more: Any) -> SamplingRequest:
    """Without the border's checks; the fields of sampling_params beside the others."""
    settings = {name: more.pop(name) for name in SamplingSettings.model_fields if name in more}
    params = SamplingSettings.model_construct(**settings)
    return SamplingRequest.model_construct(seq_id=seq_id, prompt=prompt, sampling_params=params, **more)
