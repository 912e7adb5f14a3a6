"""The tensors in the files of a folder in Hugging Face format, by name."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skyrl.hub.quantised import block_of, dequantise, quantised_names, whole_shape
from skyrl.types import UserError, few

Region = tuple[slice, ...]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
INDEX_END = ".index.json"


class Checkpoint:
    """The tensors of a folder in Hugging Face format, by their names in the files; opens files when they are read.

    The files are those that transformers takes: one safetensors file, else an index with its shards, else the same as
    .bin; or the one that `named` is (config.json's `transformers_weights`). All tensors of a file count, whether an
    index names them or not. `files`: name -> file; `again`: (name, file) of those that a further file holds as well.
    Weights in 4 or 8 bits (hub.quantised) are there under their own names, dequantised when they are read.
    """

    def __init__(self, folder: Path, named: str | None = None) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None
        there = [name for name in (SINGLE, INDEX, BIN, BIN_INDEX) if (folder / name).is_file()]
        if named:
            if not named.endswith((".safetensors", f".safetensors{INDEX_END}")) or not (folder / named).is_file():
                raise UserError(
                    f"model.path: config.json in {folder} says transformers_weights={named}, which is no safetensors "
                    "file or index there; take that line out, or give the file"
                )
            there = [named]
        if not there:
            raise UserError(
                f"model.path: {folder} holds no {SINGLE}, no {INDEX} and no {BIN}; other formats are not read, convert "
                "them with save_pretrained of transformers"
            )
        tensors = self._weight_map(there[0])
        shards = self._weight_map(INDEX) if there[:2] == [SINGLE, INDEX] else tensors
        if set(shards.values()) != set(tensors.values()):
            raise UserError(
                f"model.path: {folder} holds {SINGLE} and the shards of {INDEX}: transformers reads the one, vLLM the "
                "others; delete what is old"
            )
        self.files: dict[str, str] = {}
        self.again: list[tuple[str, str]] = []
        for name in sorted(set(tensors.values())):
            if not (folder / name).is_file():
                raise UserError(f"model.path: {folder} lacks {name}, which {there[0]} names; download the model again")
            for key in self._file(name).keys():
                if self.files.setdefault(key, name) != name:
                    self.again.append((key, name))
        if lost := sorted(tensors.keys() - self.files.keys() - {""}):
            raise UserError(
                f"model.path: {there[0]} in {folder} names {few(lost)}, which no file holds; download the model again"
            )
        self._where, self.quantised = self.files, quantised_names(self.files)
        self._block = block_of(folder)
        own = {name.removesuffix("weight") + "activation_scale" for name in self.quantised}
        parts = own.union(*self.quantised.values())
        self.files = {key: file for key, file in self._where.items() if key not in parts}
        self.files |= {name: self._where[codes] for name, (codes, _) in self.quantised.items()}

    def _weight_map(self, name: str) -> dict[str, str]:
        """Tensor -> file as an index says, or for a file itself "" -> file."""
        if not name.endswith(INDEX_END):
            return {"": name}
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))["weight_map"]
            if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
                raise ValueError("weight_map must name a file for each tensor")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"model.path: {self.folder / name} is no index of weights ({str(error)[:100]!r}); download it again"
            ) from error
        return found

    def _file(self, name: str) -> Any:
        """A file as safetensors opens it, or the tensors of a .bin by their names, mapped into memory."""
        if self._open is None or self._open[0] != name:
            file = str(self.folder / name)
            try:
                if name.endswith(".bin"):
                    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
                    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                        raise UnpicklingError("it is no mapping of names to tensors alone")
                    self._open = (name, tensors)
                else:
                    self._open = (name, safe_open(file, framework="pt"))
            except (SafetensorError, OSError, RuntimeError, UnpicklingError, EOFError) as error:
                raise UserError(f"model.path: {file} cannot be read ({reason_of(error)}); download it again") from error
        return self._open[1]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor called `key`."""
        if pair := self.quantised.get(key):
            return whole_shape(*(self._shape(one) for one in pair))
        return self._shape(key)

    def _shape(self, key: str) -> tuple[int, ...]:
        file = self._file(self._where[key])
        return tuple(file[key].shape if isinstance(file, dict) else file.get_slice(key).get_shape())

    def read(self, key: str, region: Region | None = None, *, file: str = "") -> Tensor:
        """The tensor called `key` on the CPU in its own dtype, or a part of it; a part reads only that part. `file`: of
        several that hold it."""
        if pair := self.quantised.get(key):
            # FSDP's parts are along the first dimension, that of experts; of a matrix all is read, since blocks are cut
            first = region[:1] if region and len(region) > 2 else None
            try:
                codes, scales = (self._read(one, first) for one in pair)
                whole = dequantise(codes, scales, self._block)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"model.path: {pair[1]} in {self.folder} does not fit {pair[0]}: {error}") from error
            rest = (slice(None), *region[1:]) if region and first else region or ...
            return whole[rest]
        found = self._read(key, region, file)
        if found.dtype.itemsize == 1 and found.dtype != torch.bool:
            raise UserError(
                f"model.path: {key} in {self.folder} is {str(found.dtype)[6:]} without the factors that belong to it; "
                "download the model again, or give the model that it was made from"
            )
        return found

    def _read(self, key: str, region: Region | None, file: str = "") -> Tensor:
        opened = self._file(file or self._where[key])
        if isinstance(opened, dict):
            return opened[key][region or ...]
        return opened.get_slice(key)[region] if region else opened.get_tensor(key)


def kept_in_float32(net: Any, dtype: torch.dtype) -> frozenset[str]:
    """The parameters of a transformers model that it has in float32 where the rest is `dtype`: those that the family
    declares (_keep_in_fp32_modules_strict: routers of ERNIE 4.5, say), and those that it makes so (A_log of OLMo
    Hybrid)."""
    if dtype != torch.bfloat16:
        return frozenset()
    with init_empty_weights(include_buffers=False):
        probe = type(net)._from_config(copy.deepcopy(net.config), dtype=dtype)
    declared = [glob.replace("*", ".*") for glob in net._keep_in_fp32_modules_strict or ()]
    own = {name for name, p in probe.named_parameters() if p.dtype == torch.float32}
    return frozenset(n for n, _ in net.named_parameters() if n in own or any(re.search(one, n) for one in declared))


def reason_of(error: BaseException) -> str:
    """The first line of an error's text, or its class where that says nothing."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip().partition("\n")[0][:200]
    return text if " " in text else f"{type(error).__name__} {text}".strip()
