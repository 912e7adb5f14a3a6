"""Between the bytes of the Tinker protocol and the requests and results of messages.py.

A training request is protobuf, or the JSON of releases up to 0.24, and may be compressed; every other request is JSON,
which is read here and becomes a message by its class's `parse`. Results are written as protobuf for those who ask for
it, else as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from pydantic import FailFast, Field, PlainValidator
from pydantic_core import PydanticCustomError

from skyrl.service.messages import (
    CreateModel,
    LoadWeights,
    ModelRequest,
    OptimStep,
    ProvenanceSpan,
    Result,
    SampledSequence,
    SampleResult,
    SamplingRequest,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    Tokens,
    TopK,
    TrainRequest,
    TrainResult,
    UnloadModel,
    WireDatum,
)
from skyrl.types import UserError
from skyrl.web.http import JSON, SMALL_BYTES, encode_json, read_json
from skyrl.web.message import NAME_LENGTH, TEXT_LENGTH, JsonMessage, Name, not_allowed, refused, short_repr
from skyrl.web.tensors import (
    DTYPES,
    SizeBudget,
    Tensor,
    byte_array,
    check_shape,
    csr_values,
    expand_csr,
    shaped,
    tensor_field,
)

PROTOBUF = "application/x-protobuf"
NO_LOGPROB = -99999.0  # with token 0: an empty cell of a top-k table
# Of one training request in protobuf. Two bytes make an empty datum, which takes hundreds in memory.
MAX_FIELDS, MAX_DATUMS = 1 << 20, 1 << 16
MAX_INPUTS = 64  # of one datum, and of a loss's configuration; no loss has as many
# Of enum DType and StopReason.
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
STOP, LENGTH = 0, 1
_FROM_CODE = {FLOAT32: DTYPES["float32"], INT64: DTYPES["int64"]}
_TO_CODE = {"f4": FLOAT32, "i4": INT32, "i8": INT64}
_TOKENS = np.dtype("<i4")
# Requests in JSON, by the last part of their path.
REQUESTS: dict[str, type[JsonMessage]] = {
    "create_model": CreateModel,
    "optim_step": OptimStep,
    "save_weights": SaveWeights,
    "save_weights_for_sampler": SaveWeightsForSampler,
    "save_weights_external": SaveWeightsExternal,
    "load_weights": LoadWeights,
    "unload_model": UnloadModel,
    "asample": SamplingRequest,
}


# ---- protobuf


def _described() -> Any:
    text = (Path(__file__).parent / "tinker.textproto").read_text(encoding="utf-8")
    return text_format.Parse(text, descriptor_pb2.FileDescriptorProto())


def message_classes(described: Any) -> dict[str, Any]:
    """Classes of a file's messages, by name. In a descriptor pool of its own: the client's package registers the same
    names in the default pool, and both can live in one process."""
    pool = descriptor_pool.DescriptorPool()
    # As bytes: the older pure-Python pool takes nothing else, and every runtime takes this.
    pool.AddSerializedFile(described.SerializeToString())
    found = {m.name: pool.FindMessageTypeByName(f"{described.package}.{m.name}") for m in described.message_type}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


MESSAGES = message_classes(_described())
ForwardBackwardRequest: Any = MESSAGES["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = MESSAGES["ForwardBackwardOutput"]
SampleResponse: Any = MESSAGES["SampleResponse"]
# For each message, what its fields hold: another message, numbers of some bytes each (PACKED), or neither ("").
PACKED = "packed"
_FIELDS = {
    message.name: {
        field.number: field.type_name
        or (
            PACKED
            if field.label == field.LABEL_REPEATED and field.type not in (field.TYPE_STRING, field.TYPE_BYTES)
            else ""
        )
        for field in message.field
    }
    for outer in _described().message_type
    for message in (outer, *outer.nested_type)
}


# ---- training requests


def parse_train(body: bytes, content_type: str, *, forward_only: bool = False, max_bytes: int) -> TrainRequest:
    """forward_backward and forward.

    `max_bytes` bounds what the sparse tensors expand to (together). Token ids become int64; dense inputs are read-only
    views of the message's bytes, without a copy. Raises UserError where no model_id and seq_id can be read; anything
    else that is wrong becomes the request's `problem`.
    """
    kind = (content_type or JSON).split(";")[0].strip().lower()
    if kind == JSON:
        old = ForwardJson if forward_only else ForwardBackwardJson
        return old.parse(read_json(body), budget=SizeBudget(max_bytes)).request()
    if kind != PROTOBUF:
        raise UserError(f"Content-Type {short_repr(content_type)}; allowed: {PROTOBUF}, {JSON}")
    unknown = check_fields(body) if len(body) > SMALL_BYTES else None
    try:
        message = ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise UserError("forward_backward: the body is not the protobuf message ForwardBackwardRequest") from None
    if unknown is None:  # so small that it may be built first: only what has unknown fields is read field by field
        size = message.ByteSize()
        message.DiscardUnknownFields()
        unknown = check_fields(body) if message.ByteSize() < size else ""
    return _train_request(message, unknown, forward_only=forward_only, max_bytes=max_bytes)


def check_fields(body: bytes) -> str:
    """Reads the fields of a ForwardBackwardRequest, and of the messages in it, without building any. Returns the first
    one that this server does not know and that says something, "" when there is none. Raises UserError when it has more
    fields or datums than time and memory should be given for; damage is left to the parser."""
    left, datums, unknown = MAX_FIELDS, MAX_DATUMS, ""
    places = [(0, len(body), "ForwardBackwardRequest")]
    while places:
        at, end, name = places.pop()
        known = _FIELDS.get(name, {})  # none of an enumeration's
        while at < end:
            tag, at = _varint(body, at, end)
            number, kind, start = tag >> 3, tag & 7, at
            left -= 1
            if kind == 0:
                value, at = _varint(body, at, end)
            elif kind == 2:
                value, at = _varint(body, at, end)
                start, at = at, at + value
                inside = known.get(number)
                if inside == PACKED:
                    left -= value
                elif inside:
                    places.append((start, min(at, end), inside))
                    datums -= inside == "Datum"
            elif (
                kind == 3 or kind == 4
            ):  # a group: its fields are counted like any other, or it would hide what follows
                value = 1
            elif kind == 1 or kind == 5:
                at += 8 if kind == 1 else 4
                value = any(body[start:at])
            else:
                break
            if number == 0:  # damage: there is no such field
                break
            if left < 0 or datums < 0:
                raise UserError(f"forward_backward: more than {MAX_DATUMS} datums or {MAX_FIELDS} fields; send less")
            if value and not unknown and number not in known:
                unknown = f"field {number} of {name}"
    return unknown


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = body[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    return value, at


def _number_or_text(value: Any) -> float | str:
    if isinstance(value, str):
        if 1 <= len(value) <= TEXT_LENGTH and value.isprintable():
            return value
    elif type(value) is float and value == value or type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    raise not_allowed("a number, or text")


class _Loss(JsonMessage):
    loss_fn: Name
    loss_fn_config: dict[Name, Annotated[float | str, PlainValidator(_number_or_text)]] = Field(
        {}, max_length=MAX_INPUTS
    )


def _train_request(message: Any, unknown: str, *, forward_only: bool, max_bytes: int) -> TrainRequest:
    operation = "forward" if forward_only or message.forward_only else "forward_backward"
    ModelRequest.read({"model_id": message.model_id, "seq_id": message.seq_id}, operation)
    loss, data, problem, budget = None, [], "", SizeBudget(max_bytes)
    try:
        if unknown:
            raise UserError(f"{operation} has {unknown}, which this server does not know; leave it out")
        loss = _Loss.read({"loss_fn": message.loss_fn, "loss_fn_config": _config(message)}, operation)
        for number, datum in enumerate(message.data):
            data.append(_datum(datum, f"{operation}: datum {number}", budget))
            if not len(data[-1].tokens):  # such a request is refused, so what follows need not be read
                break
    except UserError as error:
        problem = str(error)
    name, config = ("", {}) if loss is None or problem else (loss.loss_fn, loss.loss_fn_config)
    forward = operation == "forward"
    return TrainRequest(message.model_id, message.seq_id, [] if problem else data, name, config, forward, problem)


def _config(message: Any) -> dict[str, Any]:
    """The client writes numbers to both maps, and text to the newer one only."""
    found = {}
    for key, value in (message.loss_fn_config_v2 or message.loss_fn_config).items():
        if not isinstance(value, float):
            which = value.WhichOneof("value")
            value = None if which is None else getattr(value, which)
        found[key] = value
    return found


def _datum(datum: Any, place: str, budget: SizeBudget) -> WireDatum:
    parts = []
    for number, chunk in enumerate(datum.model_input):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(
                f"{place}: model_input chunk {number} is {kind or 'of no kind'}; allowed: encoded_text, the models "
                "here read tokens only"
            )
        with _named(f"{place}: model_input chunk {number}"):
            parts.append(byte_array(chunk.encoded_text.tokens, _TOKENS))
    tokens = np.concatenate(parts, dtype=np.int64) if parts else np.zeros(0, np.int64)
    inputs = {}
    if len(datum.loss_fn_inputs) > MAX_INPUTS:
        raise UserError(f"{place}: {len(datum.loss_fn_inputs)} loss_fn_inputs; allowed: at most {MAX_INPUTS}")
    for name, tensor in datum.loss_fn_inputs.items():
        if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable():
            raise UserError(f"{place}: loss_fn_inputs key {short_repr(name)}; allowed: 1 to {NAME_LENGTH} characters")
        with _named(f"{place}: {name}"):
            inputs[name] = _tensor(tensor, budget)
    return WireDatum(tokens, inputs, _spans(datum.model_input_spans), _spans(datum.loss_fn_input_spans))


def _spans(spans: Any) -> list[ProvenanceSpan]:
    found = []
    for span in spans:
        kind = span.WhichOneof("span") or "prompt_tokens"
        part = getattr(span, kind)
        found.append(ProvenanceSpan(kind == "sampled_tokens", part.sequence_id, part.offset, part.length))
    return found


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Turns what tensors.py refuses into a UserError that names the place."""
    try:
        yield
    except PydanticCustomError as error:
        raise UserError(f"{place} {error.message()}") from None


def _tensor(tensor: Any, budget: SizeBudget) -> np.ndarray:
    dtype = _FROM_CODE.get(tensor.dtype)
    if dtype is None:
        raise refused(f"has dtype {tensor.dtype}; allowed: 1 (float32), 2 (int64)")
    if len(tensor.shape) > 2:
        raise refused(f"has {len(tensor.shape)} dimensions; allowed: one or two")
    shape = check_shape(list(tensor.shape)) if tensor.shape else None
    kind = tensor.WhichOneof("encoding")
    if kind == "dense":
        values = byte_array(tensor.dense, dtype)
        return values if shape is None else shaped(values, shape)
    if kind is None or shape is None:
        raise refused(f"has no {'values' if kind is None else 'shape, which a sparse tensor needs'}")
    csr = tensor.sparse_csr
    crow, col = (byte_array(part, DTYPES["int64"]) for part in (csr.crow_indices, csr.col_indices))
    return expand_csr(byte_array(csr.values, dtype), crow, col, shape, 0, budget)


class _JsonDatum(JsonMessage):
    model_input: Tokens
    loss_fn_inputs: dict[Name, Annotated[Tensor, tensor_field(0)]] = Field({}, max_length=MAX_INPUTS)
    # Where the tokens came from: clients whose losses need it write protobuf.
    model_input_spans: Any = None
    loss_fn_input_spans: Any = None


class _JsonData(_Loss):
    data: Annotated[list[_JsonDatum], FailFast()]

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        config = value.get("loss_fn_config")
        if isinstance(config, dict):
            value = {**value, "loss_fn_config": {key: item for key, item in config.items() if item is not None}}
        return super().prepare(value)


class ForwardBackwardJson(ModelRequest, operation="forward_backward"):
    """forward_backward of releases up to 0.24."""

    identity = ModelRequest
    blank = {"given": None}

    given: _JsonData | None = Field(alias="forward_backward_input")
    problem: str = Field("", exclude=True)

    def request(self) -> TrainRequest:
        """The same as what protobuf bodies become."""
        forward = self.operation == "forward"
        if self.given is None:
            return TrainRequest(self.model_id, self.seq_id, [], "", {}, forward, self.problem)
        data = [
            WireDatum(row.model_input, {name: one.values for name, one in row.loss_fn_inputs.items()})
            for row in self.given.data
        ]
        return TrainRequest(self.model_id, self.seq_id, data, self.given.loss_fn, self.given.loss_fn_config, forward)


class ForwardJson(ForwardBackwardJson, operation="forward"):
    """forward of releases up to 0.24."""

    given: _JsonData | None = Field(alias="forward_input")


# ---- results


def encode_result(result: Result, accept: str) -> tuple[bytes, str]:
    """(body, content type) of a finished request. A dict is always JSON; a training or sampling result is protobuf
    where `accept` names it. Raises ValueError for a result that breaks its own contract: a fault of the server."""
    if isinstance(result, dict):
        if "error" in result:
            raise ValueError("a result with the key 'error' reads as a failure")
        return encode_json(result), JSON
    binary = PROTOBUF in accept.lower()
    if isinstance(result, TrainResult):
        return (_train_proto(result), PROTOBUF) if binary else (encode_json(_train_json(result)), JSON)
    _check(result)
    return (_sample_proto(result), PROTOBUF) if binary else (encode_json(_sample_json(result)), JSON)


def _floats(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype="<f4")


def _ids(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype="<i4")


def _train_proto(result: TrainResult) -> bytes:
    out = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for name, value in result.metrics.items():
        out.metrics[name] = float(value)
    arrays = [_floats(one) for one in result.logprobs]
    start = 0
    while start < len(arrays):
        stop, trailing = start, arrays[start].shape[1:]
        while stop < len(arrays) and arrays[stop].shape[1:] == trailing:
            stop += 1
        run = arrays[start:stop]
        # num_datums has to be set: the client's weights for ":mean" metrics count it.
        record = out.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(run))
        field = record.fields["logprobs"]
        field.data = b"".join(one.tobytes() for one in run)
        field.offsets = np.cumsum([0, *(one.nbytes for one in run)], dtype="<i8").tobytes()
        field.dtype = FLOAT32
        field.trailing_shape.extend(trailing)
        start = stop
    return out.SerializeToString()


def _train_json(result: TrainResult) -> dict[str, Any]:
    outputs = [{"logprobs": _tensor_json(_floats(one), None)} for one in result.logprobs]
    return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": dict(result.metrics)}


def _check(result: SampleResult) -> None:
    for number, one in enumerate(result.sequences):
        lengths = {len(one.tokens), len(one.logprobs), len(one.tokens if one.topk is None else one.topk.token_ids)}
        if len(lengths) > 1:
            raise ValueError(f"sequence {number}: tokens, logprobs and top-k rows differ in number: {sorted(lengths)}")
    for table in (result.topk_prompt, *(one.topk for one in result.sequences)):
        if table is not None and (table.token_ids.ndim != 2 or table.token_ids.shape != table.logprobs.shape):
            raise ValueError(f"top-k ids {table.token_ids.shape} and logprobs {table.logprobs.shape} differ")
    if (result.alt_tokens is None) != (result.alt_logprobs is None):
        raise ValueError("alternative tokens and their logprobs belong together")


def _sample_proto(result: SampleResult) -> bytes:
    out = SampleResponse(prompt_cache_hit_tokens=result.cache_hit_tokens)
    for one in result.sequences:
        # The client takes zero bytes of logprobs for "none": a sequence without a token has none there.
        sequence = out.sequences.add(
            stop_reason=STOP if one.stop_reason == "stop" else LENGTH,
            tokens=_ids(one.tokens).tobytes(),
            logprobs=_floats(one.logprobs).tobytes(),
        )
        if one.topk is not None:
            _set_topk(sequence.topk_sampled_logprobs, one.topk)
    if result.prompt_logprobs is not None:
        out.prompt_logprobs = _floats(result.prompt_logprobs).tobytes()
    if result.topk_prompt is not None:
        _set_topk(out.topk_prompt_logprobs, result.topk_prompt)
    if result.targets is not None:
        _set_tensor(out.target_prompt_logprobs, _floats(result.targets), result.targets_csr)
    if result.alt_tokens is not None and result.alt_logprobs is not None:
        _set_tensor(out.prompt_alt_tokens.tokens, _ids(result.alt_tokens), None)
        _set_tensor(out.prompt_alt_tokens.logprobs, _floats(result.alt_logprobs), None)
    return out.SerializeToString()


def _set_topk(message: Any, table: TopK) -> None:
    message.token_ids = _ids(table.token_ids).tobytes()
    message.logprobs = _floats(table.logprobs).tobytes()
    message.length, message.k = table.token_ids.shape


def _set_tensor(message: Any, values: np.ndarray, csr: tuple[np.ndarray, np.ndarray] | None) -> None:
    message.dtype = _TO_CODE[values.dtype.str[1:]]
    message.shape.extend(values.shape)
    if csr is None:
        message.dense = values.tobytes()
        return
    message.sparse_csr.values = csr_values(values, csr).tobytes()
    message.sparse_csr.crow_indices, message.sparse_csr.col_indices = (
        np.ascontiguousarray(part, dtype="<i8").tobytes() for part in csr
    )


def _tensor_json(values: np.ndarray, csr: tuple[np.ndarray, np.ndarray] | None) -> dict[str, Any]:
    """{"data", "dtype", "shape"}; integers are int64 in JSON, which knows only that width."""
    found: dict[str, Any] = {"dtype": "float32" if values.dtype.kind == "f" else "int64", "shape": list(values.shape)}
    if csr is None:
        return {"data": values.ravel().tolist(), **found}
    crow, col = (part.tolist() for part in csr)
    data = csr_values(values, csr).tolist()
    return {"data": data, **found, "sparse_crow_indices": crow, "sparse_col_indices": col}


def _sample_json(result: SampleResult) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence_json(one) for one in result.sequences],
        "prompt_cache_hit_tokens": result.cache_hit_tokens,
    }
    if result.prompt_logprobs is not None:
        values = _floats(result.prompt_logprobs)
        found["prompt_logprobs"] = [
            None if missing else value for value, missing in zip(values.tolist(), np.isnan(values), strict=True)
        ]
    if result.topk_prompt is not None:
        found["topk_prompt_logprobs"] = topk_rows(result.topk_prompt)
    if result.targets is not None:
        found["target_prompt_logprobs"] = _tensor_json(_floats(result.targets), result.targets_csr)
    if result.alt_tokens is not None and result.alt_logprobs is not None:
        found["prompt_alt_tokens"] = {
            "tokens": _tensor_json(_ids(result.alt_tokens), None),
            "logprobs": _tensor_json(_floats(result.alt_logprobs), None),
        }
    return found


def _sequence_json(one: SampledSequence) -> dict[str, Any]:
    found: dict[str, Any] = {
        "stop_reason": one.stop_reason,
        "tokens": np.asarray(one.tokens).tolist(),
        "logprobs": _floats(one.logprobs).tolist(),
    }
    if one.topk is not None:
        found["topk_logprobs"] = topk_rows(one.topk)
    return found


def topk_rows(table: TopK) -> list[list[tuple[int, float]] | None]:
    """Per position the (token, logprob) pairs that are there, None where there is none."""
    rows = []
    for ids, logprobs in zip(table.token_ids.tolist(), _floats(table.logprobs).tolist(), strict=True):
        cells = [
            (token, value) for token, value in zip(ids, logprobs, strict=True) if (token, value) != (0, NO_LOGPROB)
        ]
        rows.append(cells or None)
    return rows
