"""What clients ask and what they are told: requests, checked when they are read, and results. Neither torch nor a web
framework is imported here.

A request has to say which model, or session, and which number of its count it is. Without that the submission is
refused (UserError, HTTP 400). Anything else that is wrong becomes the request's `problem`: it is accepted, its future
fails with that text, category "user", and nothing is run. A refusal at submission would use up the client's seq_id, and
every later request of the model would wait for it.

Here values are only of the right kind, and numbers finite. Whether they suit the model, the vocabulary or the loss is
checked in validation.py by the worker, which knows those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    FailFast,
    Field,
    GetPydanticSchema,
    PlainValidator,
    StringConstraints,
    model_validator,
)
from pydantic_core import core_schema

from skyrl.types import Floats, Ints, Metrics
from skyrl.web.message import (
    INT32_MAX,
    INT64_MAX,
    TEXT_LENGTH,
    JsonMessage,
    Name,
    Text,
    not_allowed,
    refused,
    short_repr,
)
from skyrl.web.tensors import Tensor, list_array, tensor_field

Category = Literal["user", "server", "unknown"]
CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]
LossConfig = dict[str, float | str]

METADATA_LENGTH = 1 << 18  # of all names and values of one map, which are kept on the disk and listed
METADATA_NAMES = 1024
MAX_SAMPLES = 65536
MAX_STOPS = 1024
KEY_LENGTH = 16384  # of a public key: SSH has long ones
# A checkpoint's name is one part of its path, on disk and in tinker://run/kind/name.
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")


class RequestFailed(Exception):
    """A request that was accepted and then failed: the text and category that its future tells."""

    def __init__(self, message: str, category: Category = "user") -> None:
        super().__init__(message)
        self.message, self.category = message, category


class TooManyRequests(Exception):
    """Too much work is waiting: HTTP 429. The text says what and how much."""


# ---- kinds of fields

Id = Annotated[Text, StringConstraints(max_length=512)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
Seed = Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)]
Ttl = Annotated[int, Field(ge=3600, le=3660 * 86400)]  # an hour to ten years


def check_metadata(found: dict[str, str]) -> dict[str, str]:
    """The map, if it is not more text than should be kept. Raises ValueError, for pydantic."""
    size = sum(len(key) + len(value) for key, value in found.items())
    if size > METADATA_LENGTH:
        raise refused(f"has {size} characters in all; allowed: at most {METADATA_LENGTH}")
    return found


MetadataText = Annotated[str, StringConstraints(max_length=1 << 16)]
Metadata = Annotated[
    dict[Text, MetadataText],
    Field(max_length=METADATA_NAMES),
    AfterValidator(check_metadata),
]


def read_stop(value: Any) -> tuple[str, ...] | tuple[int, ...]:
    """What ends a sample, from a string, strings or token ids. Raises ValueError, for pydantic."""
    stops = [value] if isinstance(value, str) else value
    kinds = set(map(type, stops)) if isinstance(stops, (list, tuple)) else {dict}
    if not (kinds <= {str} or kinds <= {int}) or len(stops) > MAX_STOPS:
        raise not_allowed(f"a string, or up to {MAX_STOPS} strings or token ids")
    if kinds == {int}:
        return tuple(list_array(stops, "int64").tolist())
    if any(len(text) > TEXT_LENGTH for text in stops):
        raise not_allowed(f"strings of at most {TEXT_LENGTH} characters")
    try:
        "".join(stops).encode()
    except UnicodeEncodeError:
        raise not_allowed("text that is valid Unicode") from None
    return tuple(stops)


# ---- requests


class ModelRequest(JsonMessage):
    """What every request to a model needs: which model it is for, and its place in the order."""

    model_id: Id
    seq_id: int = Field(ge=1, le=INT32_MAX)


class NewModelRequest(JsonMessage):
    """What a request for a new model needs."""

    session_id: Id
    model_seq_id: Count

    @property
    def model_id(self) -> str:
        """The id that the protocol prescribes."""
        return f"{self.session_id}:train:{self.model_seq_id}"


class PromptChunk(JsonMessage):
    """A part of a prompt. Release 0.3.0 leaves the type out where it is the default."""

    type: str = "encoded_text"
    tokens: Annotated[np.ndarray, PlainValidator(lambda value: list_array(value, "int64"))]

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Images and audio are refused by name."""
        if value.get("type") not in (None, "encoded_text"):
            raise refused(f"is {short_repr(value['type'])}; allowed: encoded_text, the models here read tokens only")
        return super().prepare(value)


class _Prompt(JsonMessage):
    chunks: Annotated[list[PromptChunk], FailFast()]


def _read_tokens(value: Any, read: Any) -> Ints:
    if isinstance(value, np.ndarray):  # made here, not by a client
        return value
    parts = [chunk.tokens for chunk in read(value).chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


# The token ids [n] int64 of {"chunks": [...]}.
Tokens = Annotated[
    np.ndarray,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_wrap_validator_function(_read_tokens, handler(_Prompt)),
    ),
]


def _read_targets(tensor: Tensor) -> Tensor:
    if tensor.values.dtype.kind != "i" or tensor.values.ndim != 2:
        raise refused("allowed: int64 of two dimensions, [prompt length - 1, K]")
    return tensor


# ---- requests for training


class LoraSettings(JsonMessage):
    """rank 0 stands for no lora_config at all: all parameters are trained."""

    rank: Count
    seed: Seed | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True

    @model_validator(mode="after")
    def _trains_something(self) -> LoraSettings:
        if self.rank and not (self.train_mlp or self.train_attn or self.train_unembed):
            raise refused("trains nothing; set one of train_mlp, train_attn, train_unembed")
        return self


ALL_PARAMETERS = LoraSettings(rank=0)


class OptimizerConfig(JsonMessage):
    """Another family than adamw is refused by name later, through the future, so its fields are not read."""

    type: Name = "adamw"

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Other families go to the worker, which refuses them."""
        kind = value.get("type")
        return super().prepare({"type": kind} if isinstance(kind, str) and kind != "adamw" else value)


class CreateModel(NewModelRequest, operation="create_model"):
    identity = NewModelRequest
    blank = {"base_model": ""}

    base_model: Text
    lora_config: LoraSettings = ALL_PARAMETERS
    optimizer_config: OptimizerConfig = OptimizerConfig()
    user_metadata: Metadata = {}
    problem: str = Field("", exclude=True)


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise not_allowed("a number, 0 or infinity = no clipping")
    return value


class AdamSettings(JsonMessage):
    """The numbers of an AdamW step, with the protocol's defaults. grad_clip_norm: 0 and infinity clip nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: Annotated[float, Field(allow_inf_nan=True), AfterValidator(_not_nan)] = 0.0

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Clients leave out what they do not set: their null is a NaN that JSON could not hold."""
        if nulls := sorted(name for name, item in value.items() if item is None and name in cls.model_fields):
            raise refused(f"has {short_repr(nulls[0])}: null (a NaN?); allowed: a finite number")
        return value


class OptimizerSettings(OptimizerConfig, AdamSettings):
    """The same with the name of its family, which has to be there."""

    type: Name


class OptimStep(ModelRequest, operation="optim_step"):
    identity = ModelRequest

    adam_params: AdamSettings | None = None
    optimizer_params: OptimizerSettings | None = None
    problem: str = Field("", exclude=True)

    @model_validator(mode="after")
    def _one_of_both(self) -> OptimStep:
        if (self.adam_params is None) == (self.optimizer_params is None):
            raise refused("needs one of adam_params and optimizer_params, not both")
        return self


def _check_name(value: str) -> str:
    if not CHECKPOINT_NAME.fullmatch(value):
        raise not_allowed("a name of up to 200 letters, digits and _ . + = @ -, beginning with a letter, a digit or _")
    return value


CheckpointName = Annotated[Text, AfterValidator(_check_name)]


class SaveWeights(ModelRequest, operation="save_weights"):
    """save_weights: a training checkpoint. `name` None: an ephemeral snapshot, for which a sampling session
    `sampling_session_seq_id` is made; only SaveWeightsForSampler has it.

    All three kinds of saves have all fields, so that those who save need not tell them apart; clients may give those
    that are not in `others`.
    """

    identity = ModelRequest
    blank = {"name": None}
    kind: ClassVar[CheckpointKind] = "weights"
    others: ClassVar[frozenset[str]] = frozenset({"sampling_session_seq_id", "kind", "age_encryption_recipients"})

    name: CheckpointName | None = Field(alias="path")
    sampling_session_seq_id: int | None = Field(None, ge=0, le=INT64_MAX)
    snapshot_kind: Literal["snapshot", "inflight"] = Field("snapshot", alias="kind")  # the two are the same here
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata = {}
    age_recipients: list[Annotated[str, StringConstraints(min_length=1, max_length=KEY_LENGTH)]] = Field(
        [], alias="age_encryption_recipients", max_length=64
    )
    problem: str = Field("", exclude=True)

    @classmethod
    @cache
    def known(cls) -> frozenset[str]:
        """Without those of the other kinds of saves."""
        return super().known() - cls.others


class SaveWeightsForSampler(SaveWeights, operation="save_weights_for_sampler"):
    """save_weights_for_sampler, with a name or, without, for a sampling session. An inflight save is a snapshot like
    any other."""

    kind = "sampler_weights"
    others = frozenset({"overwrite", "age_encryption_recipients"})

    name: CheckpointName | None = Field(None, alias="path")

    @model_validator(mode="after")
    def _name_or_session(self) -> SaveWeightsForSampler:
        if (self.name is None) == (self.sampling_session_seq_id is None):
            raise refused("needs one of path and sampling_session_seq_id, not both")
        return self


class SaveWeightsExternal(SaveWeights, operation="save_weights_external"):
    """save_weights_external: an export for other programs, encrypted for `age_recipients` if there are any."""

    kind = "external_weights"
    others = frozenset({"overwrite", "user_metadata", "sampling_session_seq_id", "kind"})


class _LoadIdentity(JsonMessage, operation="load_weights"):
    """Into a model (model_id, seq_id), or as a new model of a session (session_id, model_seq_id)."""

    model_id: Id | None = None
    seq_id: int | None = Field(None, ge=1, le=INT32_MAX)
    session_id: Id | None = None
    model_seq_id: Count | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _LoadIdentity:
        if (self.model_id is None) == (self.session_id is None):
            raise refused("needs one of model_id (with seq_id) and session_id (with model_seq_id)")
        needed, other = ("seq_id", "model_seq_id") if self.model_id is not None else ("model_seq_id", "seq_id")
        if getattr(self, needed) is None:
            raise refused(f"needs {needed}: it is missing")
        if getattr(self, other) is not None:
            raise refused(f"has {other}, which does not belong to {needed}; leave it out")
        return self


class LoadWeights(_LoadIdentity):
    """load_weights. Release 0.3.0 sends no `optimizer`: its load_state is its one way to resume, so the optimizer's
    state is loaded too."""

    identity = _LoadIdentity
    blank = {"path": "", "optimizer": False}

    path: Text
    optimizer: bool = True
    base_model: Text | None = None
    user_metadata: Metadata = {}
    optimizer_config: OptimizerConfig = OptimizerConfig()
    weights_access_token: Any = None
    problem: str = Field("", exclude=True)

    @model_validator(mode="after")
    def _own_checkpoint(self) -> LoadWeights:
        if self.weights_access_token is not None:
            raise refused("has weights_access_token, which is not supported; only your own checkpoints load")
        return self


class UnloadModel(JsonMessage, operation="unload_model"):
    """unload_model. It has no seq_id to waste, so anything wrong refuses it."""

    problem: ClassVar[str] = ""
    model_id: Id


class SamplingSettings(JsonMessage):
    """stop: None = the tokenizer's end of sequence; a tuple of strings or of token ids otherwise."""

    max_tokens: Count | None = None
    seed: Seed | None = None
    stop: Annotated[tuple[str, ...] | tuple[int, ...], PlainValidator(read_stop)] | None = None
    temperature: float = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] = -1
    top_p: float = 1.0


class _SampleIdentity(JsonMessage, operation="sample"):
    """Which weights. seq_id is -1 where an old release sends none: such a request has no sampling session and is never
    taken for a repetition."""

    sampling_session_id: Text | None = None
    base_model: Text | None = None
    model_path: Text | None = None
    seq_id: int = Field(-1, ge=0, le=INT64_MAX)

    @model_validator(mode="after")
    def _has_weights(self) -> _SampleIdentity:
        if not (self.sampling_session_id or self.base_model or self.model_path):
            raise refused("needs one of sampling_session_id, base_model, model_path")
        if self.sampling_session_id is not None and self.seq_id < 0:
            raise refused("needs seq_id with sampling_session_id: seq_id is missing")
        return self


class SamplingRequest(_SampleIdentity, large=True):
    """asample. target_tokens [len(prompt) - 1, K] int64, -1 = skip; where they came sparse, the answer is too. stream:
    its reader takes tokens while they are drawn (RequestScheduler.on_tokens)."""

    identity = _SampleIdentity
    blank = {"prompt": np.zeros(0, np.int64)}

    sampling_params: SamplingSettings = SamplingSettings()
    num_samples: int = Field(1, ge=1, le=MAX_SAMPLES)
    prompt: Tokens
    prompt_logprobs: bool = False
    topk_prompt_logprobs: Count = 0
    topk_sample_logprobs: Count = 0
    prompt_alt_tokens_k: Count = 0
    prompt_logprobs_last_n: Count | None = None
    record_stability_info: bool = False  # so that training requests can name the sequences (sampling.Recordings)
    target_tokens: Annotated[Tensor, tensor_field(-1), AfterValidator(_read_targets)] | None = Field(
        None, alias="target_prompt_logprobs"
    )
    stream: bool = Field(False, exclude=True)
    problem: str = Field("", exclude=True)

    @property
    def targets(self) -> np.ndarray | None:
        """What target_tokens names, dense."""
        return None if self.target_tokens is None else self.target_tokens.values

    @property
    def targets_csr(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(crow, col) of target_tokens that came sparse."""
        return None if self.target_tokens is None else self.target_tokens.csr

    @model_validator(mode="after")
    def _supported(self) -> SamplingRequest:
        if self.record_stability_info and self.sampling_session_id is None:
            raise refused("has record_stability_info without sampling_session_id: a session keeps what is recorded")
        return self


@dataclass(frozen=True)
class ProvenanceSpan:
    """`length` tokens of a datum that are those from `offset` on of a recorded sequence: of what was drawn, or else of
    its prompt."""

    sampled: bool
    sequence_id: str
    offset: int
    length: int


@dataclass(frozen=True)
class RecordedSequence:
    """What was drawn [n] with its log-probabilities [n], how long the prompt was, and of which weights: the base (""),
    a snapshot's sampling session, or a checkpoint's path and version. `size`: bytes, about."""

    prompt_length: int
    tokens: Ints
    logprobs: Floats
    weights: str

    @property
    def size(self) -> int:
        return 512 + self.tokens.nbytes + self.logprobs.nbytes


@dataclass(frozen=True)
class WireDatum:
    """One row: tokens [N] int64 and the loss's inputs, dense: int64 or float32, [N] or [N, K]. Sparse CSR inputs
    are expanded already (absent cells: token 0, weight 0). Spans say where tokens and targets came from, one after the
    other, [] where the client does not say it."""

    tokens: Ints
    inputs: dict[str, np.ndarray]
    token_spans: Sequence[ProvenanceSpan] = ()
    target_spans: Sequence[ProvenanceSpan] = ()


@dataclass(frozen=True)
class TrainRequest:
    """forward_backward, or forward with `forward_only`. It comes as protobuf (codec.py), from old releases as JSON."""

    model_id: str
    seq_id: int
    data: list[WireDatum]
    loss_fn: str
    loss_config: LossConfig
    forward_only: bool
    problem: str = ""


Request = TrainRequest | CreateModel | OptimStep | SaveWeights | LoadWeights | UnloadModel | SamplingRequest


# ---- results


@dataclass
class TrainResult:
    """Of one request: logprobs[i] float32 [N] or [N, K] per datum; metrics with "loss:sum", one colon in each name."""

    logprobs: list[Floats]
    metrics: Metrics


@dataclass
class TopK:
    """The k likeliest tokens at each position: ids int32 [L, k], logprobs float32 [L, k]. Empty cell: token 0,
    logprob -99999.0; a position without a value has only such cells."""

    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass
class SampledSequence:
    """tokens [n] int64, stop tokens included, and their logprobs at the sampling temperature, under the weights of
    `version`."""

    tokens: Ints
    logprobs: Floats
    stop_reason: Literal["stop", "length"]
    topk: TopK | None = None
    version: int = 0


@dataclass
class SampleResult:
    """prompt_logprobs [len(prompt)] float32, NaN = missing; targets as SamplingRequest.targets, 0.0 where skipped;
    alt_tokens int64 and alt_logprobs float32 [len(prompt) - 1, k]."""

    sequences: list[SampledSequence]
    prompt_logprobs: Floats | None = None
    topk_prompt: TopK | None = None
    targets: np.ndarray | None = None
    targets_csr: tuple[np.ndarray, np.ndarray] | None = None
    alt_tokens: np.ndarray | None = None
    alt_logprobs: np.ndarray | None = None
    cache_hit_tokens: int = 0


Result = TrainResult | SampleResult | dict[str, Any]  # a dict is the JSON answer as it is


@dataclass(frozen=True)
class RequestOutcome:
    """What is known of a future. unknown: never heard of, of another owner, or thrown away (HTTP 410)."""

    state: Literal["done", "failed", "pending", "unknown"]
    result: Result | None = None
    error: str = ""
    category: Category = "unknown"
    reason: str = ""


@dataclass
class ServerInfo:
    """What the server is, for capabilities, get_info and checks. `aliases`: every name that clients may ask for. The
    fields with defaults are the model's own, known once it is loaded (AppState.loaded)."""

    aliases: dict[str, Path]
    model_path: str
    tokenizer_id: str
    full_parameters: bool
    arch: str = ""
    max_context: int = 0
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    adaptable: bool = False  # whether LoRA is available
