"""Options of `skyrl.serve`: a root of its own, the rules between them, and the RunConfig that the engine is built from.

Imports without torch. Everything that also exists for a run (model, strategy, the sampler's memory) has the same name
and meaning here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from skyrl.config import validation
from skyrl.config.options import all_options
from skyrl.config.schema import (
    BatchConfig,
    DataConfig,
    DebugConfig,
    ModelConfig,
    RunConfig,
    RunFolderConfig,
    SamplerConfig,
    StrategyConfig,
)
from skyrl.types import UserError

# Requests on their way on one rank do not follow from a batch here: enough for any number of ranks.
MANY_PROMPTS = 1 << 20
TYPICAL_ROW = 1024


@dataclass(frozen=True)
class ServeSamplerConfig:
    """Memory and speed of generation. What is drawn, and how, comes with each request."""

    backend: str = "auto"
    """auto; module (the model's own forward); fused (a decode plan over the same parameters, common architectures)."""
    block_tokens: int = 16
    """Tokens of one KV-cache block."""
    max_running: int = 0
    """Sequences decoded together on one rank; 0 = automatic."""
    kv_cache_gib: float = 0.0
    """Memory of the KV cache on one rank; 0 = automatic (half of what is free on a GPU, at most 1 GiB on a CPU)."""
    prefix_cache: bool = True
    """Lets requests with equal beginnings share blocks."""
    cuda_graphs: bool = True
    """Replays decode steps as CUDA graphs. No effect on a CPU."""


@dataclass(frozen=True)
class ServiceConfig:
    """The front door: address, keys, names, limits and patience."""

    host: str = "127.0.0.1"
    """Address to listen on. Another than loopback needs keys, or allow_anonymous=true."""
    port: int = 8000
    """Port; 0 = any free one, which is printed."""
    folder: str = "service"
    """Where sessions, results and checkpoints are kept; the same folder goes on where it stopped."""
    keys_file: str = ""
    """File with one `name:key` a line; the name owns what is made with the key. "" = SKYRL_API_KEYS (the same, entries
    separated by commas), or no keys at all: then everyone is the owner `local`."""
    allow_anonymous: bool = False
    """Listens on other addresses than loopback without keys: whoever reaches the port may use everything."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names that clients ask for -> weights; "" or model.path = the model served here, and nothing else is possible:
    'service.aliases={Qwen/Qwen3-8B: ""}'."""
    aliases_file: str = ""
    """The same as aliases, as a YAML or JSON mapping in a file; for names with a colon too."""
    tokenizer_id: str = ""
    """What clients load as the tokenizer (folder or hub name); "" = model.tokenizer, or model.path if it is no tiny
    one."""
    max_models: int = 128
    """Models of all clients that may be open at a time."""
    max_resident_models: int = 32
    """Models whose weights and optimizer state stay on the device; the others wait in host memory."""
    max_rank: int = 128
    """Largest LoRA rank that a client may ask for."""
    full_parameters: bool = False
    """Trains all parameters: exactly one model at a time, asked for with LoRA rank 0."""
    mix_tenants: str = "auto"
    """Rows of several models in one forward pass: always, never, or auto (wherever that leaves results bit for bit
    as they are alone)."""
    max_queued_samples: int = 16384
    """Sequences that may wait or run, of all clients; further requests are answered with 429."""
    max_request_mib: int = 64
    """Largest body of one request; a larger one is refused before it is read."""
    max_tokens_per_request: int = 4194304
    """Most tokens of one training request, or of prompt and answers of one sampling request."""
    model_idle_seconds: float = 3600.0
    """Silence of a session (no request, no heartbeat) after which its models are closed; 0 = never."""
    gap_seconds: float = 30.0
    """How long a request waits for one with an earlier number that never came; then it goes on without it."""
    slice_seconds: float = 0.25
    """Longest stretch of sampling before training requests that wait get their turn."""


@dataclass(frozen=True)
class ServeConfig:
    """The whole server."""

    seed: int = 1
    """Keys what no request says: the weights of model.path=tiny, adapters and draws that come without a seed."""
    dry_run: bool = False
    """Checks the options, prints the plan with a memory estimate, and stops."""
    world_size: int = 0
    """Ranks to check the plan for in a dry run; 0 = the real ones. Refused otherwise."""
    threads: int = 0
    """CPU threads of one rank; 0 = automatic (the machine's cores shared by its ranks)."""
    collective_timeout_seconds: int = 300
    """Longest wait for another rank."""
    deterministic: bool = False
    """Deterministic kernels, one order of everything: two servers give the same bits on one machine."""
    max_tokens_per_microbatch: int = 8192
    """Tokens of one forward pass on one rank; no effect on results."""
    max_row_tokens: int = 0
    """Longest row, and longest prompt with its answer; 0 = the model's own limit."""
    model: ModelConfig = field(default_factory=ModelConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    sampler: ServeSamplerConfig = field(default_factory=ServeSamplerConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)


AT_LEAST_ONE = (
    "collective_timeout_seconds max_tokens_per_microbatch sampler.block_tokens service.max_models "
    "service.max_resident_models service.max_rank service.max_queued_samples service.max_request_mib "
    "service.max_tokens_per_request model.tiny.hidden_size model.tiny.num_layers model.tiny.num_heads "
    "model.tiny.num_kv_heads model.tiny.ffn_size"
).split()
ABOVE_ZERO = ("service.gap_seconds", "service.slice_seconds")
CHOICES = {
    "service.mix_tenants": ("auto", "always", "never"),
    **{
        path: validation.CHOICES[path]
        for path in ("model.dtype", "strategy.name", "strategy.device", "sampler.backend")
    },
}
# Where a run has the same option under another name.
RUN_NAMES = {
    "batch.max_tokens_per_microbatch": "max_tokens_per_microbatch",
    "batch.max_row_tokens": "max_row_tokens",
    "run.collective_timeout_seconds": "collective_timeout_seconds",
    "run.world_size": "world_size",
    "run.threads": "threads",
    "debug.deterministic": "deterministic",
}


def to_run_config(cfg: ServeConfig) -> RunConfig:
    """The RunConfig from which an Engine for this server is built.

    Only what Engine, distributed and plan read of it means anything: seed, model, strategy, the sampler's memory,
    batch.max_tokens_per_microbatch, batch.max_row_tokens, debug.deterministic and run.*.
    """
    longest = min(TYPICAL_ROW, cfg.max_row_tokens or TYPICAL_ROW)
    return RunConfig(
        seed=cfg.seed,
        dry_run=cfg.dry_run,
        experiment="serve",
        model=cfg.model,
        strategy=cfg.strategy,
        sampler=SamplerConfig(max_new_tokens=1, **dataclasses.asdict(cfg.sampler)),
        batch=BatchConfig(
            prompts_per_step=MANY_PROMPTS,
            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
            max_row_tokens=cfg.max_row_tokens,
        ),
        data=DataConfig(max_prompt_tokens=max(0, longest - 1)),
        debug=DebugConfig(deterministic=cfg.deterministic),
        run=RunFolderConfig(
            name="serve",
            dir=cfg.service.folder,
            resume="never",
            world_size=cfg.world_size,
            threads=cfg.threads,
            collective_timeout_seconds=cfg.collective_timeout_seconds,
        ),
    )


def check_serve(cfg: ServeConfig) -> None:
    """Raises UserError for the first rule that `cfg` breaks, whatever the number of ranks."""
    for problem in _problems(cfg):
        raise UserError(problem)
    in_our_words(lambda: validation.check(to_run_config(cfg)))


def in_our_words(call: Any) -> Any:
    try:
        return call()
    except UserError as error:
        text = str(error)
        for theirs, ours in RUN_NAMES.items():
            text = text.replace(theirs, ours)
        raise UserError(text) from error


def _value(cfg: ServeConfig, path: str) -> Any:
    value: Any = cfg
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _problems(cfg: ServeConfig) -> Iterator[str]:
    for known in all_options(ServeConfig):
        value = _value(cfg, known.path)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{known.path}={value}: must be a finite number (default {known.default!r})"
        if isinstance(value, (int, float)) and value < 0:
            yield f"{known.path}={value}: must not be negative (default {known.default!r})"
    for path in AT_LEAST_ONE:
        if _value(cfg, path) < 1:
            yield f"{path}={_value(cfg, path)}: must be at least 1"
    for path in ABOVE_ZERO:
        if not _value(cfg, path) > 0:
            yield f"{path}={_value(cfg, path)}: must be above 0"
    for path, allowed in CHOICES.items():
        if _value(cfg, path) not in allowed:
            yield f"{path}={_value(cfg, path)}: choose one of: {', '.join(allowed)}"
    service = cfg.service
    if service.port > 65535:
        yield f"service.port={service.port}: must be at most 65535; 0 = any free one"
    for path in ("host", "folder"):
        if not getattr(service, path):
            yield f"service.{path}: empty; leave it out for {getattr(ServiceConfig, path)!r}"
    yield from alias_problems(cfg, service.aliases, "service.aliases")
    if cfg.model.lora.rank:
        yield (
            f"model.lora.rank={cfg.model.lora.rank}: clients of a server ask for adapters themselves "
            "(create_lora_training_client); leave it out"
        )
    if cfg.max_row_tokens == 1:
        yield "max_row_tokens=1: leaves no room for an answer; give at least 2, or 0 for the model's own limit"


def alias_problems(cfg: ServeConfig, aliases: dict[str, str], where: str) -> Iterator[str]:
    """One line for each alias that cannot be kept; `where` names the option or file they come from."""
    for name, path in aliases.items():
        if not name:
            yield f"{where}: an empty name; write the name that clients ask for"
        if path not in ("", cfg.model.path):
            yield (
                f"{where}: {name} is to be {path}, but this server has one model, model.path={cfg.model.path}; give "
                '"", or start another server for it'
            )
