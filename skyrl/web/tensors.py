"""Arrays as clients write them in JSON and protobuf: flat lists or bytes, with a shape, dense or sparse (CSR).

Everything wrong raises ValueError in the form that skyrl.web.message makes one line of, the field's name before it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from skyrl.web.message import INT32_MAX, JsonMessage, refused, short_repr

DEFAULT_BYTES = 1 << 28  # of a request's sparse tensors when they are expanded, where nobody says another bound
LISTED = 1 << 16  # numbers of a JSON list that are read at a time
# Raw arrays on the wire are little-endian.
DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
assert sys.byteorder == "little", "skyrl.service hands the wire's arrays on without swapping bytes"


@dataclass(frozen=True)
class Tensor:
    """A tensor, dense, and (crow, col) where it came sparse."""

    values: np.ndarray
    csr: tuple[np.ndarray, np.ndarray] | None = None


class SizeBudget:
    """What the sparse tensors of one request may take when they are expanded, in bytes, together. A few bytes could
    otherwise ask for all memory."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def spend(self, size: int) -> None:
        """Raises ValueError when the request's tensors would take more than they may."""
        if size > self._left:
            raise refused(f"dense takes {size} bytes; a request's sparse tensors may take {self._size}")
        self._left -= size


def list_array(values: Any, dtype: str) -> np.ndarray:
    """A JSON list of numbers as an array [n] of float32 or int64. The numbers are not validated one by one: this is the
    way of prompts of many thousand tokens, and numpy is twenty times faster at it."""
    if not isinstance(values, list):
        raise refused(f"is {short_repr(values)}; allowed: a flat list of numbers")
    found = np.empty(len(values), DTYPES[dtype])
    for start in range(0, len(values), LISTED):  # others have their turn between two parts
        part = values[start : start + LISTED]
        kinds = set(map(type, part))
        if not kinds <= ({int} if dtype == "int64" else {int, float}):
            wrong = ", ".join(sorted(kind.__name__.replace("NoneType", "null") for kind in kinds))
            raise refused(f"holds {wrong}; allowed for {dtype}: {'integers' if dtype == 'int64' else 'numbers'}")
        try:
            with np.errstate(over="ignore"):  # 1e39 is inf in float32; data is checked for that where it is used
                found[start : start + LISTED] = np.array(part, np.float64 if dtype == "float32" else np.int64)
        except OverflowError:
            raise refused("holds an integer beyond 64 bits") from None
    return found


def byte_array(data: bytes, dtype: np.dtype) -> np.ndarray:
    """Raw bytes as an array [n]: a read-only view, nothing is copied."""
    if len(data) % dtype.itemsize:
        raise refused(f"has {len(data)} bytes, which are no whole number of {dtype.name}; the array is cut off")
    return np.frombuffer(data, dtype)


def check_shape(shape: Any) -> tuple[int, ...]:
    """One or two dimensions that could be an array's."""
    if not isinstance(shape, (list, tuple)) or not 1 <= len(shape) <= 2:
        raise refused(f"has shape {short_repr(shape)}; allowed: one or two dimensions")
    if any(type(size) is not int or not 0 <= size <= INT32_MAX for size in shape):
        raise refused(f"has shape {short_repr(str(list(shape)))}; allowed: sizes of 0 to {INT32_MAX}")
    return tuple(shape)


def shaped(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """values [n] as an array of the shape."""
    if math.prod(shape) != len(values):
        raise refused(f"has shape {list(shape)}, which needs {math.prod(shape)} values; there are {len(values)}")
    return values.reshape(shape)


def expand_csr(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: tuple[int, ...], fill: int, budget: SizeBudget
) -> np.ndarray:
    """A CSR matrix as a dense array of `shape`; cells that it does not name hold `fill`. Row borders `crow` [rows + 1]
    have to rise from 0 to the number of values, and columns have to rise within each row and be in range."""
    if len(shape) != 2:
        raise refused(f"has shape {list(shape)}; a sparse tensor needs two dimensions")
    rows, columns = shape
    if len(col) != len(values):
        raise refused(f"has {len(values)} values and {len(col)} column indices; they have to be as many")
    if len(crow) != rows + 1:
        raise refused(f"has {len(crow)} row borders for {rows} rows; there have to be {rows + 1}")
    if crow[0] != 0 or crow[-1] != len(values) or (crow[1:] < crow[:-1]).any():
        raise refused(f"needs row borders that rise from 0 to {len(values)}, the number of values")
    if len(col) and (col.min() < 0 or col.max() >= columns):
        raise refused(f"names column {col.min() if col.min() < 0 else col.max()}, outside 0..{columns - 1}")
    row_of = np.repeat(np.arange(rows), np.diff(crow))
    if (col[1:] <= col[:-1])[row_of[1:] == row_of[:-1]].any():
        raise refused("needs columns that rise within a row, each at most once")
    budget.spend(math.prod(shape) * values.dtype.itemsize)
    dense = np.full(shape, fill, values.dtype)
    dense[row_of, col] = values
    return dense


def csr_values(values: np.ndarray, csr: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The cells that a layout (crow, col) names, in its order."""
    crow, col = csr
    return values[np.repeat(np.arange(len(crow) - 1), np.diff(crow)), col]


class _JsonTensor(JsonMessage):
    dtype: Literal["float32", "int64"]
    data: Any
    shape: Any = None
    sparse_crow_indices: Any = None
    sparse_col_indices: Any = None

    def tensor(self, fill: int, budget: SizeBudget) -> Tensor:
        values = list_array(self.data, self.dtype)
        if self.sparse_crow_indices is None and self.sparse_col_indices is None:
            return Tensor(shaped(values, (len(values),) if self.shape is None else check_shape(self.shape)))
        crow, col = list_array(self.sparse_crow_indices, "int64"), list_array(self.sparse_col_indices, "int64")
        return Tensor(expand_csr(values, crow, col, check_shape(self.shape), fill, budget), (crow, col))


def tensor_field(fill: int) -> GetPydanticSchema:
    """For Annotated[Tensor, tensor_field(...)]: a field that is read from a JSON tensor. Cells that a sparse one does
    not name hold `fill`; the SizeBudget is the context's "budget"."""

    def read(value: Any, read_json: Any, info: core_schema.ValidationInfo) -> Tensor:
        if isinstance(value, Tensor):  # made here, not by a client
            return value
        return read_json(value).tensor(fill, (info.context or {}).get("budget") or SizeBudget(DEFAULT_BYTES))

    return GetPydanticSchema(
        lambda _, handler: core_schema.with_info_wrap_validator_function(read, handler(_JsonTensor))
    )
