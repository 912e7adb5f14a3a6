"""Weights that are published in 4 or 8 bits alone, as the numbers that their codes stand for.

MXFP4 (gpt-oss): `<name>_blocks` [..., rows, groups, 16] uint8, two codes of a sign, two bits of exponent and one of
fraction in a byte, the low one first, and `<name>_scales` [..., rows, groups] uint8, exponents of 2 above -127, for 32
numbers each; the weight is [..., 32 * groups, rows]. FP8 (DeepSeek V3): a `<name>` in float8 and `<name>_scale_inv`
[rows / 128, columns / 128], a factor for each block; `activation_scale` beside it is for products in FP8 alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantised_names(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name of a weight -> the keys of its codes and of its scales, among the keys of files."""
    there = set(keys)
    found = {key[:-7]: (key, f"{key[:-7]}_scales") for key in there if key.endswith("_blocks")}
    found |= {key[:-10]: (key[:-10], key) for key in there if key.endswith("_scale_inv")}
    return {name: pair for name, pair in found.items() if there.issuperset(pair)}


def whole_shape(codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight whose codes and scales have these shapes."""
    return (*codes[:-3], 2 * codes[-2] * codes[-1], codes[-3]) if _is_mxfp4(codes, scales) else codes


def block_of(folder: Path) -> tuple[int, int]:
    """Rows and columns that one factor of FP8 is for, as config.json says."""
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        rows, columns = given["weight_block_size"]
        return int(rows), int(columns)
    except (OSError, ValueError, KeyError, TypeError):
        return 128, 128


def dequantise(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight. MXFP4 in bfloat16, which holds each of its numbers exactly; FP8 as products in float32, as
    transformers has them before it casts, also where the last block is cut (576 rows of DeepSeek V3), which it refuses.
    Raises ValueError for scales that do not fit."""
    if _is_mxfp4(tuple(codes.shape), tuple(scales.shape)):
        values = torch.tensor([*FP4, *(-x for x in FP4)], dtype=torch.bfloat16)
        both = torch.stack([values[(codes & 15).long()], values[(codes >> 4).long()]], -1).flatten(-2)
        return torch.ldexp(both, scales.int().unsqueeze(-1) - 127).flatten(-2).transpose(-2, -1)
    if not codes.is_floating_point():
        raise ValueError(f"it is {str(codes.dtype)[6:]} and not float8")
    if scales.numel() == 1:
        return codes.float() * scales.float()
    rows, columns = codes.shape[-2:]
    if tuple(scales.shape) != (*codes.shape[:-2], -(-rows // block[0]), -(-columns // block[1])):
        raise ValueError(f"{tuple(scales.shape)} factors for {tuple(codes.shape)} numbers in blocks of {block}")
    whole = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return codes.float() * whole[..., :rows, :columns]


def _is_mxfp4(codes: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    return len(codes) > 2 and len(codes) == len(scales) + 1
