"""How much memory one rank needs, by a written formula, before anything is built. Needs torch, except for tiny.

All sizes in bytes. Not counted: the interpreter and CUDA context (about 0.5 to 1 GiB), the allocator's fragmentation,
and the rows themselves.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyrl.algorithms.preferences import WITHOUT_REFERENCE
from skyrl.config.schema import RunConfig, TinyModelConfig
from skyrl.config.validation import NO_MODEL, advantage_of
from skyrl.envs.base import group_rewards_of
from skyrl.hub.locate import locate
from skyrl.hub.model_path import ORIGINAL, config_problem, path_problem
from skyrl.hub.policies import POLICIES, policy_path
from skyrl.hub.text_part import text_part
from skyrl.kernels import KEEP_SCORES
from skyrl.planner.device import VARLEN_RELEASE, torch_release
from skyrl.registry.plugins import import_plugins
from skyrl.text.tokenizer import TINY_POSITIONS, TINY_VOCABULARY
from skyrl.types import UserError

GIB = 2**30
BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
LOGITS_CHUNK_BYTES = 64 << 20
CPU_CACHE_LIMIT = GIB
STATES_LIMIT = (GIB, 8 * GIB)  # of linear attention, where the number of sequences is not given: on a CPU, on a GPU
# What configs call the number of experts, and of those that a token visits.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
VISITED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
# Part of a GPU's memory that no plan spends: what the allocator cannot use between its blocks, workspaces of libraries.
SPARE = 0.05
CONTEXT = GIB  # of the CUDA context and the interpreter, before anything of this process is counted


@dataclass(frozen=True)
class ModelSizes:
    """What the plan has to know about a model. `num_parameters` counts tied weights once; `matmul_parameters` are those
    that one token goes through: without an untied input embedding, and with the experts that it visits only. `capped`:
    attention caps its scores. `plain_heads`: it has no sinks, and queries and values of equal sizes. `linear_layers`
    keep, in place of keys and values, `state_numbers` of their matrices and `state_inputs` of their convolution, each,
    of a sequence of any length."""

    name: str
    num_parameters: int
    matmul_parameters: int
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_positions: int
    capped: bool = False
    plain_heads: bool = True
    linear_layers: int = 0
    state_numbers: int = 0
    state_inputs: int = 0
    cache_numbers: int = 0  # kept of one token over all layers; 0: keys and values of each
    num_experts: int = 0  # of a layer
    expert_size: int = 0

    def state_bytes(self, dtype: str, device: str) -> int:
        """What the layers of linear attention keep of one sequence."""
        wide = 8 if dtype == "float64" or (dtype == "float32" and device == "cpu") else 4  # linear_attention.wide_dtype
        return self.linear_layers * (self.state_numbers * wide + self.state_inputs * BYTES[dtype])

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token over all layers."""
        per_layer = 2 * self.num_kv_heads * self.head_size
        return (self.cache_numbers or (self.num_layers - self.linear_layers) * per_layer) * BYTES[dtype]


def model_sizes(cfg: RunConfig) -> ModelSizes:
    """Sizes of model.path: by formula for tiny, else from its config and a model built on the meta device.

    Raises UserError when there is no such model. Reads no weights; a hub name needs the hub, or its cache.
    """
    return tiny_sizes(cfg.model.tiny) if cfg.model.path == "tiny" else _sizes_of(cfg)


def tiny_sizes(tiny: TinyModelConfig) -> ModelSizes:
    """The Qwen3 that model.path=tiny builds: tied embeddings, no biases, norms on queries and keys."""
    hidden, head = tiny.hidden_size, tiny.hidden_size // tiny.num_heads
    vocab = tiny.vocab_size or len(TINY_VOCABULARY)
    attention = 2 * hidden * head * (tiny.num_heads + tiny.num_kv_heads)
    layer = attention + 3 * hidden * tiny.ffn_size + 2 * hidden + 2 * head
    parameters = vocab * hidden + tiny.num_layers * layer + hidden
    return ModelSizes(
        name="tiny",
        num_parameters=parameters,
        matmul_parameters=parameters,
        num_layers=tiny.num_layers,
        hidden_size=hidden,
        ffn_size=tiny.ffn_size,
        num_heads=tiny.num_heads,
        num_kv_heads=tiny.num_kv_heads,
        head_size=head,
        vocab_size=vocab,
        max_positions=TINY_POSITIONS,
    )


def _sizes_of(cfg: RunConfig) -> ModelSizes:
    from huggingface_hub import try_to_load_from_cache

    import_plugins(cfg.plugins)
    path = policy_path(cfg.model.path) if cfg.model.path in POLICIES else cfg.model.path
    folder = Path(path)
    if not path:
        raise UserError(NO_MODEL)
    local = path.startswith((".", "/", "~")) or path.count("/") != 1
    # What begins with a folder of ours is a mistyped path more often than a hub name, which the hub's cache would have.
    doubtful = not local and "/" in path and Path(folder.parts[0]).is_dir()
    doubtful = doubtful and not isinstance(try_to_load_from_cache(path, "config.json"), str)
    if (local or doubtful) and not folder.exists():
        fetched = f", fetched before (hf download {path})" * doubtful
        raise UserError(
            f"model.path={path}: no such folder; give tiny, a folder in Hugging Face format or a hub name (org/name)"
            + fetched
        )
    if problem := path_problem(path):
        raise UserError(f"model.path={path}: {problem}")
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            f"model.path={path}: its size needs torch and transformers ({error}); install skyrl whole"
        ) from error
    source = locate(path, cfg.model.revision, weights=False)
    trust = cfg.model.trust_remote_code
    try:
        # the file's own dtype may be "auto", which is none
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, dtype=torch.float32)
        if problem := config_problem(config.to_dict()):
            raise UserError(f"model.path={path}: {problem}")
        config = text_part(config)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except UserError:
        raise
    except Exception as error:  # whatever a class makes of values that it did not expect, and code of the folder
        if "gguf" in path.lower():
            raise UserError(
                f"model.path={path}: by its name GGUF files on a hub; fetch one of them and give the path of that file"
            ) from error
        if named := re.search("onnx|mlx", path, re.I):
            raise UserError(
                f"model.path={path}: by its name {named[0]} weights, which cannot be trained; {ORIGINAL}"
            ) from error
        reason = " ".join(f"{type(error).__name__} {error}".split()).partition(". ")[0][:200]
        raise UserError(
            f"model.path={path}: no model can be read there ({reason}); give tiny, a folder in Hugging Face format, or "
            "a hub name that this machine can reach or has in its cache"
        ) from error
    text, heads = config, config.num_attention_heads
    # A mixture of experts runs some of its experts on each token.
    ffn = _first(text, "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff")
    ffn = ffn or 4 * text.hidden_size
    experts = _first(text, *EXPERTS) or 0
    active = _first(text, *VISITED) or 1
    return ModelSizes(
        name=text.model_type,
        num_parameters=sum(p.numel() for p in module.parameters()),
        matmul_parameters=_matmul_parameters(module, text),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_size=ffn * active,
        num_heads=heads,
        num_kv_heads=_first(text, "num_key_value_heads") or (1 if _first(text, "multi_query") else heads),
        head_size=_first(text, "head_dim") or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        max_positions=_first(text, "max_position_embeddings") or 1 << 30,
        capped=bool(_first(text, "attn_logit_softcapping")),
        plain_heads=not (
            _first(text, "kv_lora_rank") or any(n.endswith(".sinks") for n, _ in module.named_parameters())
        ),
        cache_numbers=_cache_numbers(text, 1 if _first(text, "multi_query") else heads),
        num_experts=experts,
        expert_size=ffn if experts else 0,
        **_state_sizes(text),
    )


def _state_sizes(text: Any) -> dict[str, int]:
    layers = (getattr(text, "layer_types", None) or []).count("linear_attention")
    if not layers:
        return {}
    if hasattr(text, "linear_head_dim"):  # Kimi Linear: queries, keys and values alike
        key, keys, values = text.linear_head_dim, *[text.linear_num_heads * text.linear_head_dim] * 2
    elif hasattr(text, "linear_num_value_heads"):
        key, values = text.linear_key_head_dim, text.linear_num_value_heads * text.linear_value_head_dim
        keys = text.linear_num_key_heads * key
    else:
        return {}
    channels = 2 * keys + values
    inputs = (text.linear_conv_kernel_dim - 1) * channels
    return {"linear_layers": layers, "state_numbers": values * key, "state_inputs": inputs}


def _first(config: Any, *names: str, layer: int | None = None) -> Any:
    """The first of some fields that a config has: families call the same number by several names. None: it has none.
    Of one that differs from layer to layer (Gemma 4, a list in Gemma 3n) that of `layer`, or the largest."""
    numbers = range(config.num_hidden_layers) if layer is None else [layer]

    def value_of(name: str) -> Any:
        try:
            value = getattr(config, name, None)
            return max(value[number] for number in numbers) if isinstance(value, list) else value
        except RuntimeError:  # how transformers says that there are several
            return max(getattr(config.per_layer_config[number], name) for number in numbers)

    return next((value for value in map(value_of, names) if value), None)


def _cache_numbers(text: Any, heads: int) -> int:
    """Numbers that the sampler keeps of one token over all layers: keys and values; of multi-head latent attention the
    small vector; nothing in layers of linear attention and in those that take the keys and values of earlier ones.
    `heads`: of keys where the config does not say."""
    own = range(text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0))
    kinds = getattr(text, "layer_types", None) or [""] * len(own)
    keeping = [layer for layer in own if kinds[layer] != "linear_attention"]
    if _first(text, "kv_lora_rank"):
        return len(keeping) * (text.kv_lora_rank + text.qk_rope_head_dim)
    size = text.hidden_size // text.num_attention_heads
    return 2 * sum(
        (_first(text, "num_key_value_heads", layer=layer) or heads) * (_first(text, "head_dim", layer=layer) or size)
        for layer in keeping
    )


def _matmul_parameters(module: Any, text: Any) -> int:
    count = sum(p.numel() for p in module.parameters())
    embedding, output = module.get_input_embeddings(), module.get_output_embeddings()
    if output is not None and output.weight is not embedding.weight:
        count -= embedding.weight.numel()
    experts = sum(p.numel() for name, p in module.named_parameters() if ".experts." in name)
    total = _first(text, *EXPERTS)
    if experts and total:
        count -= experts * (total - (_first(text, *VISITED) or total)) // total
    return count


def adapter_parameters(
    sizes: ModelSizes, rank: int, *, mlp: bool = True, attn: bool = True, unembed: bool = True
) -> int:
    """Numbers of one LoRA adapter on linear layers of these kinds: rank * (inputs + outputs) each; a gated MLP,
    whose gate and up are one product in experts."""
    queries, keys = sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
    hidden, ffn = sizes.hidden_size, sizes.ffn_size
    mlp_layer = sizes.num_experts * (2 * hidden + 3 * sizes.expert_size) if sizes.num_experts else 3 * (hidden + ffn)
    layer = (2 * (hidden + queries) + 2 * (hidden + keys)) * attn + mlp_layer * mlp
    return rank * (sizes.num_layers * layer + (hidden + sizes.vocab_size) * unembed)


def trained_parameters(cfg: RunConfig, sizes: ModelSizes) -> int:
    """Numbers that the optimizer changes: all of the policy's, or with model.lora the adapter's."""
    lora = cfg.model.lora
    if not lora.rank:
        return sizes.num_parameters
    return adapter_parameters(sizes, lora.rank, mlp=lora.train_mlp, attn=lora.train_attn, unembed=lora.train_unembed)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank by what they are for; docs/sizing.md shows the sums with an example.

    `adapter`: all of a LoRA adapter, its moments too. `transient`: weights and gradients that are whole for a moment
    of a backward pass. `update`: what an optimizer step takes besides. `gathered`: the whole copy of sharded weights
    that is sampled from. `drawing`: logits of the running sequences. `states`: of linear attention,
    theirs. `cache`: keys and values of a whole rollout, or what the options say; `least_cache`: of one row, without
    which nothing can be sampled. `keeps_sampling`: cache and gathered weights stay through training."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    adapter: int
    reference: int
    critic: int
    activations: int
    logits: int
    transient: int
    update: int
    gathered: int
    drawing: int
    cache: int
    least_cache: int
    keeps_sampling: bool = True
    states: int = 0

    @property
    def resident(self) -> int:
        """What is there all the time, the cache aside."""
        trained = self.weights + self.masters + self.gradients + self.optimizer + self.adapter
        return trained + self.reference + self.critic

    @property
    def training(self) -> int:
        """The most while training, of what is not kept for sampling."""
        return self.resident + max(self.activations + self.logits + self.transient, self.update)

    @property
    def beside_cache(self) -> int:
        """The most that is needed at one time while the cache is there."""
        sampling = self.resident + self.gathered + self.drawing + self.states
        return max(sampling, self.training + self.gathered + self.states) if self.keeps_sampling else sampling

    def left_for_cache(self, ours: int) -> int:
        """What of the bytes that a process can have is left to the cache; below 0 when the rest does not fit."""
        return ours - int(SPARE * ours) - self.beside_cache

    @property
    def peak(self) -> int:
        """The larger of a training and a sampling phase."""
        return self._with(self.cache)

    @property
    def least(self) -> int:
        """The peak with the smallest cache that works."""
        return self._with(self.least_cache)

    def _with(self, cache: int) -> int:
        return max(self.training, self.beside_cache + cache)


def running_limit(asked: int, device: str, state_bytes: int) -> int:
    """Sequences that a sampler runs at once: `asked` (sampler.max_running) or, for 0, 256 on a GPU and 128 on a CPU,
    fewer where linear attention keeps so much of each that all of it were more than STATES_LIMIT."""
    most = 256 if device == "cuda" else 128
    return asked or min(most, max(1, STATES_LIMIT[device == "cuda"] // max(1, state_bytes) - 1))


def layer_values(sizes: ModelSizes, *, half: bool) -> int:
    """Numbers that one decoder layer keeps of one token for its backward pass.

    Fitted to Qwen3, within 5 %: 7 hidden states, 4 states of all query and key/value heads (projected, normalised,
    rotated, attended), 4 of the FFN; with half-precision numbers the norms' float32 inputs besides.
    """
    heads = sizes.head_size * (sizes.num_heads + sizes.num_kv_heads)
    return 7 * sizes.hidden_size + 4 * heads + 4 * sizes.ffn_size + (2 * sizes.hidden_size + heads if half else 0)


def kept_scores(sizes: ModelSizes, tokens: int, row_tokens: int, *, dtype: str) -> int:
    """Numbers that one layer's attention keeps on a GPU besides layer_values(): none where FlashAttention takes the
    model (models/packed.py, varlen_refusal), else its weights up to KEEP_SCORES, of capped scores these as well."""
    fused = dtype == "bfloat16" and torch_release() >= VARLEN_RELEASE and sizes.plain_heads and not sizes.capped
    if fused and sizes.head_size <= 256 and sizes.head_size % 8 == 0:
        return 0
    return min(KEEP_SCORES, sizes.num_heads * tokens * row_tokens) * (2 if sizes.capped else 1)


def estimate(
    cfg: RunConfig, sizes: ModelSizes, *, world_size: int, dtype: str, strategy: str, device: str, row_tokens: int
) -> MemoryEstimate:
    """Memory of one rank.

    The sums are those of docs/sizing.md; _shares says what each strategy divides by how many ranks. A decoder layer
    keeps layer_values() of each token; with activation checkpointing one hidden state, and one layer whole at a time.
    A model under LoRA has weights alone and is its own reference; the adapter is whole on every rank.
    """
    compute, master = BYTES[dtype], max(4, BYTES[dtype])
    shares = _shares(cfg, sizes, world_size, compute, master, strategy, device)
    weights, masters, gradients, optimizer = shares
    # FSDP2 lays out what is frozen beside DeepSpeed.
    beside = "fsdp" if strategy.startswith("zero") else strategy
    frozen = _shares(cfg, sizes, world_size, compute, master, beside, device)[0]
    others = len(cfg.algorithm.reference.models) * frozen  # taken to be as large as the policy
    whole = beside not in ("fsdp", "hsdp")  # whose shards are masters in any case, as a mean of weights has them
    averaged = sizes.num_parameters * master if cfg.algorithm.reference.ema and compute < master and whole else 0
    sharded = strategy in ("fsdp", "hsdp", "zero3")
    lora, adapter = cfg.model.lora, 0
    if lora.rank:
        weights, masters, gradients, optimizer, sharded = frozen, 0, 0, 0, beside in ("fsdp", "hsdp")
        adapter = trained_parameters(cfg, sizes) * ((compute if compute < master else 0) + 4 * master)
    critic = weights + masters + gradients + optimizer if advantage_of(cfg).critic else 0
    longest = min(row_tokens, sizes.max_positions)
    tokens = max(cfg.batch.max_tokens_per_microbatch, longest)
    layer = tokens * layer_values(sizes, half=compute < 4)
    layer += kept_scores(sizes, tokens, longest, dtype=dtype) if device == "cuda" else 0
    if cfg.model.activation_checkpointing:
        kept = sizes.num_layers * tokens * sizes.hidden_size + layer
    else:
        kept = sizes.num_layers * layer
    chunk = min(cfg.model.logits_chunk_tokens, tokens) * sizes.vocab_size * 4 or LOGITS_CHUNK_BYTES
    head = 0
    if cfg.model.head_dtype == "float32" and compute < 4:  # hidden states, their gradient, the block of the head
        head = (2 * tokens + chunk // 4 // tokens) * sizes.hidden_size * 4
    per_token = sizes.cache_bytes_per_token(dtype)
    running = math.ceil(cfg.batch.prompts_per_step / world_size) * cfg.batch.samples_per_prompt
    at_most = running_limit(cfg.sampler.max_running, device, sizes.state_bytes(dtype, device))
    running = min(running, at_most)
    cache = running * row_tokens * per_token
    if cfg.sampler.kv_cache_gib:
        cache = int(cfg.sampler.kv_cache_gib * GIB)
    elif device == "cpu":
        cache = min(cache, CPU_CACHE_LIMIT)
    return MemoryEstimate(
        weights=weights,
        masters=masters,
        gradients=gradients,
        optimizer=optimizer,
        adapter=adapter,
        reference=others
        + (frozen + averaged if needs_reference(cfg) and not lora.rank else 0)
        + _teacher(cfg, world_size, compute, sharded),
        critic=critic,
        activations=kept * compute,
        logits=2 * chunk + head,  # the chunk and its gradient
        transient=_transient(cfg, sizes, compute, master, sharded, trained=not lora.rank),
        # without a fused kernel AdamW takes a root of every second moment
        update=optimizer // 2 if device == "cpu" and strategy in ("fsdp", "hsdp") else 0,
        gathered=sizes.num_parameters * compute if sharded else 0,
        drawing=3 * at_most * sizes.vocab_size * 4,  # logits, their copy, and what the draw makes of them
        cache=cache,
        least_cache=min(cache, row_tokens * per_token),
        keeps_sampling=cfg.sampler.keep_memory != "never",
        states=(at_most + 1) * sizes.state_bytes(dtype, device),
    )


def needs_reference(cfg: RunConfig) -> bool:
    """Whether there is a frozen reference: for a KL term, for a reward that asks for one, or for preferences. What is
    wrong with plugins or rewards is told where they are used."""
    if cfg.trainer != "rl":
        return cfg.trainer == "dpo" and cfg.preference.loss not in WITHOUT_REFERENCE
    with contextlib.suppress(UserError):
        import_plugins(cfg.plugins)
        judges = group_rewards_of(cfg.env, batch=True)
        return cfg.algorithm.kl.coef > 0 or any(getattr(judge.fn, "needs_reference", False) for judge, _ in judges)
    return cfg.algorithm.kl.coef > 0


def _teacher(cfg: RunConfig, world_size: int, compute: int, sharded: bool) -> int:
    """Bytes of a teacher's weights, frozen and laid out as the student's."""
    if cfg.trainer != "distill":
        return 0
    try:
        sizes = model_sizes(replace(cfg, model=replace(cfg.model, path=cfg.distill.teacher, revision="")))
    except UserError as error:
        raise type(error)(str(error).replace("model.path=", "distill.teacher=", 1)) from error
    return sizes.num_parameters * compute // (world_size if sharded else 1)


def _transient(cfg: RunConfig, sizes: ModelSizes, compute: int, master: int, sharded: bool, *, trained: bool) -> int:
    """Bytes of weights and gradients that are whole for a moment. Whole weights: the gradient of the embedding, before
    it is added to what is pending. Sharded ones: two layers (the next is gathered while one computes) and what belongs
    to no layer, and the gradient of the largest of these before and after it is cast to be reduced."""
    embedding = sizes.vocab_size * sizes.hidden_size
    if not sharded:
        return embedding * compute * trained
    tied = sizes.num_parameters - sizes.matmul_parameters < embedding
    rest = embedding if tied else 2 * embedding
    layer = max(0, sizes.num_parameters - rest) // sizes.num_layers
    layers = 2 * layer if cfg.strategy.reshard_after_forward else sizes.num_layers * layer
    return (layers + rest) * compute + max(layer, rest) * (compute + master) * trained


def _shares(
    cfg: RunConfig, sizes: ModelSizes, world_size: int, compute: int, master: int, strategy: str, device: str
) -> tuple[int, int, int, int]:
    """Bytes of weights, masters, gradients and optimizer state on the device of one rank.

    fsdp and hsdp keep masters and round them where they are used; DeepSpeed keeps masters besides the weights, in
    float32 too.
    """
    parts = cfg.strategy.shard_size if strategy == "hsdp" else world_size
    whole, share = sizes.num_parameters, math.ceil(sizes.num_parameters / parts)
    offload = cfg.strategy.offload if device == "cuda" else "none"
    if strategy in ("fsdp", "hsdp"):
        return (0, 0, 0, 0) if offload == "all" else (share * master, 0, share * master, 2 * share * master)
    if strategy.startswith("zero"):
        stage = int(strategy[-1])
        weights = 0 if offload == "all" else (share if stage == 3 else whole) * compute
        if offload != "none":
            return weights, 0, (whole if stage == 1 else 0) * compute, 0
        return weights, share * master, (whole if stage == 1 else share) * master, 2 * share * master
    masters = 0 if compute == master else whole * master
    moments = whole * 2 + whole // 32 if cfg.optim.name == "adamw8bit" else 2 * whole * master
    return whole * compute, masters, whole * master, moments


def available(device: str) -> tuple[int, str] | None:
    """(bytes that one rank may use, of what), or None when this machine has no such device."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return None
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        return properties.total_memory, properties.name
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than the machine
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return total // ranks, f"the machine's memory, shared by {ranks} rank(s)"


def with_room(cfg: RunConfig, need: MemoryEstimate, device: str) -> MemoryEstimate:
    """`need`, with sampler.keep_memory=auto decided: what sampling holds stays through training where at least half of
    the plan's cache fits beside that (all of what sampler.kv_cache_gib asks for), counted as the sampler counts, or
    where freeing it would leave no more."""
    room = available(device)
    if cfg.sampler.keep_memory != "auto" or room is None:
        return need
    freed = replace(need, keeps_sampling=False)
    enough = need.cache if cfg.sampler.kv_cache_gib else max(need.least_cache, need.cache // 2)
    if need.left_for_cache(room[0] - CONTEXT) >= enough or freed.beside_cache == need.beside_cache:
        return need
    return freed


def check_fits(cfg: RunConfig, sizes: ModelSizes, need: MemoryEstimate, device: str, *, may_free: bool = True) -> None:
    """Raises UserError when not even the smallest cache makes this rank fit. No check for a device that is not here.
    `may_free`: what sampling holds could be freed between its turns."""
    room = available(device)
    if room is None or need.least <= room[0]:
        return
    remedies = "fewer batch.max_tokens_per_microbatch, model.activation_checkpointing=true, strategy.name=fsdp over "
    if need.keeps_sampling and may_free:
        remedies = f"sampler.keep_memory=never, {remedies}"
    raise UserError(
        f"model.path={cfg.model.path}: {sizes.num_parameters / 1e9:.2f}G parameters need about {need.least / GIB:.1f} "
        f"GiB on each rank, there are {room[0] / GIB:.1f} GiB ({room[1]}); try {remedies}more ranks, or a smaller model"
    )
