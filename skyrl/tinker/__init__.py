"""The Tinker client without a server: the same script, inside a torchrun program of its own.

    from skyrl import tinker            # instead of: import tinker
    from skyrl.tinker import types

    with tinker.ServiceClient(model={"path": "..."}) as client:
        model = client.create_lora_training_client(base_model="...", rank=32)
        ...

Names, arguments, defaults and results are those of the public SDK, whose own types are taken too. Requests go to the
desk of the service in this process and never through HTTP. See ServiceClient for what happens on several ranks.
"""

from skyrl.tinker import types
from skyrl.tinker.futures import (
    APIError,
    APIFuture,
    APIStatusError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
    RequestFailedError,
    TinkerError,
)
from skyrl.tinker.sampling_client import SamplingClient
from skyrl.tinker.service_client import RestClient, ServiceClient
from skyrl.tinker.training_client import TrainingClient
from skyrl.tinker.types import (
    AdamOptimizerConfig,
    AdamParams,
    Checkpoint,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
    TrainingRun,
)

__all__ = [
    "APIError", "APIFuture", "APIStatusError", "AdamOptimizerConfig", "AdamParams", "BadRequestError", "Checkpoint",
    "Datum", "EncodedTextChunk", "ForwardBackwardOutput", "InternalServerError", "LoraConfig", "ModelInput",
    "NotFoundError", "OptimStepResponse", "ParsedCheckpointTinkerPath", "RateLimitError", "RequestFailedError",
    "RestClient", "SampleResponse", "SampledSequence", "SamplingClient", "SamplingParams", "ServiceClient",
    "TensorData", "TinkerError", "TrainingClient", "TrainingRun", "types",
]  # fmt: skip
