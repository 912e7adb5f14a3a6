"""A trained adapter for others to use: as a folder that the peft package loads, or merged into the model's weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from skyrl.models.lora import Experts, adapted, output_path, shapes_of
from skyrl.pretrained.export import PREFIX, save_tensors
from skyrl.types import LoraSpec, UserError

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of peft's config that change what the weights mean, with the only value that an Adapter knows besides none.
PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_dora": None, "use_rslora": None, "rank_pattern": None, "lora_bias": None,
    "alpha_pattern": None, "modules_to_save": None, "trainable_token_indices": None,
}  # fmt: skip
# Linear maps that peft takes for those of experts, as transformers 4 named them, wherever a model has experts: it is
# given the weights of shared experts and dense layers as parameters, too.
OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
WRAPPER = "base_model.model."  # where peft puts the model that it wraps


def write_adapter(
    folder: Path, weights: Mapping[str, Tensor], spec: LoraSpec, base: str, heads: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the two files that peft.PeftModel.from_pretrained(model, folder) reads, into a folder that is made where
    it is not there.

    `weights`: an Adapter's parameters by name (<module path>.A, <module path>.B), on the CPU. `base`: where the model
    under it comes from, for people. `heads`: whole parameters by name of what is stored so instead: an output embedding
    that is tied to the input embedding, where peft's merging would change both. Modules are named by their whole paths,
    since a short name would also match those without an adapter; experts, whose A has more rows than the rank, are
    parameters to peft (target_parameters). Raises: OSError.
    """
    heads = heads or {}
    saved = sorted({name.rpartition(".")[0] for name in heads})
    pairs = {path: pair for path, pair in _pairs(weights).items() if path not in saved}
    assert pairs, "peft loads no adapter without A and B: merge_adapter adds a pair of zeros"
    experts = sorted(path for path, pair in pairs.items() if dict(pair)["A"].shape[0] != spec.rank)
    beside = [path for path in pairs if experts and path.rpartition(".")[2] in OF_EXPERTS]
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
        "modules_to_save": saved or None,
        "target_modules": sorted(set(pairs) - set(experts) - set(beside)),
        **({"target_parameters": sorted([*experts, *(f"{path}.weight" for path in beside)])} if experts else {}),
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
    places = {path: path for path in pairs} | _places(experts)
    tensors = {f"{WRAPPER}{places[path]}.lora_{side}.weight": t for path, pair in pairs.items() for side, t in pair}
    save_tensors(tensors | {f"{WRAPPER}{name}": t for name, t in heads.items()}, folder / WEIGHTS)


def _places(parameters: list[str]) -> dict[str, str]:
    """Where peft puts the matrices of each parameter: wrapped around its module, one around the other, down_proj
    outermost."""
    out: dict[str, str] = {}
    for path in sorted(parameters):
        module = path.rpartition(".")[0]
        out[path] = module + ".base_layer" * sum(other.rpartition(".")[0] == module for other in out)
    return out


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights that `write_adapter` wrote, or peft for an adapter of the same kind, by the same names.

    Raises: UserError for what peft can do and an Adapter cannot, by its name; OSError, SafetensorError.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    odd = [f"{key}={config[key]}" for key, plain in PLAIN.items() if (config.get(key) or None) not in (None, plain)]
    tensors, found = load_file(folder / WEIGHTS), {}
    modules = {name.removeprefix(WRAPPER).partition(".lora_")[0].replace(".base_layer", "") for name in tensors}
    inside = config.get("target_parameters") or []
    whole = [f"{m}.{leaf}" for m in modules for leaf in {one.rpartition(".")[2] for one in inside}]
    places = {
        place: path
        for path, place in _places([p for p in whole if any(f".{p}".endswith(f".{one}") for one in inside)]).items()
    }
    for name, tensor in tensors.items():
        path, _, side = name.removeprefix(WRAPPER).removesuffix(".weight").rpartition(".")
        path = places.get(path, path).removesuffix(".weight")
        if side not in ("lora_A", "lora_B"):
            odd.append(name)
        found[f"{path}.{side.removeprefix('lora_')}"] = tensor
    if odd:
        raise UserError(
            f"adapter {folder}: {', '.join(odd[:3])} cannot be taken over; give A and B of linear layers alone, with "
            "one rank and alpha"
        )
    return found


def merge_adapter(
    state: dict[str, Tensor], weights: Mapping[str, Tensor], spec: LoraSpec, model: CausalLM
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Adds alpha / rank * B A to the whole weights in `state` ("net.<path>.weight", of experts "net.<path>", on the
    CPU), in place. Returns the transformers config of what came out, and `weights` and `heads` for write_adapter.

    Sums are float32 and rounded to the dtype of `state`: a bfloat16 model with its adapter merged in is not quite the
    model that was trained. An output embedding that is adapted and tied to the input embedding is no longer tied.
    """
    config, head, heads, written = model.config, output_path(model), {}, dict(weights)
    products = adapted(model, spec)
    names = {id(p): name for name, p in model.named_parameters()}
    for path, pair in _pairs(weights).items():
        product, sides = products[path], dict(pair)
        name = f"{PREFIX}{path}" if isinstance(product, Experts) else f"{PREFIX}{path}.weight"
        untied = path == head and model.tied
        if untied:
            state[name] = state[names[id(model.net.get_input_embeddings().weight)]].clone()
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
        a, b = sides["A"].float(), sides["B"].float()
        delta = spec.alpha / spec.rank * (product.delta(a, b) if isinstance(product, Experts) else b @ a)
        if isinstance(product, Conv1D):
            delta = delta.t()
        state[name] = (state[name].float() + delta).to(state[name].dtype)
        if untied:
            own = model.net.get_submodule(path).named_parameters()
            heads = {f"{path}.{leaf}": state[f"{PREFIX}{path}.{leaf}"] for leaf, _ in own}
    if heads and len(written) == 2:  # peft loads no adapter without A and B: one that adds nothing
        linears = ((path, module) for path, module in model.net.named_modules() if path != head)
        path, product = next((path, module) for path, module in linears if type(module) in (nn.Linear, Conv1D))
        written[f"{path}.A"], written[f"{path}.B"] = (torch.zeros(shape) for shape in shapes_of(product, spec.rank))
    return config, written, heads


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """path -> [("A", A), ("B", B)]."""
    out: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in weights.items():
        path, _, side = name.rpartition(".")
        out.setdefault(path, []).append((side, tensor))
    return out
