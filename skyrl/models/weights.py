"""Weights from safetensors files into a module, tensor by tensor, and random ones that no layout changes.

A module may hold plain parameters or DTensors: each rank then reads only its own rows where the file allows it.
Nothing here communicates.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from skyrl.types import UserError

Region = tuple[slice, ...]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """The tensors of a folder in Hugging Face format, by their names in the files; opens files when they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            self.files: dict[str, str] = dict(weight_map)
        elif (folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            raise UserError(
                f"model.path: {folder} holds no {SINGLE} and no {INDEX}; other formats are not read, convert them with "
                "save_pretrained of transformers"
            )
        for name in sorted(set(self.files.values())):
            if not (folder / name).is_file():
                raise UserError(f"model.path: {folder} lacks {name}, which {INDEX} names; download the model again")

    def _file(self, name: str) -> Any:
        if self._open is None or self._open[0] != name:
            try:
                self._open = (name, safe_open(str(self.folder / name), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"model.path: {self.folder / name} cannot be read ({error}); download the model again"
                ) from error
        return self._open[1]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor called `key`."""
        return tuple(self._file(self.files[key]).get_slice(key).get_shape())

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """The tensor called `key` on the CPU in its own dtype, or a part of it; a part reads only that part."""
        file = self._file(self.files[key])
        if region is None or not region:
            return file.get_tensor(key)
        return file.get_slice(key)[region]


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
    local = param.to_local() if isinstance(param, DTensor) else param
    with torch.no_grad():
        local.copy_(value if region is not None else value[local_region(param)])


def targets(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, under their first name."""
    out: dict[str, Tensor] = dict(net.named_parameters())
    state = set(net.state_dict(keep_vars=True))
    out.update((name, buffer) for name, buffer in net.named_buffers() if name in state)
    return out


def plan(net: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """What is read for each target: a key of the files, or transformers' own converter of several keys (fused experts).

    Raises UserError that names keys which are missing or which the model has no place for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    wanted = targets(net)
    aliases = _aliases(net)
    transforms = get_model_conversion_mapping(net)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: list[Any] = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = {**wanted, **{alias: wanted[name] for alias, name in aliases.items() if name in wanted}}
    out: dict[str, Any] = {}
    made: set[str] = set()
    spare: list[str] = []
    for key in sorted(checkpoint.files, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, net.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if name not in known:
            spare.append(key)
        elif pattern is None:
            # a tied weight may be stored under any of its names, or all: the first name wins, they are equal
            out.setdefault(aliases.get(name, name), key)
        else:
            converter = out.setdefault(name, deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, partial(checkpoint.read, key))
            made.update(name.replace(converter.target_patterns[0], other) for other in converter.target_patterns)
    missing = sorted(set(wanted) - set(out) - made)
    spare = [key for key in spare if not _ignorable(net, key)]
    if missing or spare:
        said = [f"{what} {_few(names)}" for what, names in (("lacks", missing), ("has no place for", spare)) if names]
        raise UserError(
            f"model.path: {checkpoint.folder} does not fit model type {net.config.model_type}: {' and '.join(said)}; "
            "check that config.json belongs to these weights"
        )
    return out


def stream_weights(
    net: Any, checkpoint: Checkpoint, steps: dict[str, Any]
) -> Iterator[tuple[str, Tensor, Region | None]]:
    """(name, tensor, region) for every target, one at a time; region None: the whole tensor, else this rank's part.

    Raises UserError for a tensor of the wrong shape.
    """
    wanted = targets(net)
    for name, step in steps.items():
        if isinstance(step, str):
            found, own = checkpoint.shape(step), tuple(wanted[name].shape)
            if found != own:
                raise UserError(
                    f"model.path: {step} in {checkpoint.folder} has shape {found}; the config asks for {own}"
                )
            region = local_region(wanted[name])
            yield name, checkpoint.read(step, region), region
            continue
        for made, tensor in step.convert(name, model=net, config=net.config).items():
            whole = tensor[0] if isinstance(tensor, list) else tensor
            if whole.shape != wanted[made].shape:
                raise UserError(
                    f"model.path: {made} made from {checkpoint.folder} has shape {tuple(whole.shape)}; the config asks "
                    f"for {tuple(wanted[made].shape)}"
                )
            yield made, whole, None


def fill_from(net: Any, folder: Path) -> None:
    """Every parameter and persistent buffer of `net` from the files in `folder`, cast to its own dtype."""
    checkpoint = Checkpoint(folder)
    steps, wanted = plan(net, checkpoint), targets(net)
    for name, tensor, region in stream_weights(net, checkpoint, steps):
        put(wanted[name], tensor, region)


def init_random(module: nn.Module, seed: int, *, std: float = 0.02, residual_layers: int = 0) -> None:
    """Fresh values: norms 1, biases 0, everything else normal. Keyed by seed and name: the same on every layout.

    `std` is the standard deviation; projections back into the residual stream (o_proj, down_proj) have it divided by
    sqrt(2 * residual_layers) where residual_layers > 0 (GPT-2's rule). A value head starts at standard deviation
    1 / (C + 1), bias 0.
    """
    for name, param in module.named_parameters():
        leaf, owner = name.rpartition(".")[2], name.rpartition(".")[0].rpartition(".")[2]
        if leaf == "bias" or param.ndim < 2:
            put(param, torch.full(param.shape, 0.0 if leaf == "bias" else 1.0))
            continue
        spread = std
        if owner in ("o_proj", "down_proj") and residual_layers:
            spread = std / (2 * residual_layers) ** 0.5
        elif owner == "value_head":
            spread = 1.0 / (param.shape[-1] + 1)
        put(param, torch.randn(param.shape, generator=_generator(seed, name)) * spread)


def init_value_head(module: Any, seed: int) -> None:
    """Fresh values for the value head alone: the rest of a critic comes from files."""
    param, bias = module.value_head.weight, module.value_head.bias
    spread = 1.0 / (param.shape[-1] + 1)
    put(param, torch.randn(param.shape, generator=_generator(seed, "value_head.weight")) * spread)
    put(bias, torch.zeros(bias.shape))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _aliases(net: nn.Module) -> dict[str, str]:
    """Other names of tied parameters -> their first name."""
    first: dict[int, str] = {}
    out = {}
    for name, param in net.named_parameters(remove_duplicate=False):
        if id(param) in first:
            out[name] = first[id(param)]
        first.setdefault(id(param), name)
    return out


def _ignorable(net: Any, key: str) -> bool:
    """Keys that transformers ignores too, rotary buffers of old files, and the head where the model is a critic."""
    patterns = getattr(net, "_keys_to_ignore_on_load_unexpected", None) or []
    if any(re.search(pattern, key) for pattern in patterns) or key.endswith(("rotary_emb.inv_freq", ".masked_bias")):
        return True
    dropped = [name for name, module in net.named_modules() if isinstance(module, nn.Identity)]
    return any(key.startswith(f"{name}.") for name in dropped)


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
