"""A Hugging Face folder that transformers (and what builds on it) loads: safetensors, config, tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from skyrl.files import write_folder_atomic
from skyrl.models.load import build_net
from skyrl.models.weights import INDEX, SINGLE
from skyrl.types import UserError

SHARD_BYTES = 5 << 30
PREFIX = "net."


def export_model(
    state: dict[str, Tensor],
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
    more: Callable[[Path], None] = lambda part: None,
) -> None:
    """Writes `folder`, which AutoModelForCausalLM and AutoTokenizer load and which gives the same log-probabilities.

    `state`: whole weights on the CPU, named as in CausalLM ("net.model..."), tied ones once; a value head is left
    out. Written under a temporary name beside `folder`, flushed to disk, then renamed; an earlier export of that name
    is replaced. `more` is called with the folder before that, and may add files. Raises: UserError when the disk does
    not take it, with what was there before left as it was.
    """
    folder = Path(folder)
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    try:
        with write_folder_atomic(folder) as part:
            _write_weights(_original_names(weights, config), part, dtype, shard_bytes)
            _write_config(config, part, dtype)
            tokenizer.save_pretrained(part)
            more(part)
    except OSError as error:
        raise UserError(
            f"export to {folder} failed: {error.strerror or error}; free space there or choose another folder"
        ) from error


def _original_names(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Names and shapes as in the files that the family is published in (single experts instead of fused ones)."""
    from transformers.core_model_loading import revert_weight_conversion

    net = build_net(copy.deepcopy(config), torch.float32)
    return revert_weight_conversion(net, weights)


def _write_weights(weights: dict[str, Tensor], part: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, value in weights.items():
        count = value.numel() * (dtype.itemsize if value.is_floating_point() else value.element_size())
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + count, total + count
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, keys in zip(names, shards, strict=True):
        cast = {k: weights[k].to(dtype) if weights[k].is_floating_point() else weights[k] for k in keys}
        save_tensors(cast, part / file)
    if len(shards) > 1:
        weight_map = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (part / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file; tensors may share memory. Raises: OSError."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().contiguous()
        # safetensors refuses two names for one memory; whoever gives us that means two tensors
        plain[name] = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:  # how it tells what the system said
        raise OSError(str(error)) from error


def _write_config(config: Any, part: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config._attn_implementation_internal = None  # ours is not known where this is loaded
    config.dtype = dtype
    config.save_pretrained(part)
    GenerationConfig.from_model_config(config).save_pretrained(part)
