"""Results, to the bytes that clients read: protobuf for those that ask for it, else the JSON of old releases."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from skyrl.service import proto
from skyrl.service.messages import Result, SampledSequence, SampleResult, TopK, TrainResult

PROTOBUF, JSON = "application/x-protobuf", "application/json"
NO_LOGPROB = -99999.0  # with token 0: an empty cell of a top-k table
_CODES = {"f4": proto.FLOAT32, "i4": proto.INT32, "i8": proto.INT64}


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


def encode_json(value: Any) -> bytes:
    """UTF-8 JSON. Numbers that JSON cannot write become the strings "NaN", "Infinity" and "-Infinity", as protobuf's
    JSON does, and the clients' number fields read them as numbers; null would be refused there."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"), default=_plain)
    except ValueError:  # not finite
        text = json.dumps(_spelled(value), allow_nan=False, separators=(",", ":"))
    return text.encode()


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"no JSON for {type(value).__name__}")


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _spelled(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _floats(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype="<f4")


def _ids(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype="<i4")


# ---- training


def _train_proto(result: TrainResult) -> bytes:
    out = proto.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
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
        field.data = b"".join(run)
        field.offsets = np.cumsum([0, *(one.nbytes for one in run)], dtype="<i8").tobytes()
        field.dtype = proto.FLOAT32
        field.trailing_shape.extend(trailing)
        start = stop
    return out.SerializeToString()


def _train_json(result: TrainResult) -> dict[str, Any]:
    outputs = [{"logprobs": _tensor_json(_floats(one), None)} for one in result.logprobs]
    return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": dict(result.metrics)}


# ---- sampling


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
    out = proto.SampleResponse(prompt_cache_hit_tokens=result.cache_hit_tokens)
    for one in result.sequences:
        # The client takes zero bytes of logprobs for "none": a sequence without a token has none there.
        sequence = out.sequences.add(
            stop_reason=proto.STOP if one.stop_reason == "stop" else proto.LENGTH,
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


def csr_values(values: np.ndarray, csr: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The cells that a layout (crow, col) names, in its order."""
    crow, col = csr
    return values[np.repeat(np.arange(len(crow) - 1), np.diff(crow)), col]


def _set_tensor(message: Any, values: np.ndarray, csr: tuple[np.ndarray, np.ndarray] | None) -> None:
    message.dtype = _CODES[values.dtype.str[1:]]
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
