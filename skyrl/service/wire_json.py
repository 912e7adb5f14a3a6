"""Requests in JSON, to the types of skyrl.service.messages: everything but training data, and that of old releases.

What identifies a request (model and seq_id, or session) has to be right, or the submission is refused (UserError).
Anything else that is wrong becomes the request's `problem`: its future fails with that text, and the client's count
of requests stays whole. Unknown fields are refused by name. Whether values suit the model, the vocabulary or the loss
is checked later, by the one who runs the request; here they are only of the right kind, and numbers finite.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from skyrl.service.messages import (
    CheckpointKind,
    CreateModel,
    LoadWeights,
    OptimStep,
    SamplingRequest,
    SaveWeights,
    TrainRequest,
    UnloadModel,
    WireDatum,
)
from skyrl.service.wire_fields import (
    DTYPES,
    INT32_MAX,
    INT64_MAX,
    NAME_LENGTH,
    Fields,
    Room,
    check_number,
    check_shape,
    check_text,
    expand_csr,
    list_array,
    shaped,
    shown,
)
from skyrl.types import UserError

ID_LENGTH = 512
MAX_SAMPLES = 65536
MAX_STOPS = 1024
KEY_LENGTH = 16384  # of a public key: SSH has long ones
TTL_SECONDS = (3600, 3660 * 86400)  # an hour to ten years
# A checkpoint's name is one part of its path, on disk and in tinker://run/kind/name.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")
R = TypeVar("R")


def made(make: Callable[..., R], blank: dict[str, Any], read: Callable[[], dict[str, Any]]) -> R:
    """A request of the fields that `read` returns, or with the problem it raises; `blank` are fields known before."""
    try:
        found = read()
    except UserError as error:
        found = {"problem": str(error)}
    return make(**{**blank, **found})


def turn(fields: Fields) -> dict[str, Any]:
    """{"model_id", "seq_id"}: what every request to a model needs."""
    return {
        "model_id": fields.text("model_id", length=ID_LENGTH),
        "seq_id": fields.integer("seq_id", 1, INT32_MAX),
    }


def _new_model(fields: Fields) -> dict[str, Any]:
    return {
        "session_id": fields.text("session_id", length=ID_LENGTH),
        "model_seq_id": fields.integer("model_seq_id", 0, INT32_MAX),
    }


def _optimizer_type(fields: Fields) -> str:
    """The name in optimizer_config. Another family than adamw is refused by name later, so its fields are not read."""
    config = fields.section("optimizer_config")
    if config is None:
        return "adamw"
    kind = config.text("type", "adamw", length=NAME_LENGTH)
    if kind == "adamw":
        config.end()
    return kind


def parse_create_model(json: Any) -> CreateModel:
    """create_model. Without lora_config, rank 0: all parameters are trained. Raises UserError without session_id and
    model_seq_id; the rest becomes `problem`."""
    top = Fields(json, "create_model")
    blank = _new_model(top) | {"base_model": "", "rank": 0, "seed": None, "optimizer": "adamw", "user_metadata": {}}
    blank |= {"train_mlp": True, "train_attn": True, "train_unembed": True}

    def read() -> dict[str, Any]:
        top.constant("type", "create_model")
        found = {
            "base_model": top.text("base_model"),
            "user_metadata": top.strings("user_metadata"),
            "optimizer": _optimizer_type(top),
        }
        lora = top.section("lora_config")
        if lora is not None:
            found["rank"] = lora.integer("rank", 0, INT32_MAX)
            found["seed"] = lora.integer("seed", -INT64_MAX - 1, INT64_MAX, None)
            parts = ("train_mlp", "train_attn", "train_unembed")
            found |= {part: lora.flag(part, True) for part in parts}
            lora.end()
            if found["rank"] and not any(found[part] for part in parts):
                raise UserError("create_model: lora_config trains nothing; set one of " + ", ".join(parts))
        top.end()
        return found

    return made(CreateModel, blank, read)


def parse_optim_step(json: Any) -> OptimStep:
    """optim_step, the protocol's defaults filled in. Raises UserError without model_id and seq_id; the rest becomes
    `problem`. Another optimizer than AdamW is named in `optimizer`, for the worker to refuse."""
    top = Fields(json, "optim_step")

    def read() -> dict[str, Any]:
        top.constant("type", "optim_step")
        adam, other = top.section("adam_params"), top.section("optimizer_params")
        top.end()
        if (adam is None) == (other is None):
            raise UserError("optim_step: needs one of adam_params and optimizer_params, not both")
        found: dict[str, Any] = {}
        if other is not None:
            found["optimizer"] = other.text("type", length=NAME_LENGTH)
            if found["optimizer"] != "adamw":
                return found
        params = adam or other
        assert params is not None
        sent = json["optimizer_params" if adam is None else "adam_params"]
        if nulls := sorted(name for name, value in sent.items() if value is None):
            # Clients leave out what they do not set: their null is a NaN that JSON could not hold.
            raise UserError(f"{params.place(nulls[0])} is null (a NaN?); allowed: a finite number")
        for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
            found[name] = params.number(name, getattr(OptimStep, name))
        params.end()
        return found

    return made(OptimStep, turn(top), read)


def _name(fields: Fields, *, needed: bool = True) -> str | None:
    name = fields.text("path") if needed else fields.text("path", None)
    if name is not None and not NAME.fullmatch(name):
        raise UserError(
            f"{fields.place('path')}={shown(name)}; allowed: a name of up to 200 letters, digits and _ . + = @ -, "
            "beginning with a letter, a digit or _"
        )
    return name


def _save(
    json: Any, operation: str, kind: CheckpointKind, read_rest: Callable[[Fields], dict[str, Any]]
) -> SaveWeights:
    top = Fields(json, operation)

    def read() -> dict[str, Any]:
        top.constant("type", operation)
        found = read_rest(top)
        found["ttl_seconds"] = top.integer("ttl_seconds", *TTL_SECONDS, None)
        top.end()
        return found

    return made(SaveWeights, turn(top) | {"kind": kind, "name": None}, read)


def parse_save_weights(json: Any) -> SaveWeights:
    """save_weights: a training checkpoint. Raises UserError without model_id and seq_id; the rest becomes `problem`."""

    def rest(top: Fields) -> dict[str, Any]:
        return {
            "name": _name(top),
            "overwrite": top.flag("overwrite", False),
            "user_metadata": top.strings("user_metadata"),
        }

    return _save(json, "save_weights", "weights", rest)


def parse_save_weights_for_sampler(json: Any) -> SaveWeights:
    """save_weights_for_sampler, with a name or, without, for a sampling session. An inflight save is a snapshot like
    any other. Raises UserError without model_id and seq_id; the rest becomes `problem`."""

    def rest(top: Fields) -> dict[str, Any]:
        top.constant("kind", "snapshot", "inflight")
        name = _name(top, needed=False)
        session = top.integer("sampling_session_seq_id", 0, INT64_MAX, None)
        if (name is None) == (session is None):
            raise UserError("save_weights_for_sampler: needs one of path and sampling_session_seq_id, not both")
        return {
            "name": name,
            "sampling_session_seq_id": session,
            "user_metadata": top.strings("user_metadata"),
        }

    return _save(json, "save_weights_for_sampler", "sampler_weights", rest)


def parse_save_weights_external(json: Any) -> SaveWeights:
    """save_weights_external: an export for other programs, encrypted for `age_recipients` if there are any. Raises
    UserError without model_id and seq_id; the rest becomes `problem`."""

    def rest(top: Fields) -> dict[str, Any]:
        recipients = top.items("age_encryption_recipients", [])
        place = top.place("age_encryption_recipients")
        if len(recipients) > 64:
            raise UserError(f"{place} has {len(recipients)} entries; allowed: at most 64")
        found = tuple(check_text(item, place, length=KEY_LENGTH) for item in recipients)
        return {"name": _name(top), "age_recipients": found}

    return _save(json, "save_weights_external", "external_weights", rest)


def parse_load_weights(json: Any) -> LoadWeights:
    """load_weights, into a model (model_id, seq_id) or as a new one (session_id, model_seq_id). Raises UserError
    unless it is exactly one of them; the rest becomes `problem`.

    Release 0.3.0 sends no `optimizer`: its load_state is its one way to resume, so the optimizer's state is loaded too.
    """
    top = Fields(json, "load_weights")
    if ("model_id" in top) == ("session_id" in top):
        raise UserError("load_weights: needs one of model_id (with seq_id) and session_id (with model_seq_id)")
    blank = turn(top) if "model_id" in top else _new_model(top)

    def read() -> dict[str, Any]:
        top.constant("type", "load_weights")
        if "weights_access_token" in top:
            raise UserError("load_weights: weights_access_token is not supported; only your own checkpoints load")
        found = {
            "path": top.text("path"),
            "optimizer": top.flag("optimizer", True),
            "base_model": top.text("base_model", None),
            "user_metadata": top.strings("user_metadata"),
            "optimizer_type": _optimizer_type(top),
        }
        top.end()
        return found

    return made(LoadWeights, blank | {"path": "", "optimizer": False}, read)


def parse_unload_model(json: Any) -> UnloadModel:
    """unload_model. Raises UserError for anything wrong: it has no seq_id to waste."""
    top = Fields(json, "unload_model")
    found = UnloadModel(top.text("model_id", length=ID_LENGTH))
    top.constant("type", "unload_model")
    top.end()
    return found


# ---- sampling


def parse_sample(json: Any, *, max_bytes: int = 1 << 28) -> SamplingRequest:
    """asample. Raises UserError unless it names a sampling session (with seq_id), a base model or a checkpoint; the
    rest becomes `problem`. seq_id is -1 where an old release sends none: such a request has no sampling session and
    is never taken for a repetition. A sparse target_prompt_logprobs expands to at most `max_bytes`, with -1 in the
    cells that it does not name."""
    top = Fields(json, "sample")
    names = ("sampling_session_id", "base_model", "model_path")
    blank = {name: top.text(name, None) for name in names}
    if not any(blank.values()):
        raise UserError("sample: needs one of " + ", ".join(names))
    if blank["sampling_session_id"] is None:
        blank["seq_id"] = top.integer("seq_id", 0, INT64_MAX, -1)
    else:
        blank["seq_id"] = top.integer("seq_id", 0, INT64_MAX)
    blank["prompt"] = np.zeros(0, np.int64)

    def read() -> dict[str, Any]:
        top.constant("type", "sample")
        found = _sampling_params(top)
        found["num_samples"] = top.integer("num_samples", 1, MAX_SAMPLES, 1)
        found["prompt"] = tokens_of(top.section("prompt"), "sample: prompt")
        found["prompt_logprobs"] = top.flag("prompt_logprobs", False)
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            found[name] = top.integer(name, 0, INT32_MAX, 0)
        found["prompt_logprobs_last_n"] = top.integer("prompt_logprobs_last_n", 0, INT32_MAX, None)
        if top.flag("record_stability_info", False):
            raise UserError("sample: record_stability_info is not supported; it serves only the loss stable_reinforce")
        targets = top.section("target_prompt_logprobs")
        if targets is not None:
            place = "sample: target_prompt_logprobs"
            found["targets"], found["targets_csr"] = _tensor(targets, place, fill=-1, room=Room(max_bytes))
            if found["targets"].dtype.kind != "i" or found["targets"].ndim != 2:
                raise UserError(f"{place}: allowed: int64 of two dimensions, [prompt length - 1, K]")
        top.end()
        return found

    return made(SamplingRequest, blank, read)


def _sampling_params(top: Fields) -> dict[str, Any]:
    params = top.section("sampling_params")
    if params is None:
        return {}
    found = {
        "max_tokens": params.integer("max_tokens", 0, INT32_MAX, None),
        "seed": params.integer("seed", -INT64_MAX - 1, INT64_MAX, None),
        "temperature": params.number("temperature", 1.0),
        "top_k": params.integer("top_k", -1, INT32_MAX, -1),
        "top_p": params.number("top_p", 1.0),
        "stop": _stop(params.take("stop", None), params.place("stop")),
    }
    params.end()
    return found


def _stop(value: Any, place: str) -> tuple[str, ...] | tuple[int, ...] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    kinds = set(map(type, stops)) if isinstance(stops, list) else {dict}
    if not (kinds <= {str} or kinds <= {int}) or len(stops) > MAX_STOPS:
        raise UserError(f"{place}={shown(value)}; allowed: a string, or up to {MAX_STOPS} strings or token ids")
    if kinds == {str}:
        return tuple(check_text(text, place, length=4096, empty=True, controls=True) for text in stops)
    return tuple(list_array(stops, "int64", place).tolist())


def tokens_of(prompt: Fields | None, place: str) -> np.ndarray:
    """The token ids [n] int64 of {"chunks": [...]}. Images and audio are refused by name."""
    if prompt is None:
        raise UserError(f"{place} is missing")
    chunks = prompt.items("chunks")
    prompt.end()
    parts = []
    for number, value in enumerate(chunks):
        where = f"{place} chunk {number}"
        chunk = Fields(value, where)
        # Release 0.3.0 leaves the type out where it is the default.
        kind = chunk.take("type", "encoded_text")
        if kind != "encoded_text":
            raise UserError(f"{where} is {shown(kind)}; allowed: encoded_text, the models here read tokens only")
        parts.append(list_array(chunk.take("tokens"), "int64", f"{where} tokens"))
        chunk.end()
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _tensor(tensor: Fields, place: str, *, fill: int, room: Room) -> tuple[np.ndarray, Any]:
    """A JSON tensor, dense, and (crow, col) where it came sparse."""
    dtype = tensor.take("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{place}: dtype {shown(dtype)}; allowed: {', '.join(DTYPES)}")
    values = list_array(tensor.take("data"), dtype, f"{place} data")
    shape = tensor.take("shape", None)
    indices = tensor.take("sparse_crow_indices", None), tensor.take("sparse_col_indices", None)
    tensor.end()
    if indices == (None, None):
        return shaped(values, (len(values),) if shape is None else check_shape(shape, place), place), None
    crow, col = (list_array(value, "int64", f"{place} sparse indices") for value in indices)
    return expand_csr(values, crow, col, check_shape(shape, place), fill, place, room), (crow, col)


# ---- training data of releases up to 0.24


def parse_train_json(json: Any, *, forward_only: bool, max_bytes: int) -> TrainRequest:
    """forward_backward, or forward with `forward_only`, as old releases send it. Raises UserError without model_id
    and seq_id; the rest becomes `problem`."""
    operation = "forward" if forward_only else "forward_backward"
    top = Fields(json, operation)
    blank = turn(top) | {"data": [], "loss_fn": "", "loss_config": {}, "forward_only": forward_only}

    def read() -> dict[str, Any]:
        top.constant("type", operation)
        given = top.section(f"{operation}_input")
        if given is None:
            raise UserError(f"{operation}: {operation}_input is missing")
        top.end()
        found: dict[str, Any] = {"loss_fn": given.text("loss_fn", length=NAME_LENGTH), "loss_config": _config(given)}
        rows = given.items("data")
        given.end()
        room = Room(max_bytes)
        found["data"] = [_datum(row, f"{operation}: datum {number}", room) for number, row in enumerate(rows)]
        return found

    return made(TrainRequest, blank, read)


def _config(given: Fields) -> dict[str, float | str]:
    config = given.take("loss_fn_config", {})
    place = given.place("loss_fn_config")
    if not isinstance(config, dict):
        raise UserError(f"{place}={shown(config)}; allowed: a map of numbers and strings")
    return {check_text(key, f"{place} key", length=NAME_LENGTH): config_value(value, f"{place}[{shown(key)}]")
            for key, value in config.items() if value is not None}  # fmt: skip


def config_value(value: Any, place: str) -> float | str:
    """A loss's config value: a finite number, or text."""
    return check_text(value, place, length=4096) if isinstance(value, str) else check_number(value, place)


def _datum(value: Any, place: str, room: Room) -> WireDatum:
    row = Fields(value, place)
    tokens = tokens_of(row.section("model_input"), f"{place}: model_input")
    given = row.take("loss_fn_inputs", {})
    for spans in ("model_input_spans", "loss_fn_input_spans"):
        row.take(spans, None)  # where the tokens came from: matters to stable_reinforce only
    row.end()
    if not isinstance(given, dict):
        raise UserError(f"{place}: loss_fn_inputs is {shown(given)}; allowed: a map of tensors")
    inputs = {}
    for name, tensor in given.items():
        check_text(name, f"{place}: loss_fn_inputs key", length=NAME_LENGTH)
        where = f"{place}: {name}"
        inputs[name], _ = _tensor(Fields(tensor, where), where, fill=0, room=room)
    return WireDatum(tokens, inputs)
