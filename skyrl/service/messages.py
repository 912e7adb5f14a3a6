"""What the parts of the service hand to each other. Plain data: imports neither torch nor a web framework.

    app (HTTP, own thread) -> wire (bytes to these types) -> desk (order, futures) -> worker (rank 0's main thread)
    -> leader (commands to all ranks) -> engine; results come back as the types at the end of this file.

A refusal that concerns the content of a request is a `RequestFailed` through its future; a malformed request is a
UserError at submission (HTTP 400).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skyrl.types import Floats, Ints, Metrics

Category = Literal["user", "server", "unknown"]
CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]
LossConfig = dict[str, float | str]


class RequestFailed(Exception):
    """A request that was accepted and then failed: the text and category that its future tells."""

    def __init__(self, message: str, category: Category = "user") -> None:
        super().__init__(message)
        self.message, self.category = message, category


class TooManyRequests(Exception):
    """Too much work is waiting: HTTP 429. The text says what and how much."""


# ---- requests, as wire makes them. `None` = absent.
#
# `problem`, where a request has it: "" or what is wrong with the content of a request that is otherwise well
# identified. The worker fails the future with this text, category user, and runs nothing: the other fields may be
# incomplete then. (A refusal at submission would use up the client's seq_id.)


@dataclass(frozen=True)
class WireDatum:
    """One row: tokens [N] int64 and the loss's inputs, dense: int64 or float32, [N] or [N, K]. Sparse CSR inputs
    are expanded already (absent cells: token 0, weight 0)."""

    tokens: Ints
    inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainRequest:
    """forward_backward, or forward with `forward_only`."""

    model_id: str
    seq_id: int
    data: list[WireDatum]
    loss_fn: str
    loss_config: LossConfig
    forward_only: bool
    problem: str = ""


@dataclass(frozen=True)
class CreateModel:
    """create_model. rank 0 asks for training of all parameters."""

    session_id: str
    model_seq_id: int
    base_model: str
    rank: int
    seed: int | None
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    optimizer: str  # "adamw"; another type is refused through the future
    user_metadata: dict[str, str]
    problem: str = ""

    @property
    def model_id(self) -> str:
        """The id that the protocol prescribes."""
        return f"{self.session_id}:train:{self.model_seq_id}"


@dataclass(frozen=True)
class OptimStep:
    """optim_step with the protocol's defaults filled in. `optimizer` other than "adamw" is refused."""

    model_id: str
    seq_id: int
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class SaveWeights:
    """save_weights, save_weights_for_sampler and save_weights_external. name None: an ephemeral snapshot, for which
    a sampling session `sampling_session_seq_id` is made."""

    model_id: str
    seq_id: int
    kind: CheckpointKind
    name: str | None
    sampling_session_seq_id: int | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] = field(default_factory=dict)
    age_recipients: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class LoadWeights:
    """load_weights: into `model_id`, or (model_id None) as a new model of a session."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    optimizer_type: str = "adamw"
    problem: str = ""


@dataclass(frozen=True)
class UnloadModel:
    """unload_model."""

    model_id: str


@dataclass(frozen=True)
class SamplingRequest:
    """asample. `stop`: None = the tokenizer's end of sequence; a tuple of strings or of token ids otherwise.

    targets [len(prompt) - 1, K] int64, -1 = skip; `targets_csr` keeps (crow, col) when it came sparse, since the
    answer has the same layout. stream: its reader takes tokens while they are drawn (RequestScheduler.on_tokens).
    """

    seq_id: int
    prompt: Ints
    sampling_session_id: str | None = None
    base_model: str | None = None
    model_path: str | None = None
    num_samples: int = 1
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | tuple[int, ...] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    targets: np.ndarray | None = None
    targets_csr: tuple[np.ndarray, np.ndarray] | None = None
    prompt_alt_tokens_k: int = 0
    stream: bool = False
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
    """tokens [n] int64, stop tokens included, and their logprobs at the sampling temperature."""

    tokens: Ints
    logprobs: Floats
    stop_reason: Literal["stop", "length"]
    topk: TopK | None = None


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
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"
    reason: str = ""


@dataclass(frozen=True)
class ServerInfo:
    """What the server is, for capabilities, get_info and checks. `aliases`: every name that clients may ask for."""

    aliases: dict[str, Path]
    model_path: str
    tokenizer_id: str
    arch: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    adaptable: bool  # whether LoRA is available
    full_parameters: bool
