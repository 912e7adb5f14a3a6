"""Reading what a client sent, one checked field at a time. Everything wrong is a UserError of one line that names the
field; nothing here raises anything else, whatever the bytes are.

A field that is null counts as absent, as the client leaves nulls out.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np

from skyrl.types import UserError

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
NAME_LENGTH = 64  # of a loss input or config key: longer ones are no names
TEXT_LENGTH = 4096
METADATA_LENGTH = 1 << 18  # of all names and values of one map, which are kept on the disk and listed
_MISSING = object()

# Raw arrays on the wire are little-endian.
DTYPES = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
assert sys.byteorder == "little", "skyrl.service hands the wire's arrays on without swapping bytes"


def shown(value: Any) -> str:
    """A value as an error shows it: one line, at most about 60 characters, and no work on huge values."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    if isinstance(value, int) and abs(value) > INT64_MAX:
        return "an integer beyond 64 bits"  # printing one of thousands of digits is slow, and Python refuses it
    text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(body: bytes, *, max_bytes: int) -> Any:
    """The JSON value of a body. NaN and Infinity are read, as old clients write them: config fields refuse them, data
    passes them on to where data is checked. Raises UserError for bytes that are no JSON or too many."""
    if len(body) > max_bytes:
        raise UserError(f"body: {len(body)} bytes, at most {max_bytes} may be; send smaller parts")
    try:
        return json.loads(body)
    except RecursionError:
        raise UserError("body: JSON nested too deeply") from None
    except ValueError as error:  # also wrong UTF-8, and integers of more digits than Python reads
        raise UserError(f"body: not JSON: {shown(str(error))}") from None


class Fields:
    """A JSON object, read field by field. `end` refuses the fields that nobody read.

    `name` stands before the field in every error, as in "optim_step: adam_params.beta1='x'; allowed: ...".
    """

    def __init__(self, value: Any, name: str, *, inside: str = "") -> None:
        if not isinstance(value, dict):
            raise UserError(f"{name}{': ' if inside else ''}{inside} is {shown(value)}; allowed: a JSON object")
        self._left = {key: item for key, item in value.items() if item is not None}
        self._name, self._inside = name, inside

    def place(self, field: str) -> str:
        """A field as errors name it."""
        return f"{self._name}: {self._inside}{'.' if self._inside else ''}{field}"

    def __contains__(self, field: str) -> bool:
        return field in self._left

    def take(self, field: str, default: Any = _MISSING) -> Any:
        """The value of a field, unchecked. Raises UserError when it is absent and has no default."""
        value = self._left.pop(field, default)
        if value is _MISSING:
            raise UserError(f"{self.place(field)} is missing")
        return value

    def constant(self, field: str, *allowed: str) -> None:
        """Accepts a field that always has the same value, or its absence."""
        value = self.take(field, allowed[0])
        if value not in allowed:
            raise UserError(f"{self.place(field)}={shown(value)}; allowed: {' or '.join(map(repr, allowed))}")

    def text(self, field: str, default: Any = _MISSING, *, length: int = TEXT_LENGTH, empty: bool = False) -> Any:
        """A string without control characters. `default` where absent."""
        value = self.take(field, default)
        if value is default:
            return value
        return check_text(value, self.place(field), length=length, empty=empty)

    def integer(self, field: str, low: int, high: int, default: Any = _MISSING) -> Any:
        """An integer in low..high. `default` where absent."""
        value = self.take(field, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{self.place(field)}={shown(value)}; allowed: an integer, {low} to {high}")
        return value

    def number(self, field: str, default: Any = _MISSING) -> Any:
        """A finite number. Its range is checked where it is used."""
        value = self.take(field, default)
        return value if value is default else check_number(value, self.place(field))

    def flag(self, field: str, default: Any = _MISSING) -> Any:
        """true or false."""
        value = self.take(field, default)
        if value is not default and type(value) is not bool:
            raise UserError(f"{self.place(field)}={shown(value)}; allowed: true or false")
        return value

    def items(self, field: str, default: Any = _MISSING) -> Any:
        """A list."""
        value = self.take(field, default)
        if value is not default and not isinstance(value, list):
            raise UserError(f"{self.place(field)}={shown(value)}; allowed: a list")
        return value

    def section(self, field: str) -> Fields | None:
        """An object inside this one, None where absent."""
        value = self.take(field, None)
        inside = f"{self._inside}{'.' if self._inside else ''}{field}"
        return None if value is None else Fields(value, self._name, inside=inside)

    def strings(self, field: str) -> dict[str, str]:
        """A map of strings, {} where absent."""
        value = self.take(field, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.place(field)}={shown(value)}; allowed: a map of strings")
        found = {}
        for key, item in value.items():
            check_text(key, self.place(field) + " key", length=TEXT_LENGTH)
            place = f"{self.place(field)}[{shown(key)}]"
            found[key] = check_text(item, place, length=1 << 16, empty=True, controls=True)
        check_metadata(found, self.place(field))
        return found

    def end(self) -> None:
        """Raises UserError for the fields that are not known here, so that none is ignored in silence."""
        if self._left:
            names = ", ".join(shown(key) for key in sorted(self._left)[:5])
            where = f"{self._name}{': ' if self._inside else ''}{self._inside}"
            raise UserError(f"{where} has fields that this server does not know: {names}; leave them out")


def check_metadata(found: dict[str, str], place: str) -> None:
    """Raises UserError for a map of more text than should be kept."""
    size = sum(len(key) + len(value) for key, value in found.items())
    if size > METADATA_LENGTH:
        raise UserError(f"{place} has {size} characters in all; allowed: at most {METADATA_LENGTH}")


def check_text(value: Any, place: str, *, length: int, empty: bool = False, controls: bool = False) -> str:
    """A string that can be stored and printed."""
    if not isinstance(value, str) or len(value) > length or not (value or empty):
        raise UserError(f"{place}={shown(value)}; allowed: a string of {0 if empty else 1} to {length} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}={shown(value)}; allowed: text that is valid Unicode") from None
    if not controls and not value.isprintable():
        raise UserError(f"{place}={shown(value)}; allowed: text without control characters")
    return value


def check_number(value: Any, place: str) -> float:
    """A finite float."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UserError(f"{place}={shown(value)}; allowed: a finite number")
    return found


def list_array(values: Any, dtype: str, place: str) -> np.ndarray:
    """A JSON list of numbers as an array [n] of float32 or int64."""
    if not isinstance(values, list):
        raise UserError(f"{place} is {shown(values)}; allowed: a flat list of numbers")
    kinds = set(map(type, values))
    if not kinds <= ({int} if dtype == "int64" else {int, float}):
        wrong = ", ".join(sorted(kind.__name__.replace("NoneType", "null") for kind in kinds))
        raise UserError(f"{place} holds {wrong}; allowed for {dtype}: {'integers' if dtype == 'int64' else 'numbers'}")
    try:
        with np.errstate(over="ignore"):  # 1e39 is inf in float32; data is checked for that where it is used
            return np.array(values, dtype=np.float64 if dtype == "float32" else np.int64).astype(DTYPES[dtype])
    except OverflowError:
        raise UserError(f"{place} holds an integer beyond 64 bits") from None


def byte_array(data: bytes, dtype: np.dtype, place: str) -> np.ndarray:
    """Raw bytes as an array [n]: a read-only view, nothing is copied."""
    if len(data) % dtype.itemsize:
        raise UserError(f"{place}: {len(data)} bytes are no whole number of {dtype.name}; the array is cut off")
    return np.frombuffer(data, dtype)


class Room:
    """What the sparse tensors of one request may take when they are expanded, in bytes, together."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def spend(self, size: int, place: str) -> None:
        """Raises UserError when the request's tensors would take more than they may."""
        if size > self._left:
            raise UserError(f"{place}: dense it takes {size} bytes; a request's sparse tensors may take {self._size}")
        self._left -= size


def check_shape(shape: Any, place: str) -> tuple[int, ...]:
    """One or two dimensions that could be an array's."""
    if not isinstance(shape, (list, tuple)) or not 1 <= len(shape) <= 2:
        raise UserError(f"{place}: shape {shown(shape)}; allowed: one or two dimensions")
    if any(type(size) is not int or not 0 <= size <= INT32_MAX for size in shape):
        raise UserError(f"{place}: shape {shown(str(list(shape)))}; allowed: sizes of 0 to {INT32_MAX}")
    return tuple(shape)


def shaped(values: np.ndarray, shape: tuple[int, ...], place: str) -> np.ndarray:
    """values [n] as an array of the shape."""
    if math.prod(shape) != len(values):
        raise UserError(f"{place}: shape {list(shape)} needs {math.prod(shape)} values, there are {len(values)}")
    return values.reshape(shape)


def check_csr(values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: tuple[int, ...], place: str) -> np.ndarray:
    """The row of each value of a CSR matrix [n] int64. Raises UserError unless row borders [rows + 1] rise from 0 to
    n and columns rise within each row and are in range."""
    if len(shape) != 2:
        raise UserError(f"{place}: shape {list(shape)}; a sparse tensor needs two dimensions")
    rows, columns = shape
    if len(col) != len(values):
        raise UserError(f"{place}: {len(values)} values and {len(col)} column indices; they have to be as many")
    if len(crow) != rows + 1:
        raise UserError(f"{place}: {len(crow)} row borders for {rows} rows; there have to be {rows + 1}")
    if crow[0] != 0 or crow[-1] != len(values) or (crow[1:] < crow[:-1]).any():
        raise UserError(f"{place}: row borders have to rise from 0 to {len(values)}, the number of values")
    if len(col) and (col.min() < 0 or col.max() >= columns):
        raise UserError(f"{place}: column {col.min() if col.min() < 0 else col.max()} is outside 0..{columns - 1}")
    row_of = np.repeat(np.arange(rows), np.diff(crow))
    if (col[1:] <= col[:-1])[row_of[1:] == row_of[:-1]].any():
        raise UserError(f"{place}: columns have to rise within a row, each at most once")
    return row_of


def expand_csr(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: tuple[int, ...], fill: int, place: str, room: Room
) -> np.ndarray:
    """A CSR matrix as a dense array of `shape`; cells that it does not name hold `fill`."""
    row_of = check_csr(values, crow, col, shape, place)
    room.spend(math.prod(shape) * values.dtype.itemsize, place)
    dense = np.full(shape, fill, values.dtype)
    dense[row_of, col] = values
    return dense
