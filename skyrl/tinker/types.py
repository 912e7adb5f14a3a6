"""What a Tinker script hands in and gets back: the public SDK's names and fields, as plain dataclasses.

The SDK's own objects are taken as well: everything here is read by attribute. Answers about sessions, runs and
checkpoints are in records.py. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from skyrl.service.messages import TopK as TopkLogprobs
from skyrl.service.wire_encode import topk_rows
from skyrl.service.wire_fields import DTYPES, Room, expand_csr
from skyrl.tinker.records import (
    Checkpoint,
    CheckpointsListResponse,
    CopyWeightsResponse,
    CurrentCheckpointStorageUsageResponse,
    Cursor,
    ExternalWeightsUrlsResponse,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ModelData,
    ParsedCheckpointTinkerPath,
    SessionSummary,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)

__all__ = [
    "AdamOptimizerConfig", "AdamParams", "Checkpoint", "CheckpointsListResponse", "CopyWeightsResponse",
    "CurrentCheckpointStorageUsageResponse", "Cursor", "Datum", "EncodedTextChunk", "ExternalWeightsUrlsResponse",
    "ForwardBackwardOutput", "GetInfoResponse", "GetSamplerResponse", "GetServerCapabilitiesResponse",
    "GetSessionResponse", "ListSessionsResponse", "LoadWeightsResponse", "LoraConfig", "ModelData", "ModelInput",
    "OptimStepResponse", "ParsedCheckpointTinkerPath", "PromptAltTokens", "SampleResponse", "SampledSequence",
    "SamplingParams", "SaveWeightsExternalResponse", "SaveWeightsForSamplerResponse", "SaveWeightsResponse",
    "SessionSummary", "SupportedModel", "TensorData", "TopkLogprobs", "TrainingRun", "TrainingRunsResponse",
    "WeightsInfoResponse",
]  # fmt: skip

TensorDtype = Literal["float32", "int64"]
StopReason = Literal["stop", "length"]
INTEGERS = ("target_tokens",)  # inputs of losses; all others are float32
SPARSE = ("target_tokens", "weights")  # those that a two-dimensional torch tensor may shrink to CSR
NO_LIMIT = 1 << 62


# ---- what goes in


@dataclass(frozen=True)
class EncodedTextChunk:
    """Token ids."""

    tokens: Sequence[int]
    type: str = "encoded_text"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """A prompt or a row's input: chunks of tokens, one after the other."""

    chunks: list[EncodedTextChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """One chunk of these tokens."""
        return cls([EncodedTextChunk(tokens)])

    @classmethod
    def empty(cls) -> ModelInput:
        """Nothing yet."""
        return cls([])

    def to_ints(self) -> list[int]:
        """All tokens."""
        return [int(token) for chunk in self.chunks for token in chunk.tokens]

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """This input with a chunk more."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """This input with a token more."""
        return self.append(EncodedTextChunk([token]))

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)


class TensorData:
    """A float32 or int64 array, or (both sparse_* given) a CSR matrix of `shape` whose listed cells are `data`."""

    def __init__(
        self,
        data: Any = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"TensorData: dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
        if (sparse_crow_indices is None) != (sparse_col_indices is None):
            raise ValueError("TensorData: sparse_crow_indices and sparse_col_indices belong together")
        values = np.asarray([] if data is None else data).astype(DTYPES[dtype], copy=False)
        if sparse_crow_indices is None and shape is not None:
            values = values.reshape(tuple(shape))
        self.dtype: TensorDtype = dtype
        self.shape = None if shape is None else list(shape)
        self.sparse_crow_indices, self.sparse_col_indices = sparse_crow_indices, sparse_col_indices
        self._numpy = values

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape})"

    @property
    def data(self) -> list[Any]:
        """All numbers, flat."""
        return self._numpy.ravel().tolist()

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Of an array of floats (kept as float32) or integers (kept as int64)."""
        if array.dtype.kind not in "fiu":
            raise ValueError(f"TensorData: dtype {array.dtype}; allowed: floats and integers")
        return cls(array, "float32" if array.dtype.kind == "f" else "int64", array.shape)

    @classmethod
    def from_torch(cls, tensor: Any) -> TensorData:
        """Of a torch tensor of any float or integer type."""
        tensor = tensor.detach().cpu()
        return cls.from_numpy((tensor.float() if tensor.is_floating_point() else tensor).numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: Any, pad_value: int = 0) -> TensorData:
        """As from_torch; a matrix that is smaller as CSR, its cells of `pad_value` left out, is kept so."""
        whole = cls.from_torch(tensor)
        values = whole._numpy
        kept = values != pad_value
        if values.ndim != 2 or len(values) + 1 + 2 * int(kept.sum()) >= values.size:
            return whole
        crow = np.concatenate([[0], kept.sum(1).cumsum()]).tolist()
        return cls(values[kept], whole.dtype, values.shape, crow, np.nonzero(kept)[1].tolist())

    def to_numpy(self, pad_value: int = 0) -> np.ndarray:
        """The whole array; cells that a CSR matrix does not list hold `pad_value`."""
        if self.sparse_crow_indices is None:
            return self._numpy
        crow, col = (np.asarray(x, np.int64) for x in (self.sparse_crow_indices, self.sparse_col_indices))
        return expand_csr(self._numpy, crow, col, tuple(self.shape or ()), pad_value, "TensorData", Room(NO_LIMIT))

    def to_torch(self, pad_value: int = 0) -> Any:
        """As to_numpy, as a torch tensor of its own."""
        import torch

        return torch.from_numpy(self.to_numpy(pad_value).copy())

    def tolist(self, pad_value: int = 0) -> list[Any]:
        """As to_numpy, nested lists."""
        return self.to_numpy(pad_value).tolist()


@dataclass(frozen=True)
class Datum:
    """One row: its input, and the loss's inputs by name; arrays, torch tensors and lists become TensorData."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, Any] = field(default_factory=dict)
    model_input_spans: Any = None  # where tokens came from: nothing here reads it
    loss_fn_input_spans: Any = None

    def __post_init__(self) -> None:
        inputs = {name: to_tensor(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", inputs)


def to_tensor(name: str, value: Any) -> Any:
    """TensorData (ours or the SDK's) as it is; anything else as the loss input `name` needs it. Raises ValueError for
    what is no rectangle of numbers."""
    if hasattr(value, "to_numpy") and hasattr(value, "dtype"):
        return value
    if hasattr(value, "detach"):
        return TensorData.from_torch_sparse(value) if name in SPARSE else TensorData.from_torch(value)
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    try:
        array = np.asarray(value, np.int64 if name in INTEGERS else np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"loss_fn_inputs {name!r}: needs a rectangle of numbers ({error})") from error
    return TensorData.from_numpy(array)


@dataclass(frozen=True)
class SamplingParams:
    """How to draw. stop None: the end of sequence; top_k -1: off."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step; grad_clip_norm 0: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class AdamOptimizerConfig:
    """The optimizer of a model; the only one here."""

    type: str = "adamw"


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's form."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


# ---- what comes out


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """loss_fn_outputs: per datum {"logprobs": TensorData}; metrics: "loss:sum" and others."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimStepResponse:
    """metrics: "grad_norm", "lr"."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SampledSequence:
    """One sample: tokens, stop tokens included, and their log-probabilities at the sampling temperature."""

    stop_reason: StopReason
    sequence_id: str
    tokens_np: np.ndarray
    logprobs_np: np.ndarray
    topk_logprobs_np: TopkLogprobs | None = None

    @cached_property
    def tokens(self) -> list[int]:
        """As a list."""
        return self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float]:
        """As a list."""
        return self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """Per token the likeliest (token, log-probability); None when not asked."""
        return None if self.topk_logprobs_np is None else topk_rows(self.topk_logprobs_np)


@dataclass(frozen=True)
class PromptAltTokens:
    """Draws at each prompt position after the first: two tensors [len(prompt) - 1, k]."""

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True)
class SampleResponse:
    """The samples, and what was asked about the prompt. prompt_logprobs_np: NaN where there is none."""

    sequences: list[SampledSequence]
    prompt_logprobs_np: np.ndarray | None = None
    topk_prompt_logprobs_np: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        """As a list, None where there is none."""
        if self.prompt_logprobs_np is None:
            return None
        return [None if value != value else value for value in self.prompt_logprobs_np.tolist()]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """Per prompt position the likeliest (token, log-probability)."""
        return None if self.topk_prompt_logprobs_np is None else topk_rows(self.topk_prompt_logprobs_np)


@dataclass(frozen=True)
class SaveWeightsResponse:
    """Where a training checkpoint is: tinker://run/weights/name."""

    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    """Where a checkpoint to sample from is."""

    path: str


@dataclass(frozen=True)
class SaveWeightsExternalResponse:
    """Where an export is."""

    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    """What was loaded into which model."""

    path: str | None = None
    model_id: str | None = None
