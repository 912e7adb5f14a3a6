"""Decoder layers compiled one by one (model.compile=true), as torchtitan compiles its blocks.

All layers are one program with other weights: it is compiled once, in seconds, and sharding and recomputation, which
work by layers too, stay as they are. Attention stays outside: its rows change in number and length with every
micro-batch. Only training and scoring go through compiled layers; sampling has kernels and graphs of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from skyrl.kernels import exact_ops
from skyrl.models import attention

_inside = False  # whether the forward pass that runs now is one of `using`


def compile_layers(layers: list[nn.Module]) -> None:
    """Makes these compute by compiled code inside of `using`. Before they are recomputed, sharded or hooked."""
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.forward))
    for layer in layers:
        exact_ops.replace_forward(layer, _forward)


@contextmanager
def using(on: bool) -> Iterator[None]:
    """Inside, layers of `compile_layers` are the compiled ones. `on` False: as they were, also inside of another."""
    global _inside
    before, _inside = _inside, on
    try:
        yield
    finally:
        _inside = before


def is_used() -> bool:
    """Whether `using` is on: a layer that is recomputed later has to be recomputed the same way."""
    return _inside


def _forward(layer: nn.Module, plain: Any, *args: Any, **kwargs: Any) -> Any:
    return _compiled(plain.func)(layer, *args, **kwargs) if _inside else plain(*args, **kwargs)


@cache
def _compiled(forward: Any) -> Any:
    """Sizes are symbols from the start: every micro-batch has its own number of tokens. All families have one forward,
    which is compiled for each kind of layer, with a gradient and without: more than the 8 times that torch allows."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(forward, dynamic=True)
