"""Between the bytes of the Tinker protocol and the types of skyrl.service.messages: the one module that others use.

`parse_train` takes a body as it came; the other parse functions take the JSON value that `read_json` made of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from skyrl.service import proto
from skyrl.service.messages import Request, TrainRequest, WireDatum
from skyrl.service.wire_encode import JSON, PROTOBUF, encode_json, encode_result
from skyrl.service.wire_fields import (
    DTYPES,
    NAME_LENGTH,
    Room,
    byte_array,
    check_shape,
    check_text,
    expand_csr,
    read_json,
    shaped,
    shown,
)
from skyrl.service.wire_json import (
    ID_LENGTH,
    config_value,
    made,
    parse_create_model,
    parse_load_weights,
    parse_optim_step,
    parse_sample,
    parse_save_weights,
    parse_save_weights_external,
    parse_save_weights_for_sampler,
    parse_train_json,
    parse_unload_model,
)
from skyrl.types import UserError

__all__ = ["JSON", "PARSERS", "PROTOBUF", "encode_json", "encode_result", "parse_create_model", "parse_load_weights",
           "parse_optim_step", "parse_sample", "parse_save_weights", "parse_save_weights_external",
           "parse_save_weights_for_sampler", "parse_train", "parse_unload_model", "read_json"]  # fmt: skip

# By the last part of the path; each takes a JSON value.
PARSERS: dict[str, Callable[[Any], Request]] = {
    "create_model": parse_create_model,
    "optim_step": parse_optim_step,
    "save_weights": parse_save_weights,
    "save_weights_for_sampler": parse_save_weights_for_sampler,
    "save_weights_external": parse_save_weights_external,
    "load_weights": parse_load_weights,
    "unload_model": parse_unload_model,
    "asample": parse_sample,
}
# Of datums, chunks and tensors together. Two bytes make an empty one, and it takes some sixty in memory.
MAX_PARTS = 1 << 18
_DTYPES = {proto.FLOAT32: DTYPES["float32"], proto.INT64: DTYPES["int64"]}
_TOKENS = np.dtype("<i4")


def parse_train(
    body: bytes, content_type: str, content_encoding: str, *, forward_only: bool = False, max_bytes: int
) -> TrainRequest:
    """forward_backward and forward: protobuf, or the JSON of old releases, either also zstd-compressed.

    `max_bytes` bounds the body, what it decompresses to, and what its sparse tensors expand to (together). Token ids
    become int64; dense inputs are read-only views of the message's bytes, without a copy. Raises UserError where no
    model_id and seq_id can be read; anything else that is wrong becomes the request's `problem`.
    """
    body = decompressed(body, content_encoding, max_bytes=max_bytes)
    kind = (content_type or JSON).split(";")[0].strip().lower()
    if kind == JSON:
        json = read_json(body, max_bytes=max_bytes)
        return parse_train_json(json, forward_only=forward_only, max_bytes=max_bytes)
    if kind != PROTOBUF:
        raise UserError(f"Content-Type {shown(content_type)}; allowed: {PROTOBUF}, {JSON}")
    _count_parts(body)
    try:
        message = proto.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise UserError("forward_backward: the body is not the protobuf message ForwardBackwardRequest") from None
    return _train_request(message, forward_only=forward_only, max_bytes=max_bytes)


def decompressed(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The body without its Content-Encoding (none, identity or zstd), at most `max_bytes` long: a frame that would
    give more is refused before or while it is expanded. Raises UserError, also for a cut-off or damaged frame."""
    encoding = (encoding or "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise UserError(f"Content-Encoding {shown(encoding)}; allowed: none, zstd")
    if len(body) > max_bytes:
        raise UserError(f"body: {len(body)} bytes, at most {max_bytes} may be; send smaller parts")
    if encoding == "identity":
        return body
    try:
        size = zstandard.frame_content_size(body)  # -1 where the frame does not say
        if size > max_bytes:
            raise UserError(f"body: {size} bytes when decompressed, at most {max_bytes} may be; send smaller parts")
        # Where the frame does not say, the buffer is max_bytes long and a longer output an error.
        found = zstandard.ZstdDecompressor().decompress(body, max_output_size=max_bytes, allow_extra_data=False)
        if size < 0:  # and then bytes behind the frame go unnoticed: once more, now that its length is known to be fine
            again = zstandard.ZstdDecompressor().decompressobj()
            again.decompress(body)
            if again.unused_data:
                raise UserError(f"body: {len(again.unused_data)} bytes follow the zstd frame; allowed: one frame")
        return found
    except zstandard.ZstdError as error:
        raise UserError(f"body: not a zstd frame of at most {max_bytes} bytes: {shown(str(error))}") from None


def _count_parts(body: bytes) -> None:
    """Raises UserError when a message has more parts than memory should be given for; damage is left to the parser."""
    left, places = MAX_PARTS, [(0, len(body), True)]
    while places:
        at, end, top = places.pop()
        while at < end:
            tag, at = _varint(body, at, end)
            if tag & 7 != 2:
                # A group's content (3 to 4) is walked like any other, or it would hide what follows it.
                at = {0: _varint(body, at, end)[1], 1: at + 8, 3: at, 4: at, 5: at + 4}.get(tag & 7, end)
                continue
            length, at = _varint(body, at, end)
            left -= 1
            if left < 0:
                raise UserError(f"forward_backward: more than {MAX_PARTS} datums, chunks and tensors; send less")
            if top and tag >> 3 == 3:  # a Datum: its chunks and tensors count too
                places.append((at, min(at + length, end), False))
            at += length


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = body[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    return value, at


def _train_request(message: Any, *, forward_only: bool, max_bytes: int) -> TrainRequest:
    operation = "forward" if forward_only or message.forward_only else "forward_backward"
    blank: dict[str, Any] = {
        "model_id": check_text(message.model_id, f"{operation}: model_id", length=ID_LENGTH),
        "seq_id": message.seq_id,
        "forward_only": operation == "forward",
        "data": [],
        "loss_fn": "",
        "loss_config": {},
    }
    if message.seq_id < 1:
        raise UserError(f"{operation}: seq_id={message.seq_id}; allowed: 1 or more")

    def read() -> dict[str, Any]:
        room = Room(max_bytes)
        return {
            "loss_fn": check_text(message.loss_fn, f"{operation}: loss_fn", length=NAME_LENGTH),
            "loss_config": _config(message, operation),
            "data": [_datum(datum, f"{operation}: datum {number}", room) for number, datum in enumerate(message.data)],
        }

    return made(TrainRequest, blank, read)


def _config(message: Any, operation: str) -> dict[str, float | str]:
    """loss_fn_config: the client writes numbers to both maps, and text to the newer one only."""
    place = f"{operation}: loss_fn_config"
    found = {}
    for key, value in (message.loss_fn_config_v2 or message.loss_fn_config).items():
        check_text(key, f"{place} key", length=NAME_LENGTH)
        if not isinstance(value, float):
            which = value.WhichOneof("value")
            value = None if which is None else getattr(value, which)
        found[key] = config_value(value, f"{place}[{shown(key)}]")
    return found


def _datum(datum: Any, place: str, room: Room) -> WireDatum:
    parts = []
    for number, chunk in enumerate(datum.model_input):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(
                f"{place}: model_input chunk {number} is {kind or 'of no kind'}; allowed: encoded_text, the models "
                "here read tokens only"
            )
        where = f"{place}: model_input chunk {number} tokens"
        parts.append(byte_array(chunk.encoded_text.tokens, _TOKENS, where))
    tokens = np.concatenate(parts, dtype=np.int64) if parts else np.zeros(0, np.int64)
    inputs = {}
    for name, tensor in datum.loss_fn_inputs.items():
        check_text(name, f"{place}: loss_fn_inputs key", length=NAME_LENGTH)
        inputs[name] = _tensor(tensor, f"{place}: {name}", room)
    return WireDatum(tokens, inputs)


def _tensor(tensor: Any, place: str, room: Room) -> np.ndarray:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UserError(f"{place}: dtype {tensor.dtype}; allowed: 1 (float32), 2 (int64)")
    if len(tensor.shape) > 2:
        raise UserError(f"{place}: {len(tensor.shape)} dimensions; allowed: one or two")
    shape = check_shape(list(tensor.shape), place) if tensor.shape else None
    kind = tensor.WhichOneof("encoding")
    if kind == "dense":
        values = byte_array(tensor.dense, dtype, place)
        return values if shape is None else shaped(values, shape, place)
    if kind is None or shape is None:
        raise UserError(f"{place}: no {'values' if kind is None else 'shape, which a sparse tensor needs'}")
    csr = tensor.sparse_csr
    values = byte_array(csr.values, dtype, f"{place} values")
    crow = byte_array(csr.crow_indices, DTYPES["int64"], f"{place} crow_indices")
    col = byte_array(csr.col_indices, DTYPES["int64"], f"{place} col_indices")
    return expand_csr(values, crow, col, shape, 0, place, room)
