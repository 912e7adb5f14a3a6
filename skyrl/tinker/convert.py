"""Between what scripts hold and what the desk takes and gives, without bytes in between. Arrays are copied on the way
in: the script may change its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skyrl.service.messages import SampleResult, SamplingRequest, TrainRequest, TrainResult, WireDatum
from skyrl.service.wire_encode import csr_values
from skyrl.service.wire_json import parse_sample
from skyrl.tinker.types import (
    ForwardBackwardOutput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
    to_tensor,
)

CHUNK_ROWS, CHUNK_BYTES = 1024, 5_000_000  # of one request: what the SDK sends, so that both compute the same sums
REDUCTIONS = {"sum": sum, "min": min, "max": max}


def tokens_of(model_input: Any, where: str) -> np.ndarray:
    """Token ids [n] int64. Raises ValueError for chunks that hold something else."""
    parts = []
    for number, chunk in enumerate(model_input.chunks):
        if getattr(chunk, "tokens", None) is None:
            kind = getattr(chunk, "type", type(chunk).__name__)
            raise ValueError(f"{where} chunk {number} is {kind}; allowed: encoded_text, the models here read tokens")
        values = np.asarray(chunk.tokens)
        if values.size and values.dtype.kind not in "iu":
            raise ValueError(f"{where} chunk {number} holds {values.dtype}; allowed: token ids")
        parts.append(values.astype(np.int64))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def wire_datum(datum: Any, number: int) -> WireDatum:
    """A row as the service takes it; cells that a sparse tensor does not list are 0. Raises ValueError."""
    inputs = {}
    for name, value in datum.loss_fn_inputs.items():
        array = np.array(to_tensor(name, value).to_numpy())
        inputs[name] = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32, copy=False)
    return WireDatum(tokens_of(datum.model_input, f"datum {number}: model_input"), inputs)


def chunks(data: Sequence[Any]) -> Iterator[list[WireDatum]]:
    """Rows in requests of the size that the SDK would send. Raises ValueError."""
    part: list[WireDatum] = []
    size = 0
    for number, datum in enumerate(data):
        row = wire_datum(datum, number)
        own = 4 * len(row.tokens) + sum(array.nbytes for array in row.inputs.values())
        if part and (size + own > CHUNK_BYTES or len(part) == CHUNK_ROWS):
            yield part
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield part


def train_request(
    model_id: str,
    seq_id: int,
    rows: list[WireDatum],
    loss: str,
    config: Mapping[str, float | str] | None,
    forward: bool,
) -> TrainRequest:
    """One request of a training call."""
    return TrainRequest(model_id, seq_id, rows, loss, dict(config or {}), forward)


def train_output(result: TrainResult) -> ForwardBackwardOutput:
    """One request's answer."""
    outputs = [{"logprobs": TensorData.from_numpy(np.ascontiguousarray(one, np.float32))} for one in result.logprobs]
    return ForwardBackwardOutput("ArrayRecord", outputs, dict(result.metrics))


def joined(parts: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """The answers of a call's requests as one. Metrics by their ending: sum, min, max, and mean by number of rows;
    those that a part lacks are left out."""
    metrics = {}
    for name in parts[0].metrics:
        values = [part.metrics[name] for part in parts if name in part.metrics]
        kind = name.rpartition(":")[2]
        if len(values) == len(parts) and kind in REDUCTIONS:
            metrics[name] = float(REDUCTIONS[kind](values))
        elif len(values) == len(parts) and kind == "mean":
            metrics[name] = float(np.average(values, weights=[len(part.loss_fn_outputs) for part in parts]))
    outputs = [one for part in parts for one in part.loss_fn_outputs]
    return ForwardBackwardOutput(parts[0].loss_fn_output_type, outputs, metrics)


def sample_query(where: Mapping[str, Any], prompt: Any, params: Any, options: Mapping[str, Any], targets: Any) -> Any:
    """A SamplingRequest. `where` names the sampling session and seq_id, `options` are the other fields of the request.

    Checked by the parser that HTTP bodies go through; arrays go around it. Raises ValueError."""
    names = ("max_tokens", "seed", "temperature", "top_k", "top_p")
    given = {name: getattr(params, name) for name in names if getattr(params, name, None) is not None}
    stop = getattr(params, "stop", None)
    if stop is not None:
        given["stop"] = stop if isinstance(stop, str) else [int(x) if isinstance(x, np.integer) else x for x in stop]
    body = {**where, **{key: value for key, value in options.items() if value is not None}}
    query = parse_sample({**body, "prompt": {"chunks": []}, "sampling_params": given})
    assert isinstance(query, SamplingRequest)
    found: dict[str, Any] = {"prompt": tokens_of(prompt, "prompt")}
    if targets is not None:
        found["targets"] = np.array(targets.to_numpy(-1), np.int64)
        if targets.sparse_crow_indices is not None:
            indices = (targets.sparse_crow_indices, targets.sparse_col_indices)
            found["targets_csr"] = tuple(np.asarray(one, np.int64) for one in indices)
    return replace(query, **found)


def sample_response(result: SampleResult, sequence_ids: Sequence[str]) -> SampleResponse:
    """The answer of a sampling request."""
    sequences = [
        SampledSequence(one.stop_reason, name, one.tokens.astype(np.int32), one.logprobs, one.topk)
        for one, name in zip(result.sequences, sequence_ids, strict=True)
    ]
    alternatives = None
    if result.alt_tokens is not None and result.alt_logprobs is not None:
        pair = TensorData.from_numpy(result.alt_tokens), TensorData.from_numpy(result.alt_logprobs)
        alternatives = PromptAltTokens(*pair)
    return SampleResponse(
        sequences=sequences,
        prompt_logprobs_np=result.prompt_logprobs,
        topk_prompt_logprobs_np=result.topk_prompt,
        target_prompt_logprobs=None if result.targets is None else _like(result.targets, result.targets_csr),
        prompt_cache_hit_tokens=result.cache_hit_tokens,
        prompt_alt_tokens=alternatives,
    )


def _like(values: np.ndarray, csr: tuple[np.ndarray, np.ndarray] | None) -> TensorData:
    if csr is None:
        return TensorData.from_numpy(values)
    crow, col = (one.tolist() for one in csr)
    return TensorData(csr_values(values, csr), "float32", values.shape, crow, col)
