"""From what clients send to what the engine takes. Everything is checked here, before any command reaches a rank:
after that there is no recoverable error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skyrl.algorithms.declare import Loss
from skyrl.algorithms.losses import LOSSES
from skyrl.config.schema import ServiceConfig
from skyrl.config.validation import LEAST
from skyrl.rollout import draw_seed
from skyrl.service.messages import (
    OptimizerSettings,
    OptimStep,
    ProvenanceSpan,
    RecordedSequence,
    RequestFailed,
    SamplingRequest,
    ServerInfo,
    TrainRequest,
    WireDatum,
)
from skyrl.types import AdamParams, Datum, Floats, LossSpec, SamplingParams

# Of any weight, advantage or log-probability: beyond it float32 sums lose what others contribute. Not of bounds
# (thresholds, the norm that gradients are clipped to), where much, or infinity, means that nothing is clipped.
LARGEST = 1e6
# Bounds on memory, known before any command is sent: worst cases in bytes of what an answer holds. What a command needs
# beside that is bounded by the scorer's and the sampler's own budgets.
ANSWER_BYTES = 256 << 20  # of one request
FLIGHT_BYTES = 1 << 30  # of all requests that draw or are scored; more wait for their turn
SCORE_TOKENS, SCORE_BYTES = 65536, 256 << 20  # of one scoring command on each rank
STOP_CHARACTERS = 4096  # of all stop strings of a request: each is looked for after each token
WIDE_TARGETS = 1 << 23  # targets of a row in all, and of a micro-batch that is as wide as its widest row
CELL = 8  # bytes of a token with its log-probability in a table
NOT_PUBLIC = {
    "stable_reinforce": "its mathematics are not public; use importance_sampling, ppo, cispo, dro or gspo (a recipe of "
    "the cookbook: loss_fn=cispo), or have the server started with 'service.loss_substitutes={stable_reinforce: ppo}'",
    "custom": "server-side custom losses are off; the client computes forward_backward_custom itself",
}
# The protocol's names for clip_low and clip_high: absolute bounds of the ratio, not distances from 1.
THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")


def served_losses() -> list[str]:
    """Names of the losses that clients may ask for, in the order in which they are declared."""
    return [loss.name for loss in LOSSES.things() if loss.wire is not None]


def _config(loss: Loss) -> dict[str, float]:
    """The keys of loss_fn_config with their defaults."""
    assert loss.wire is not None
    own = {name: param.default for name, param in loss.params.items() if param.wire}
    if loss.wire.thresholds is None:
        return own
    others = {name: value for name, value in own.items() if name not in ("clip_low", "clip_high")}
    return {**dict(zip(THRESHOLDS, loss.wire.thresholds, strict=True)), **others}


def _inputs(loss: Loss) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What loss_fn_inputs must and may have. The protocol calls the log-probabilities of sampling `logprobs`."""
    assert loss.wire is not None
    needed = ("target_tokens", *(name.removeprefix("sampling_") for name in loss.needs))
    return needed, (*(THRESHOLDS if loss.wire.thresholds else ()), *loss.wire.optional)


def loss_spec(request: TrainRequest) -> LossSpec:
    """The engine's loss. Raises RequestFailed for an unknown loss, config key or value, naming it."""
    name = request.loss_fn
    if name in NOT_PUBLIC:
        raise RequestFailed(f"loss_fn {name!r} is refused: {NOT_PUBLIC[name]}")
    if name not in served_losses():
        raise RequestFailed(f"loss_fn {name!r} is not known; choose one of: {', '.join(served_losses())}")
    loss = LOSSES.get(name)
    allowed = _config(loss)
    for key, value in request.loss_config.items():
        if key not in allowed:
            names = ", ".join(allowed) or "none"
            raise RequestFailed(f"loss_fn_config {key!r} does not apply to {name}; allowed: {names}")
        allowed[key] = _number(value, f"loss_fn_config {key}", bound=key in THRESHOLDS)
    params = {key: value for key, value in allowed.items() if key not in THRESHOLDS}
    for key, value in params.items():
        if not loss.params[key].fits(value):
            raise RequestFailed(f"loss_fn_config {key}={value:g}; allowed: {loss.params[key].allowed}")
    if "clip_low_threshold" in allowed:
        low, high = allowed["clip_low_threshold"], allowed["clip_high_threshold"]
        if not (0.0 <= low <= high or low == -math.inf):
            raise RequestFailed(f"loss_fn_config: thresholds {low:g} and {high:g}; allowed: 0 <= low <= high")
        params |= {"clip_low": 1.0 - low, "clip_high": high - 1.0}
    return LossSpec(name, params)


def substituted(
    request: TrainRequest, loss: str, find: Callable[[str], RecordedSequence]
) -> tuple[TrainRequest, set[str]]:
    """The request for another loss, and of which weights its sequences are. What that loss reads and the client left
    out comes from the recorded sequences: log-probabilities, and which tokens were drawn. Raises RequestFailed for
    spans that do not fit the datum or the sequences they name."""
    data, weights = [], set()
    optional = _inputs(LOSSES.get(loss))[1]
    for number, datum in enumerate(request.data):
        where = f"{request.loss_fn}: datum {number}"
        targets = datum.inputs.get("target_tokens", np.zeros(0))
        if targets.ndim != 1:
            raise RequestFailed(
                f"{where}: target_tokens has shape {list(targets.shape)}; allowed: [{len(datum.tokens)}]"
            )
        if not datum.target_spans:
            raise RequestFailed(f"{where} does not say which samples it is of; attach them with Datum.with_provenance")
        _follow(datum.tokens, datum.token_spans, f"{where}: model_input", find)
        named, drawn, logprobs = _follow(targets, datum.target_spans, f"{where}: loss_fn_inputs", find)
        advantages = datum.inputs.get("advantages")
        if advantages is not None and advantages.shape == drawn.shape and advantages[~drawn].any():
            raise RequestFailed(f"{where}: advantages of tokens that were not sampled have to be 0")
        found = {"logprobs": logprobs} | (
            {"sequence_ratio_mask": drawn.astype(np.float32)} if "sequence_ratio_mask" in optional else {}
        )
        data.append(replace(datum, inputs={**found, **datum.inputs}))
        weights |= {sequence.weights for sequence in named}
    return replace(request, loss_fn=loss, data=data), weights


def _follow(
    tokens: np.ndarray, spans: Sequence[ProvenanceSpan], where: str, find: Callable[[str], RecordedSequence]
) -> tuple[list[RecordedSequence], np.ndarray, Floats]:
    """The sequences that spans over `tokens` [n] name, which of the tokens were drawn, and the log-probabilities of
    these. Prompt tokens are not compared: as targets they may be anything."""
    named, at = [], 0
    drawn, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    for span in spans:
        sequence = find(span.sequence_id)
        most = len(sequence.tokens) if span.sampled else sequence.prompt_length
        start, end, here = span.offset, span.offset + span.length, slice(at, at + span.length)
        kind = "sampled" if span.sampled else "prompt"
        if not 0 <= start <= end <= most:
            raise RequestFailed(
                f"{where}: a span of {kind} tokens {start} to {end} of sequence {span.sequence_id}, which has {most}"
            )
        at += span.length
        if span.sampled and at <= len(tokens):
            if (tokens[here] != sequence.tokens[start:end]).any():
                raise RequestFailed(f"{where}: its tokens are not those that were drawn for {span.sequence_id}")
            drawn[here], logprobs[here] = True, sequence.logprobs[start:end]
        named.append(sequence)
    if at != len(tokens):
        raise RequestFailed(f"{where}: its spans are of {at} tokens, there are {len(tokens)}")
    return named, drawn, logprobs


def _number(value: Any, where: str, *, bound: bool = False) -> float:
    if isinstance(value, str) or math.isnan(value) or not bound and math.isinf(value):
        raise RequestFailed(f"{where}={value!r}: needs a {'' if bound else 'finite '}number")
    if not bound and abs(value) > LARGEST:
        raise RequestFailed(f"{where}={value!r}: at most {LARGEST:g}")
    return float(value)


def to_rows(request: TrainRequest, info: ServerInfo, *, max_tokens: int) -> list[Datum]:
    """One engine row per datum, in order, named "datum i". Raises RequestFailed for the first thing that
    does not fit."""
    if not request.data:
        raise RequestFailed(f"{request.loss_fn}: a request without data")
    total = sum(len(datum.tokens) for datum in request.data)
    if total > max_tokens:
        raise RequestFailed(
            f"{request.loss_fn}: {total} tokens in one request, at most {max_tokens} may be; send smaller parts, or "
            "raise service.max_tokens_per_request"
        )
    return [_row(datum, i, request.loss_fn, request.model_id, info) for i, datum in enumerate(request.data)]


def _row(datum: WireDatum, index: int, loss: str, model: str, info: ServerInfo) -> Datum:
    where, declared = f"{loss}: datum {index}", LOSSES.get(loss)
    needed, optional = _inputs(declared)
    tokens = np.asarray(datum.tokens, dtype=np.int64)
    if not 1 <= len(tokens) <= info.max_context:
        raise RequestFailed(f"{where}: {len(tokens)} tokens; allowed: 1 to {info.max_context}")
    _check_ids(tokens, info, f"{where}: model_input")
    for name in needed:
        if name not in datum.inputs:
            raise RequestFailed(f"{where}: no {name} in loss_fn_inputs; needed: {', '.join(needed)}")
    for name in datum.inputs:
        if name not in needed + optional:
            names = ", ".join(needed + optional)
            raise RequestFailed(f"{where}: loss_fn_inputs {name!r} does not apply to {loss}; allowed: {names}")
    targets = datum.inputs["target_tokens"]
    if targets.dtype.kind != "i":
        raise RequestFailed(f"{where}: target_tokens is {targets.dtype}; it has to be int64")
    many = declared.many and targets.ndim == 2
    if len(targets) != len(tokens) or targets.ndim > (2 if many else 1) or targets.size == 0:
        raise RequestFailed(
            f"{where}: target_tokens has shape {list(targets.shape)}, the input has {len(tokens)} tokens; "
            f"allowed: [{len(tokens)}]" + (f" or [{len(tokens)}, K]" if declared.many else "")
        )
    targets = targets.astype(np.int64, copy=False)
    _check_ids(targets, info, f"{where}: target_tokens")
    arrays = {
        name: _floats(value, targets.shape, f"{where}: {name}", bound=name in THRESHOLDS)
        for name, value in datum.inputs.items()
        if name != "target_tokens"
    }
    named = f"datum {index}"
    if declared.kind == "supervised":
        weights = arrays.get("weights", np.ones(targets.shape, np.float32))
        return Datum(tokens, targets, weights, model=model, name=named)
    assert declared.wire is not None
    advantages = arrays["advantages"]
    # Where A is 0 most losses are 0 whatever the ratio, which may overflow at prompt tokens; dro pulls them too.
    weights = np.ones_like(advantages) if declared.wire.all_tokens else (advantages != 0).astype(np.float32)
    fields: dict[str, Any] = {name: arrays[name.removeprefix("sampling_")] for name in declared.needs}
    if "clip_low_threshold" in arrays:
        fields["clip_low"] = 1.0 - arrays["clip_low_threshold"]
    if "clip_high_threshold" in arrays:
        fields["clip_high"] = arrays["clip_high_threshold"] - 1.0
    if declared.ratio_mask:
        fields["ratio_mask"] = arrays.get("sequence_ratio_mask", np.ones_like(advantages))
    return Datum(tokens, targets, weights, model=model, name=named, **fields)


def _check_ids(ids: np.ndarray, info: ServerInfo, where: str) -> None:
    if ids.min() < 0 or ids.max() >= info.vocab_size:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise RequestFailed(f"{where}: token {bad} is not in the vocabulary; allowed: 0 to {info.vocab_size - 1}")


def _floats(value: np.ndarray, shape: tuple[int, ...], where: str, *, bound: bool = False) -> np.ndarray:
    if value.shape != shape:
        raise RequestFailed(
            f"{where} has shape {list(value.shape)}, target_tokens has {list(shape)}; they have to be equal"
        )
    out = value.astype(np.float32, copy=False)
    if bound:
        if np.isnan(out).any():
            raise RequestFailed(f"{where} is not a number everywhere")
        return out
    if not np.isfinite(out).all():
        raise RequestFailed(f"{where} is not finite everywhere")
    if out.size and np.abs(out).max() > LARGEST:
        raise RequestFailed(f"{where} holds {float(np.abs(out).max()):g}; at most {LARGEST:g}")
    return out


def adam_params(request: OptimStep) -> AdamParams:
    """One AdamW step as the protocol specifies it. Raises RequestFailed for a number out of range or another
    optimizer."""
    settings = request.adam_params or request.optimizer_params
    assert settings is not None
    if isinstance(settings, OptimizerSettings) and settings.type != "adamw":
        raise RequestFailed(f"optimizer {settings.type!r} is refused: its update is not public; use adamw")
    numbers = {
        name: _number(getattr(settings, name), name, bound=name == "grad_clip_norm")
        for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
    }
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        if numbers[name] < 0:
            raise RequestFailed(f"{name}={numbers[name]:g}; allowed: 0 or more")
    for name in ("beta1", "beta2"):
        if not 0 <= numbers[name] < 1:
            raise RequestFailed(f"{name}={numbers[name]:g}; allowed: 0 up to below 1")
    if math.isinf(numbers["grad_clip_norm"]):
        numbers["grad_clip_norm"] = 0.0
    return AdamParams(numbers.pop("learning_rate"), **numbers)


def sampling_params(query: SamplingRequest, info: ServerInfo, key: str) -> list[SamplingParams]:
    """How to draw each of the query's samples. A seed gives the same samples whatever else runs, each sample its own
    stream; without one they are keyed by `key`, which is the request's. Raises RequestFailed for what cannot be
    drawn."""
    check_prompt(query, info)
    settings = query.sampling_params
    room = info.max_context - len(query.prompt)
    if room < 1:
        raise RequestFailed(
            f"prompt: {len(query.prompt)} tokens leave no room to draw; the context is {info.max_context} tokens"
        )
    wanted = room if settings.max_tokens is None else settings.max_tokens
    if wanted > room:
        raise RequestFailed(
            f"max_tokens={wanted} and a prompt of {len(query.prompt)} tokens exceed the context of "
            f"{info.max_context}; lower max_tokens to {room} or less"
        )
    if wanted < 1:
        raise RequestFailed(f"max_tokens={wanted}; allowed: 1 or more")
    _range("temperature", settings.temperature, 0.0, 100.0)
    coldest, reason = LEAST["sampler.temperature"]
    if 0 < settings.temperature < coldest:
        raise RequestFailed(
            f"temperature={settings.temperature!r}; allowed: 0 (the likeliest token), or {coldest:g} to 100: {reason}"
        )
    _range("top_p", settings.top_p, 0.0, 1.0, open_low=True)
    strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = info.eos_token_ids
    if settings.stop is not None and len(settings.stop) == 0:
        stop_ids = ()
    elif settings.stop is not None and isinstance(settings.stop[0], str):
        strings = tuple(str(text) for text in settings.stop)  # besides the end of sequence
        if not all(strings):
            raise RequestFailed("stop: an empty string would end every sample at once")
        if (size := sum(map(len, strings))) > STOP_CHARACTERS:
            raise RequestFailed(f"stop: {size} characters in all; at most {STOP_CHARACTERS} may be")
    elif settings.stop is not None:
        stop_ids = tuple(int(token) for token in settings.stop)
        _check_ids(np.array(stop_ids, dtype=np.int64), info, "stop")
    base = settings.seed if settings.seed is not None else key
    return [
        SamplingParams(
            max_tokens=wanted,
            temperature=settings.temperature,
            top_k=max(0, settings.top_k),
            top_p=settings.top_p,
            stop=strings,
            stop_token_ids=stop_ids,
            seed=draw_seed("sample", base, index),
        )
        for index in range(query.num_samples)
    ]


def _range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise RequestFailed(f"{name}={value!r}; allowed: {'above ' if open_low else ''}{low:g} to {high:g}")


def check_prompt(query: SamplingRequest, info: ServerInfo) -> None:
    """Raises RequestFailed for a prompt, or questions about it, that do not fit."""
    length = len(query.prompt)
    if length < 1:
        raise RequestFailed("prompt: no tokens")
    _check_ids(query.prompt, info, "prompt")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        value = getattr(query, name)
        if value > min(1024, info.vocab_size):
            raise RequestFailed(f"{name}={value}; allowed: 0 to {min(1024, info.vocab_size)}")
    if query.targets is not None:
        if query.targets.ndim != 2 or len(query.targets) != length - 1:
            raise RequestFailed(
                f"target_prompt_logprobs has shape {list(query.targets.shape)}; allowed: [{length - 1}, K] for a "
                f"prompt of {length} tokens"
            )
        if query.targets.size and (query.targets.min() < -1 or query.targets.max() >= info.vocab_size):
            raise RequestFailed(f"target_prompt_logprobs: tokens have to be -1 (skip) or 0 to {info.vocab_size - 1}")


def batch_key(request: TrainRequest) -> tuple[Any, ...]:
    """Requests with equal answers can be one call of the engine."""
    return (request.loss_fn, tuple(sorted(request.loss_config.items())), request.forward_only)


# ---- what one request may ask for


def answer_bytes(query: SamplingRequest, max_tokens: int) -> int:
    """What the answer to a sample can take."""
    prompt = len(query.prompt)
    drawn = query.num_samples * max_tokens * (12 + CELL * query.topk_sample_logprobs)
    asked = CELL * query.topk_prompt_logprobs + 12 * query.prompt_alt_tokens_k + (4 if query.prompt_logprobs else 0)
    targets = 0 if query.targets is None else 12 * query.targets.size
    return drawn + prompt * (8 + asked) + targets


def check_sample(query: SamplingRequest, max_tokens: int, service: ServiceConfig) -> None:
    """Raises RequestFailed for a request that is too large by itself."""
    if query.num_samples > (most := service.max_queued_samples):
        raise RequestFailed(f"num_samples={query.num_samples}; at most {most} may wait (service.max_queued_samples)")
    each = len(query.prompt) + max_tokens
    if query.num_samples * each > service.max_tokens_per_request:
        raise RequestFailed(
            f"{query.num_samples} samples of up to {each} tokens are more than "
            f"service.max_tokens_per_request={service.max_tokens_per_request}"
        )
    size = answer_bytes(query, max_tokens)
    if size > ANSWER_BYTES:
        raise RequestFailed(
            f"the answer could take {size >> 20} MiB, at most {ANSWER_BYTES >> 20} may be; ask for fewer samples, "
            "tokens, targets or alternatives in one request"
        )


def check_width(request: TrainRequest, *, max_tokens_per_microbatch: int) -> None:
    """Raises RequestFailed for rows with so many targets that a micro-batch, padded to its widest row, would not
    fit."""
    for number, datum in enumerate(request.data):
        targets = datum.inputs.get("target_tokens")
        if targets is None or targets.ndim != 2:
            continue
        most = WIDE_TARGETS // max(max_tokens_per_microbatch, len(datum.tokens), 1)
        if targets.shape[1] > max(1, most):
            raise RequestFailed(
                f"{request.loss_fn}: datum {number}: target_tokens has {targets.shape[1]} columns; at most {most} fit "
                f"into a micro-batch of {max_tokens_per_microbatch} tokens"
            )
