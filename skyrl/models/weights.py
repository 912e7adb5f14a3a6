"""Weights from safetensors files into a module, tensor by tensor, and random ones that no layout changes.

A module may hold plain parameters or DTensors: each rank then reads only its own rows where the file allows it.
Nothing here communicates.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from skyrl.distributed.env import rank
from skyrl.hub.tensor_files import Checkpoint, Region, reason_of
from skyrl.text.fit import say_progress
from skyrl.types import UserError, few


def local_region(param: Tensor) -> Region:
    """Which part of the whole tensor this rank holds, one slice per dim."""
    region = [slice(0, size) for size in param.shape]
    if not isinstance(param, DTensor):
        return tuple(region)
    place = param.device_mesh.get_coordinate()
    assert place is not None
    for axis, placement in enumerate(param.placements):
        if type(placement) is Shard:  # as torch.chunk: equal parts, the last ones smaller or empty
            part, dim = region[placement.dim], placement.dim
            size = -(-(part.stop - part.start) // param.device_mesh.size(axis))
            start = min(part.start + size * place[axis], part.stop)
            region[dim] = slice(start, min(start + size, part.stop))
        elif type(placement) is not Replicate:
            raise RuntimeError(f"cannot load into a parameter placed as {placement}")
    return tuple(region)


def put(param: Tensor, value: Tensor, region: Region | None = None) -> None:
    """Copies `value` (the whole tensor, or the part given by `region`) into what this rank holds of `param`."""
    with torch.no_grad():
        _local(param).copy_(value if region is not None else value[local_region(param)])


def _local(param: Tensor) -> Tensor:
    return param.to_local() if isinstance(param, DTensor) else param


def targets(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, under their first name."""
    return {**dict(net.named_parameters()), **persistent_buffers(net)}


def persistent_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a model's files (biases of routers, say), by name; rotary frequencies do not."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in net.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def plan(net: Any, checkpoint: Checkpoint, whole: Any = None) -> tuple[dict[str, str | Conversion], dict[str, str]]:
    """What is read for each target: a key of the files, or transformers' own converter of several keys (fused experts);
    and further keys, with the target that they are taken for a copy of (tied weights, the same name with a prefix).

    `whole`: the config of the model with images or sound whose text part `net` is; its other weights are left alone.
    Raises UserError that names keys which are missing or which the model has no place for.
    """
    found = _assign(net, checkpoint)
    if whole is not None:
        found.spare.clear()
        if found.missing:  # not named as in a checkpoint of the text part: as the whole model names them
            found = _assign_part(net, checkpoint, whole)
    sides = (("lacks", found.missing), ("has no place for", found.spare))
    if said := [f"{what} {few(names)}" for what, names in sides if names]:
        raise UserError(
            f"model.path: {checkpoint.folder} does not fit model type {net.config.model_type}: {' and '.join(said)}; "
            "check that config.json belongs to these weights"
        )
    return found.steps, found.copies


@dataclass
class Conversion:
    """Parameters of `net` that transformers' own converter makes from several tensors of the files, by the names that
    `names` gives them; `name`: the first of them in `net`."""

    net: Any
    name: str
    converter: Any
    names: Callable[[str], str]

    def tensors(self) -> dict[str, Tensor]:
        """What is made, read now."""
        made = self.converter.convert(self.name, model=self.net, config=self.net.config)
        return {self.names(name): t[0] if isinstance(t, list) else t for name, t in made.items()}


@dataclass
class Assignment:
    """Which keys of the files go where (see `plan`), which targets get nothing, and the keys without a place."""

    steps: dict[str, str | Conversion]
    copies: dict[str, str]
    missing: list[str]
    spare: list[str]


def _by_numbers(key: str) -> list[tuple[int, int, str]]:
    """What sorts the names of tensors so that layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _assign(net: Any, checkpoint: Checkpoint, names: Callable[[str], str] = lambda name: name) -> Assignment:
    """Of a checkpoint of `net`, by the names that `names` gives the targets."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    wanted, aliases = targets(net), aliases_of(net)
    transforms = get_model_conversion_mapping(net)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: list[Any] = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = {**wanted, **{alias: wanted[name] for alias, name in aliases.items() if name in wanted}}
    steps: dict[str, str | Conversion] = {}
    copies: dict[str, str] = {}
    made: set[str] = set()
    spare: list[str] = []
    for key in sorted(checkpoint.files, key=_by_numbers):
        name, pattern = rename_source_key(key, renamings, converters, net.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        name = aliases.get(name, name)
        there = steps.get(names(name))
        if name not in wanted or isinstance(there, str if pattern else Conversion):
            spare.append(key)
        elif pattern is not None:
            if not isinstance(there, Conversion):
                there = steps[names(name)] = Conversion(net, name, deepcopy(by_pattern[pattern]), names)
            there.converter.add_tensor(name, key, pattern, partial(checkpoint.read, key))
            several = there.converter.target_patterns
            made.update(name.replace(several[0], other) for other in several)
        elif steps.setdefault(names(name), key) != key:
            copies[key] = names(name)
    missing = sorted(names(name) for name in wanted if name not in made and names(name) not in steps)
    return Assignment(steps, copies, missing, [key for key in spare if not _ignorable(net, key)])


def _assign_part(net: Any, checkpoint: Checkpoint, whole: Any) -> Assignment:
    """Of a checkpoint of the model `whole`, what belongs to its text part `net`: what lies where its embeddings lie."""
    from transformers import AutoModelForMultimodalLM

    whole = deepcopy(whole)
    whole.tie_word_embeddings = net.config.tie_word_embeddings
    try:
        with torch.device("meta"):
            owner: Any = AutoModelForMultimodalLM.from_config(whole)
    except Exception as error:  # a package for images is missing, values that fit nothing
        raise UserError(
            f"model.path: {checkpoint.folder}: transformers cannot build {whole.model_type}, after whose parts these "
            f"weights are named ({reason_of(error)})"
        ) from error
    owner.tie_weights()
    theirs, ours = (path_of(n, n.get_input_embeddings()).split(".") for n in (owner, net))
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs, ours = theirs[:-1], ours[:-1]
    places = {".".join([*theirs, ""]): ".".join([*ours, ""])}
    if net.get_output_embeddings() is not None:
        places[path_of(owner, owner.get_output_embeddings())] = path_of(net, net.get_output_embeddings())

    def names(name: str) -> str:
        for place, own in places.items():
            if name.startswith(place):
                return own + name[len(place) :]
        return f"{whole.model_type}: {name}"

    found, own = _assign(owner, checkpoint, names), targets(net)
    return Assignment(
        {name: step for name, step in found.steps.items() if name in own},
        {key: name for key, name in found.copies.items() if name in own},
        sorted(own.keys() & set(found.missing) | own.keys() - {names(name) for name in targets(owner)}),
        [],
    )


def path_of(net: Any, module: nn.Module) -> str:
    """The name of a module inside `net`."""
    return next(path for path, other in net.named_modules() if other is module)


def fill_from(net: Any, folder: Path, whole: Any = None) -> None:
    """Every parameter and persistent buffer of `net` from the files in `folder`, cast to its own dtype; one tensor at a
    time, of a sharded one this rank's part alone.

    Raises UserError that names the tensor: of the wrong shape, with NaN or infinity in it, or not equal to the one that
    it is taken for a copy of.
    """
    checkpoint = Checkpoint(folder, getattr(net.config, "transformers_weights", None))
    (steps, copies), wanted = plan(net, checkpoint, whole), targets(net)

    def check_shape(what: str, found: Sequence[int], name: str) -> None:
        if tuple(found) != (own := tuple(wanted[name].shape)):
            raise UserError(f"model.path: {what} in {folder} has shape {tuple(found)}; the config asks for {own}")

    progress = say_progress(
        "loading tensors", len(steps), lambda line: print(line, flush=True) if rank() == 0 else None
    )
    for number, (name, step) in enumerate(steps.items()):
        progress(number)
        if isinstance(step, str):
            check_shape(step, checkpoint.shape(step), name)
            region = local_region(wanted[name])
            put(wanted[name], checkpoint.read(step, region), region)
            continue
        try:
            converted = step.tensors()
        except (RuntimeError, ValueError) as error:  # tensors to be stacked that differ in shape or number
            raise UserError(
                f"model.path: {name} cannot be made from the tensors for it in {folder} ({reason_of(error)}); check "
                "that config.json belongs to these weights"
            ) from error
        for made, tensor in converted.items():
            check_shape(f"what makes {made}", tensor.shape, made)
            put(wanted[made], tensor)
    for name, tensor in wanted.items():
        if not _is_finite(_local(tensor)):
            raise UserError(
                f"model.path: {name} in {folder} is not finite everywhere (in {str(tensor.dtype)[6:]}); download the "
                "model again, or give a model.dtype with a larger range"
            )
    for key, name in copies.items():
        check_shape(key, checkpoint.shape(key), name)
        own, other = _local(wanted[name]), checkpoint.read(key, local_region(wanted[name]))
        if not torch.equal(other.to(own.device, own.dtype), own):
            raise UserError(
                f"model.path: {key} and {steps[name]} in {folder} stand for one weight of model type "
                f"{net.config.model_type} and are not equal; delete one of them, or set tie_word_embeddings to false "
                "in config.json if the output embedding is its own"
            )
    for key, file in checkpoint.again:
        if not torch.equal(checkpoint.read(key, file=file), checkpoint.read(key)):
            raise UserError(
                f"model.path: {key} in {folder} differs between {checkpoint.files[key]} and {file}; delete one of them"
            )


def init_random(module: nn.Module, seed: int, *, std: float = 0.02, residual_layers: int = 0, only: str = "") -> None:
    """Fresh values: norms 1, biases 0, everything else normal. Keyed by seed and name: the same on every layout.

    `std` is the standard deviation; projections back into the residual stream (o_proj, down_proj) have it divided by
    sqrt(2 * residual_layers) where residual_layers > 0 (GPT-2's rule). A value head starts at standard deviation
    1 / (C + 1), bias 0. `only`: parameters whose names begin so.
    """
    for name, param in module.named_parameters():
        if not name.startswith(only):
            continue
        leaf, owner = name.rpartition(".")[2], name.rpartition(".")[0].rpartition(".")[2]
        if leaf == "bias" or param.ndim < 2:
            put(param, torch.full(param.shape, 0.0 if leaf == "bias" else 1.0))
            continue
        spread = std
        if owner in ("o_proj", "down_proj") and residual_layers:
            spread = std / (2 * residual_layers) ** 0.5
        elif owner == "value_head":
            spread = 1.0 / (param.shape[-1] + 1)
        put(param, torch.randn(param.shape, generator=generator_of(f"{seed}/{name}")) * spread)


def generator_of(key: str) -> torch.Generator:
    """A generator of random numbers on the CPU that depends on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def aliases_of(net: nn.Module) -> dict[str, str]:
    """Other names of tied parameters -> their first name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in net.named_parameters(remove_duplicate=False)}
    return {name: kept for name, kept in names.items() if name != kept}


def _ignorable(net: Any, key: str) -> bool:
    """Keys that transformers ignores too, and the head where the model is a critic."""
    patterns = list(getattr(net, "_keys_to_ignore_on_load_unexpected", None) or [])
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in net.named_buffers()):  # old files have it in each layer
        patterns.append(r"rotary_emb\.inv_freq")
    patterns.append(r"\.(attn|attention)\.masked_bias$")  # -10,000, which GPT-2's relatives stored in each layer
    dropped = [name for name, module in net.named_modules() if isinstance(module, nn.Identity)]
    return any(re.search(p, key) for p in patterns) or any(key.startswith(f"{name}.") for name in dropped)


def _is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity; in one pass, without a tensor of the same size."""
    passed = not tensor.is_floating_point() or not tensor.numel()
    return passed or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
