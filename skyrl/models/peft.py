"""A trained adapter for others to use: as a folder that the peft package loads, or merged into the model's weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor

from skyrl.models.export import PREFIX, save_tensors
from skyrl.models.lora import output_path
from skyrl.types import LoraSpec

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRAPPER = "base_model.model."  # where peft puts the model that it wraps


def write_adapter(folder: Path, weights: Mapping[str, Tensor], spec: LoraSpec, base: str) -> None:
    """Writes the two files that peft.PeftModel.from_pretrained(model, folder) reads, into a folder that is made where
    it is not there.

    `weights`: an Adapter's parameters by name (<module path>.A, <module path>.B), on the CPU. `base`: where the model
    under it comes from, for people. Modules are named by their whole paths, since a short name would also match those
    without an adapter. Raises: OSError.
    """
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(_pairs(weights)),
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
    tensors = {f"{WRAPPER}{path}.lora_{side}.weight": t for path, pair in _pairs(weights).items() for side, t in pair}
    save_tensors(tensors, folder / WEIGHTS)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights that `write_adapter` wrote, by the same names. Raises: OSError, SafetensorError."""
    found = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        path, side, _ = name.removeprefix(WRAPPER).rsplit(".", 2)
        found[f"{path}.{side.removeprefix('lora_')}"] = tensor
    return found


def merge_adapter(state: dict[str, Tensor], weights: Mapping[str, Tensor], spec: LoraSpec, model: CausalLM) -> Any:
    """Adds alpha / rank * B A to the whole weights in `state` ("net.<path>.weight", on the CPU), in place; returns the
    transformers config of what came out.

    Sums are float32 and rounded to the dtype of `state`: a bfloat16 model with its adapter merged in is not quite the
    model that was trained. An output embedding that is adapted and tied to the input embedding is no longer tied.
    """
    config, head = model.config, output_path(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for path, pair in _pairs(weights).items():
        name = f"{PREFIX}{path}.weight"
        if path == head and model.tied:
            state[name] = state[names[id(model.net.get_input_embeddings().weight)]].clone()
            config = copy.deepcopy(config)
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        sides = dict(pair)
        delta = sides["B"].float() @ sides["A"].float()
        state[name] = (state[name].float() + spec.alpha / spec.rank * delta).to(state[name].dtype)
    return config


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """path -> [("A", A), ("B", B)]."""
    out: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in weights.items():
        path, _, side = name.rpartition(".")
        out.setdefault(path, []).append((side, tensor))
    return out
