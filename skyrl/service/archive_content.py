"""Tensors of a checkpoint as files: an adapter as the peft package loads it, whole weights, the optimizer's state.

adapter_config.json, adapter_model.safetensors | model.safetensors, and optimizer.safetensors where there is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyrl.service.records import Json, ModelInfo

ADAPTER_CONFIG, ADAPTER, MODEL, OPTIMIZER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "optimizer.safetensors",
)
PREFIX = "base_model.model."  # where peft puts the model it wraps
_GROUPS = ("exp_avg", "exp_avg_sq", "master")


@dataclass
class OptimizerState:
    """AdamW after `step` steps: moments by parameter name (the caller's names); master: the parameters in the dtype
    that AdamW works in, where that is not their own, else {}."""

    step: int
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    master: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Content:
    """What a checkpoint holds, on the CPU. With facts.is_lora `adapters` is filled, else `weights`.

    adapters: module path in the Hugging Face model ("model.layers.0.self_attn.q_proj") -> (A [r, in], B [out, r]).
    weights: parameter name -> tensor, tied ones once. Every dtype comes back as it was, bit for bit.
    """

    facts: ModelInfo
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: OptimizerState | None = None


def write_content(content: Content, folder: Path) -> None:
    """Writes the files into an existing folder. Raises: ValueError when content and facts disagree, OSError,
    SafetensorError (the system's refusal, as safetensors tells it)."""
    facts = content.facts
    if facts.is_lora:
        config = adapter_config(facts, content.adapters)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
        tensors = {}
        for path, pair in content.adapters.items():
            for letter, tensor in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{path}.lora_{letter}.weight"] = tensor
        _save(tensors, folder / ADAPTER)
    else:
        if not content.weights:
            raise ValueError(f"no weights to save for a model of {facts.base_model}")
        _save(content.weights, folder / MODEL)
    if content.optimizer is not None:
        groups = {group: getattr(content.optimizer, group) for group in _GROUPS}
        _save(
            {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}, folder / OPTIMIZER
        )


def read_content(folder: Path, facts: ModelInfo, optimizer: bool) -> Content:
    """The inverse of `write_content`; `optimizer.step` is left 0 (meta.json has it). Checks no checksum."""
    content = Content(facts)
    if facts.is_lora:
        tensors = load_file(folder / ADAPTER)
        ends = {letter: f".lora_{letter}.weight" for letter in "AB"}
        paths = [name[len(PREFIX) : -len(ends["A"])] for name in tensors if name.endswith(ends["A"])]
        content.adapters = {
            path: (tensors[PREFIX + path + ends["A"]], tensors[PREFIX + path + ends["B"]]) for path in paths
        }
    else:
        content.weights = load_file(folder / MODEL)
    if optimizer:
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
        for key, tensor in load_file(folder / OPTIMIZER).items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        content.optimizer = OptimizerState(0, **groups)
    return content


def adapter_config(facts: ModelInfo, adapters: dict[str, tuple[Tensor, Tensor]]) -> Json:
    """The adapter_config.json that peft reads. Modules are named by their whole paths: a short name would also match
    modules that have no adapter. Raises: ValueError when a shape does not fit the rank."""
    if facts.lora is None or not adapters:
        raise ValueError(f"adapter of {facts.base_model}: no rank or no modules")
    rank, alpha = facts.lora.rank, facts.lora.alpha
    for path, (a, b) in adapters.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"adapter of {path}: A {tuple(a.shape)}, B {tuple(b.shape)} do not have rank {rank}")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(adapters),
        "use_dora": False,
        "use_rslora": False,
    }


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        # safetensors refuses two names for one memory; whoever gave us that means two tensors
        plain[name] = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
    save_file(plain, file, metadata={"format": "pt"})
