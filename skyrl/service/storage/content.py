"""What a checkpoint holds, between the engine, a folder and the ranks. Here and in snapshots.py is what needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from skyrl.pretrained.export import save_tensors
from skyrl.pretrained.peft import read_adapter, write_adapter
from skyrl.service.storage.records import MODEL, OPTIMIZER, ModelInfo
from skyrl.types import LoraSpec

WRAPPER = "net."  # before the name of each parameter of a whole model, in the engine


@dataclass
class OptimizerState:
    """AdamW after `step` steps: moments by the names of the weights."""

    step: int
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


@dataclass
class Content:
    """What a checkpoint holds, on the CPU. Every dtype comes back as it was, bit for bit.

    weights: of an adapter "<module path>.A" [r, in] and "<module path>.B" [out, r], with module paths as in the Hugging
    Face model ("model.layers.0.self_attn.q_proj"); else the model's parameters, tied ones once.
    """

    info: ModelInfo
    weights: dict[str, Tensor]
    optimizer: OptimizerState | None = None


def write_content(content: Content, folder: Path) -> None:
    """Writes the tensors into an existing folder. Raises: OSError."""
    assert content.weights, "a checkpoint of nothing"
    if content.info.lora is not None:
        write_adapter(folder, content.weights, content.info.lora, content.info.base_model)
    else:
        save_tensors(content.weights, folder / MODEL)
    if (kept := content.optimizer) is not None:
        groups = {"exp_avg": kept.exp_avg, "exp_avg_sq": kept.exp_avg_sq}
        save_tensors(
            {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()},
            folder / OPTIMIZER,
        )


def read_content(folder: Path, info: ModelInfo, step: int | None) -> Content:
    """The inverse of `write_content`, `step` None: without the optimizer's state. Checks no checksum."""
    content = Content(info, read_adapter(folder) if info.is_lora else load_file(folder / MODEL))
    if step is not None:
        groups: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        for key, tensor in load_file(folder / OPTIMIZER).items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        content.optimizer = OptimizerState(step, **groups)
    return content


def to_content(base_model: str, lora: LoraSpec | None, state: dict[str, Any]) -> Content:
    """A model's state in the engine as a checkpoint's content. Adapter parameters keep their names, <module path>.A
    and .B; those of whole models are named as transformers names them, without the wrapper."""
    if lora is None:
        state = {key: _renamed(part, lambda name: name.removeprefix(WRAPPER)) for key, part in state.items()}
    optimizer = None
    if "exp_avg" in state:
        optimizer = OptimizerState(int(state["step"]), state["exp_avg"], state["exp_avg_sq"])
    return Content(ModelInfo(base_model, lora), state["weights"], optimizer)


def to_state(content: Content) -> dict[str, Any]:
    """The inverse of `to_content`."""
    state: dict[str, Any] = {"weights": content.weights}
    if (kept := content.optimizer) is not None:
        state.update(
            exp_avg=kept.exp_avg, exp_avg_sq=kept.exp_avg_sq, step=torch.tensor(float(kept.step), dtype=torch.float32)
        )
    if not content.info.is_lora:
        state = {key: _renamed(part, lambda name: WRAPPER + name) for key, part in state.items()}
    return state


def _renamed(part: Any, rename: Callable[[str], str]) -> Any:
    return {rename(name): tensor for name, tensor in part.items()} if isinstance(part, dict) else part
