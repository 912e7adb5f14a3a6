"""Answers about models, sessions, runs and checkpoints: the protocol's JSON as dataclasses. Imports without torch."""

from __future__ import annotations

import types as python_types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from skyrl.service.records import CHECKPOINT_TYPES, CheckpointPath, parse_time

R = TypeVar("R")


def build(cls: type[R], json: Any) -> R:
    """A dataclass of this module from the JSON that the service answers; fields that it does not have are left out.

    Raises ValueError for a field that is missing."""
    hints, values = get_type_hints(cls), {}
    for one in fields(cls):  # type: ignore[arg-type]  # every cls here is a dataclass
        if one.name in json:
            values[one.name] = _value(hints[one.name], json[one.name])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{cls.__name__}: the answer has no {one.name}")
    return cls(**values)


def _value(hint: Any, json: Any) -> Any:
    if json is None:
        return None
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, python_types.UnionType):
        return _value(next(arg for arg in args if arg is not type(None)), json)
    if origin is list:
        return [_value(args[0], item) for item in json]
    if hint is datetime:
        return parse_time(json)
    return build(hint, json) if is_dataclass(hint) else json


@dataclass(frozen=True)
class ModelData:
    """What a model is made of."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True)
class GetInfoResponse:
    """An open model."""

    model_data: ModelData
    model_id: str
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class SupportedModel:
    """A name that may be asked for."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """All names."""

    supported_models: list[SupportedModel]


@dataclass(frozen=True)
class Cursor:
    """Which part of a list this is."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint. checkpoint_id is its kind and name; checkpoint_type training, sampler or external."""

    checkpoint_id: str
    checkpoint_type: str
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class CheckpointsListResponse:
    """A page of checkpoints."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True)
class TrainingRun:
    """A model that was made once. corrupted: it was open when a server ended, and trains no more."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class TrainingRunsResponse:
    """A page of runs."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True)
class WeightsInfoResponse:
    """What a model has to be for a checkpoint to fit into it."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class GetSamplerResponse:
    """What a sampling session samples from."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


@dataclass(frozen=True)
class ListSessionsResponse:
    """Ids of sessions, newest first."""

    sessions: list[str]


@dataclass(frozen=True)
class GetSessionResponse:
    """What a session made."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


@dataclass(frozen=True)
class SessionSummary:
    """A session that a search found."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    checkpoints_count: int
    status: dict[str, Any] | None = None
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


@dataclass(frozen=True)
class SessionSearchResponse:
    """A page of sessions; next_cursor goes into the next search."""

    sessions: list[SessionSummary]
    next_cursor: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExternalWeightsUrlsResponse:
    """Where each file of a checkpoint is; in process file:// addresses, which end with the checkpoint."""

    urls: dict[str, str]
    expires: datetime


@dataclass(frozen=True)
class CopyWeightsResponse:
    """Where the copy is."""

    tinker_path: str


@dataclass(frozen=True)
class StorageUsageItem:
    """What checkpoints of one project take."""

    org_user_urn: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    project_id: str | None = None


@dataclass(frozen=True)
class CurrentCheckpointStorageUsageResponse:
    """What all checkpoints take."""

    data: list[StorageUsageItem] = field(default_factory=list)


@dataclass(frozen=True)
class ParsedCheckpointTinkerPath:
    """The parts of a tinker:// path."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: str
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Raises UserError (a ValueError) unless it is tinker://run/kind/name."""
        path = CheckpointPath.parse(tinker_path)
        return cls(tinker_path, path.run_id, CHECKPOINT_TYPES[path.kind], path.checkpoint_id)
