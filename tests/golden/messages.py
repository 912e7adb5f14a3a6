"""Protobuf as the Tinker protocol uses it, written and read without generated code and without skyrl.

`message` writes requests; `decode` reads answers and refuses a field that the protocol does not have. Tensors become
lists of numbers, so that answers can be compared to a tolerance where bits may differ.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

FLOAT32, INT64 = 1, 2  # of the protocol's DType
_NUMPY = {1: "f", 2: "q", 3: "i"}
_BYTES = {"f": 4, "q": 8, "i": 4}


# ---- writing


def message(*fields: tuple[int, Any]) -> bytes:
    """The fields in order: bytes and text with their length, bool and int as varints, float as a double."""
    out = b""
    for number, value in fields:
        if isinstance(value, (bytes, str)):
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
        elif isinstance(value, float):
            out += _varint(number << 3 | 1) + struct.pack("<d", value)
        else:
            out += _varint(number << 3) + _varint(int(value))
    return out


def train_request(
    model_id: str, seq_id: int, data: Sequence[bytes], loss: str, *, config: dict[str, float | str] | None = None,
    forward_only: bool = False,
) -> bytes:  # fmt: skip
    """A ForwardBackwardRequest. `data` comes from `datum`."""
    entries = []
    for key, value in (config or {}).items():
        held = message((2, value)) if isinstance(value, str) else message((1, float(value)))
        entries.append((7, message((1, key), (2, held))))
    only = [(6, True)] if forward_only else []
    return message((1, model_id), (2, seq_id), *((3, one) for one in data), (4, loss), *only, *entries)


def datum(tokens: Sequence[int], **inputs: bytes) -> bytes:
    """Tokens in one chunk, and the loss's inputs, each made by `tensor` or `sparse`."""
    chunk = message((1, message((1, struct.pack(f"<{len(tokens)}i", *tokens)))))
    return message((1, chunk), *((2, message((1, name), (2, value))) for name, value in inputs.items()))


def tensor(values: Sequence[float], dtype: int) -> bytes:
    """A dense tensor of one dimension."""
    return message((1, _array(values, dtype)), (3, dtype), (4, _varint(len(values))))


def sparse(values: Sequence[float], crow: Sequence[int], col: Sequence[int], shape: Sequence[int], dtype: int) -> bytes:
    """A sparse tensor of two dimensions in CSR form."""
    csr = message((1, _array(values, dtype)), (2, _array(crow, INT64)), (3, _array(col, INT64)))
    return message((2, csr), (3, dtype), (4, b"".join(map(_varint, shape))))


def _array(values: Sequence[float], dtype: int) -> bytes:
    return struct.pack(f"<{len(values)}{_NUMPY[dtype]}", *values)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# ---- reading

# Field number -> (name, kind). A kind in [] is repeated; {"": kind} is a map from text. f, i, q: an array of floats, of
# int32, of int64; "typed": an array whose type another field tells.
_MESSAGES: dict[str, dict[int, tuple[str, Any]]] = {
    "ForwardBackwardOutput": {
        1: ("loss_fn_output_type", "text"),
        2: ("loss_fn_outputs", ["ArrayRecord"]),
        3: ("metrics", {"": "double"}),
    },
    "ArrayRecord": {1: ("type_tag", "text"), 2: ("fields", {"": "BatchedTensor"}), 3: ("num_datums", "int")},
    "BatchedTensor": {
        1: ("data", "typed"),
        2: ("offsets", "q"),
        3: ("dtype", "int"),
        4: ("trailing_shape", "ints"),
    },
    "SampleResponse": {
        1: ("sequences", ["SampledSequence"]),
        2: ("prompt_logprobs", "f"),
        3: ("topk_prompt_logprobs", "TopkLogprobs"),
        4: ("prompt_cache_hit_tokens", "int"),
        5: ("target_prompt_logprobs", "Tensor"),
        6: ("prompt_alt_tokens", "PromptAltTokens"),
    },
    "SampledSequence": {
        1: ("stop_reason", "int"),
        2: ("tokens", "i"),
        3: ("logprobs", "f"),
        4: ("topk_sampled_logprobs", "TopkLogprobs"),
    },
    "TopkLogprobs": {1: ("token_ids", "i"), 2: ("logprobs", "f"), 3: ("k", "int"), 4: ("length", "int")},
    "Tensor": {1: ("dense", "typed"), 2: ("sparse_csr", "SparseCsr"), 3: ("dtype", "int"), 4: ("shape", "ints")},
    "SparseCsr": {1: ("values", "f"), 2: ("crow_indices", "q"), 3: ("col_indices", "q")},
    "PromptAltTokens": {1: ("tokens", "Tensor"), 2: ("logprobs", "Tensor")},
}


def decode(data: bytes, name: str) -> dict[str, Any]:
    """A message of the protocol as plain values. Raises KeyError for a field that it does not have."""
    found: dict[str, Any] = {}
    for number, value in _fields(data):
        key, kind = _MESSAGES[name][number]
        if isinstance(kind, list):
            found.setdefault(key, []).append(_value(value, kind[0]))
        elif isinstance(kind, dict):
            entry = dict(_fields(value))
            found.setdefault(key, {})[entry.get(1, b"").decode()] = _value(entry.get(2), kind[""])
        elif kind == "ints":
            found.setdefault(key, []).extend([value] if isinstance(value, int) else _varints(value))
        else:
            found[key] = _value(value, kind)
    for key, kind in _MESSAGES[name].values():
        if kind == "typed" and key in found:
            found[key] = _numbers(found[key], _NUMPY[found["dtype"]])
    return found


def _value(value: Any, kind: str) -> Any:
    if kind in ("int", "typed"):
        return value or 0 if kind == "int" else value
    if kind == "text":
        return value.decode()
    if kind == "double":
        return 0.0 if value is None else struct.unpack("<d", value)[0]
    if kind in _BYTES:
        return _numbers(value, kind)
    return decode(value, kind)


def _numbers(data: bytes, kind: str) -> list[Any]:
    values = struct.unpack(f"<{len(data) // _BYTES[kind]}{kind}", data)
    return ["NaN" if value != value else value for value in values]


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _read_varint(data, at)
        yield value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 == 0:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue
        size, at = (8, at) if tag & 7 == 1 else (4, at) if tag & 7 == 5 else _read_varint(data, at)
        assert at + size <= len(data), "a field that ends after its message"
        yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
