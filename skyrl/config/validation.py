"""Every rule between options, each with one line for the person (those of the algorithm: algorithm_rules.py). No torch,
unless a plugin brings it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Collection, Iterator

from skyrl.algorithms.advantages import ADVANTAGES
from skyrl.algorithms.corrections import MASKS
from skyrl.algorithms.declare import LOSSES, substitutes
from skyrl.config import policy_rules, trainers
from skyrl.config.access import dashboard_problems
from skyrl.config.algorithm_rules import REGISTERED as REGISTERED
from skyrl.config.algorithm_rules import (
    advantage_of,
    algorithm_problems,
    corrects,
    kl_is_k1,
    loss_of,
    names_of,
    objective_problems,
    option,
    param_problems,
    those,
)
from skyrl.config.eval_sets import eval_problems
from skyrl.config.options import alias_problems, all_options
from skyrl.config.run_rules import run_problems
from skyrl.config.schema import RunConfig
from skyrl.registry.plugins import import_plugins
from skyrl.types import UserError

STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
NOT_PUBLIC = ("stable_reinforce",)  # losses of Tinker clients of which only the name is known
# strategy.offload -> the strategies that can do it.
OFFLOAD = {"optimizer": ("zero1", "zero2", "zero3"), "all": ("fsdp", "hsdp", "zero3")}

CHOICES: dict[str, tuple[str, ...]] = {
    **trainers.CHOICES,
    "model.dtype": ("auto", "float32", "bfloat16", "float64"),
    "model.head_dtype": ("auto", "float32"),
    "strategy.name": ("auto", *STRATEGIES),
    "strategy.offload": ("none", "optimizer", "all"),
    "strategy.device": ("auto", "cpu", "cuda"),
    "sampler.backend": ("auto", "module", "fused"),
    "sampler.keep_memory": ("auto", "always", "never"),
    "optim.name": ("adamw", "muon", "adamw8bit"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "warmup.schedule": ("auto", "constant", "linear", "cosine"),
    "algorithm.kl.placement": ("loss", "reward"),
    "algorithm.filters.overlong": ("keep", "mask"),
    "algorithm.loss.rejected": ("counted", "dropped"),
    "env.on_error": ("stop", "mask"),
    "checkpoint.best_mode": ("max", "min"),
    "tracking.console": ("auto", "lines", "off"),
    "tracking.wandb": ("off", "offline", "online"),
    "service.mix_tenants": ("auto", "always", "never"),
}
AT_LEAST_ONE = (
    "model.tiny.hidden_size model.tiny.num_layers model.tiny.num_heads model.tiny.num_kv_heads model.tiny.ffn_size "
    "sampler.max_new_tokens sampler.block_tokens batch.num_steps batch.prompts_per_step batch.samples_per_prompt "
    "batch.optim_steps_per_batch batch.epochs_per_batch batch.max_tokens_per_microbatch "
    "algorithm.filters.max_refill_rounds env.max_turns env.max_concurrent eval.num_prompts eval.samples_per_prompt "
    "algorithm.self_imitation.size algorithm.self_imitation.rows_per_step "
    "warmup.rows_per_step run.collective_timeout_seconds run.join_seconds service.max_models "
    "service.max_resident_models service.max_rank service.max_queued_samples service.max_request_mib "
    "service.max_tokens_per_request feedback.rate_per_minute control.n_envs control.n_steps control.minibatch_size "
    "control.total_steps control.epochs control.eval_episodes control.frame_stack control.frame_size"
).split()
ABOVE_ZERO = (
    "model.lora.alpha optim.lr optim.eps algorithm.loss.correction_cap algorithm.loss.top_entropy algorithm.kl.horizon "
    "algorithm.critic.lr sampler.top_p warmup.lr env.timeout_seconds service.gap_seconds service.slice_seconds "
    "feedback.max_seconds "
    "feedback.reward_limit feedback.max_share control.initial_std"
).split()
NO_LENGTH = (
    "sampler.max_new_tokens: has no default for a task of your own; give the most tokens that one answer may have (64 "
    "for a short one, 1024 or more for reasoning)"
)
NO_MODEL = (
    "model.path: no model is named; give a folder in Hugging Face format or a hub name (model.path=...), or say "
    "model=tiny for a small random one"
)
OUR_TASKS = tuple(
    "arithmetic gsm8k gsm8k_expressions guess_number code math mastermind search sql structured support support_model "
    "tic_tac_toe tools".split()
)  # whose recipes say how long an answer is
FILTERS = {"too_long", "empty", "refused", "all"}
# Smaller numbers than these can only fail: rounding, or what takes time of its own, would decide. 0 where it means off.
LEAST: dict[str, tuple[float, str]] = {
    "sampler.temperature": (1e-6, "logits divided by less are one-hot or leave the range of float32"),
    "eval.temperature": (1e-6, "logits divided by less are one-hot or leave the range of float32; 0 is greedy"),
    "optim.eps": (1e-30, "a smaller one is 0 in float32, and the first step of an unused weight 0 / 0"),
    "env.timeout_seconds": (1e-3, "no call of an environment returns sooner"),
    "run.hang_seconds": (0.5, "ranks report less often than that; 0 = never"),
    "service.model_idle_seconds": (1.0, "clients send less often than that; 0 = never"),
}
PARTS = (
    "algorithm.loss.top_entropy algorithm.filters.overlong_buffer sampler.top_p sampler.min_p optim.final_lr_ratio "
    "warmup.warmup_ratio feedback.max_share"
).split()
BELOW_ONE = "optim.momentum optim.beta1 optim.beta2 algorithm.reference.ema".split()


def without_foreign_params(cfg: RunConfig) -> RunConfig:
    """`cfg` without parameters that its loss or advantage does not take. An earlier release kept the parameters of all
    of them as options of their own, with an effect for some."""
    algorithm = cfg.algorithm
    for group, declared in (("advantage", advantage_of(cfg)), ("loss", loss_of(cfg))):
        part = getattr(algorithm, group)
        kept = {name: value for name, value in part.params.items() if name in declared.params}
        algorithm = dataclasses.replace(algorithm, **{group: dataclasses.replace(part, params=kept)})
    return dataclasses.replace(cfg, algorithm=algorithm)


def with_params(cfg: RunConfig, *, plugins: bool = True) -> RunConfig:
    """`cfg` with every parameter of its loss and advantage: what is not given has its declared default. So a resolved
    config says all its numbers, and a changed default is seen when a run is resumed. Unknown names are left alone, and
    without `plugins` names of modules that are not imported."""
    algorithm = cfg.algorithm
    for group, registry in (("advantage", ADVANTAGES), ("loss", LOSSES)):
        part = getattr(algorithm, group)
        if part.name in (names_of(cfg, f"algorithm.{group}.name") if plugins else registry):
            part = dataclasses.replace(part, params={**registry.get(part.name).defaults(), **part.params})
            algorithm = dataclasses.replace(algorithm, **{group: part})
    return dataclasses.replace(cfg, algorithm=algorithm)


_UNWEIGHTED = ("none", "geometric_mask", "off_policy_sequence_mask")  # weights of 1 and 0
# Path or group -> (where it has an effect, what that is in words). Elsewhere only its default is accepted.
APPLIES: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "algorithm.loss.correction_cap": (corrects, "with algorithm.loss.correction other than none"),
    "algorithm.loss.correction_low": (corrects, "with algorithm.loss.correction other than none"),
    "algorithm.loss.correction_normalise": (
        lambda cfg: corrects(cfg) and cfg.algorithm.loss.correction not in _UNWEIGHTED,
        "with a algorithm.loss.correction that weighs (token_*, sequence_*, geometric_truncate)",
    ),
    "algorithm.loss.rejected": (
        lambda cfg: cfg.algorithm.loss.correction in MASKS or cfg.algorithm.loss.top_entropy < 1,
        f"with algorithm.loss.correction={' or '.join(sorted(MASKS))}, or algorithm.loss.top_entropy below 1",
    ),
    "algorithm.loss.recompute_old_logprobs": (
        lambda cfg: loss_of(cfg).ratio or corrects(cfg) or advantage_of(cfg).off_policy,
        "with a loss that has ratios (ppo, cispo, gspo, importance_sampling), a correction, or advantage.name=vtrace",
    ),
    "algorithm.kl.estimator": (
        lambda cfg: cfg.algorithm.kl.coef > 0 and (cfg.algorithm.kl.placement == "loss" or kl_is_k1(cfg)),
        "with algorithm.kl.coef above 0 and algorithm.kl.placement=loss (in the reward it is always k1)",
    ),
    "algorithm.kl.placement": (lambda cfg: cfg.algorithm.kl.coef > 0, "with algorithm.kl.coef above 0"),
    "algorithm.kl.target": (lambda cfg: cfg.algorithm.kl.coef > 0, "with algorithm.kl.coef above 0, where it starts"),
    **policy_rules.APPLIES,
    "algorithm.kl.horizon": (lambda cfg: cfg.algorithm.kl.target > 0, "with algorithm.kl.target above 0"),
    "algorithm.filters.refill": (
        lambda cfg: cfg.algorithm.filters.zero_variance or bool(cfg.algorithm.filters.names),
        "with algorithm.filters.zero_variance=true or algorithm.filters.names, which make the gaps",
    ),
    "algorithm.filters.max_refill_rounds": (
        lambda cfg: cfg.algorithm.filters.refill,
        "with algorithm.filters.refill=true",
    ),
    "algorithm.critic": (
        lambda cfg: advantage_of(cfg).critic,
        f"with an advantage that has a critic, algorithm.advantage.name={those('critic')}",
    ),
    **trainers.APPLIES,
    "model.lora": (lambda cfg: cfg.model.lora.rank > 0, "with model.lora.rank above 0"),
    "feedback": (lambda cfg: cfg.feedback.enabled, "with feedback.enabled=true"),
    "dashboard": (lambda cfg: cfg.dashboard.enabled, "with dashboard.enabled=true"),
    "strategy.shard_size": (lambda cfg: cfg.strategy.name == "hsdp", "with strategy.name=hsdp"),
    "model.revision": (lambda cfg: cfg.model.path != "tiny", "with a hub name in model.path"),
    "model.trust_remote_code": (lambda cfg: cfg.model.path != "tiny", "with another model.path than tiny"),
}
# The same for what recipes set for one choice among several: refused only when typed on the command line.
APPLIES_TYPED: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "model.tiny": (lambda cfg: cfg.model.path == "tiny", "with model.path=tiny"),
    "warmup.rows_per_step": (lambda cfg: cfg.warmup.num_steps > 0, "with warmup.num_steps above 0"),
    "service": (lambda cfg: cfg.feedback.enabled, "with feedback.enabled=true, where the run serves its policy"),
    "warmup.lr": (lambda cfg: cfg.warmup.num_steps > 0, "with warmup.num_steps above 0"),
    "eval.k": (lambda cfg: bool(cfg.eval.sets), "with eval.sets, or in python -m skyrl.evaluate"),
    "eval.group_by": (lambda cfg: bool(cfg.eval.sets), "with eval.sets, or in python -m skyrl.evaluate"),
    "warmup.schedule": (lambda cfg: cfg.warmup.num_steps > 0, "with warmup.num_steps above 0"),
    "warmup.warmup_ratio": (lambda cfg: cfg.warmup.num_steps > 0, "with warmup.num_steps above 0"),
    "strategy.reshard_after_forward": (
        lambda cfg: cfg.strategy.name in ("fsdp", "hsdp"),
        "with strategy.name=fsdp or hsdp",
    ),
    "debug.check_replicas_every": (
        lambda cfg: cfg.strategy.name in ("auto", "single", "ddp") or cfg.model.lora.rank > 0,
        "with strategy.name=ddp, the only one whose ranks hold the same weights for good, or with model.lora.rank "
        "above 0, whose adapters are whole on every rank",
    ),
    "tracking.wandb_project": (
        lambda cfg: cfg.tracking.wandb != "off" or cfg.tracking.trackio,
        "with tracking.wandb=offline or online, or with tracking.trackio=true",
    ),
}


def check(cfg: RunConfig) -> None:
    """Raises UserError for the first rule that `cfg` breaks, whatever the number of ranks."""
    for problems in (
        _choices,
        _ranges,
        param_problems,
        _inapplicable,
        _sampling,
        policy_rules.cuts,
        policy_rules.references,
        policy_rules.several,
        policy_rules.imitation,
        policy_rules.routers,
        policy_rules.optimizers,
        eval_problems,
        _batches,
        algorithm_problems,
        objective_problems,
        _adapters,
        _feedback,
        trainers.problems,
        _strategies,
        _places,
    ):
        for problem in problems(cfg):
            raise UserError(problem)


def check_serve(cfg: RunConfig) -> None:
    """Raises UserError for the first rule that a server's config breaks, whatever the number of ranks."""
    if cfg.run.world_size and not cfg.dry_run:
        raise UserError(
            f"run.world_size={cfg.run.world_size}: only for a dry run; a real server counts its processes (torchrun "
            "--nproc_per_node), or add dry_run=true"
        )
    import_plugins(cfg.plugins)
    for problems in (_choices, _ranges, _service, run_problems):
        for problem in problems(cfg):
            raise UserError(problem)
    check(cfg)


def _service(cfg: RunConfig) -> Iterator[str]:
    service, defaults = cfg.service, type(cfg.service)()
    if service.port > 65535:
        yield f"service.port={service.port}: must be at most 65535; 0 = any free one"
    for path in ("host", "folder"):
        if not getattr(service, path):
            yield f"service.{path}: empty; leave it out for {getattr(defaults, path)!r}"
    yield from alias_problems(cfg, service.aliases, "service.aliases")
    for name, other in service.loss_substitutes.items():
        where = f"service.loss_substitutes: {name}: {other}"
        if name not in NOT_PUBLIC:
            yield f"{where}: only {', '.join(NOT_PUBLIC)} is computed as another loss; leave it out"
        elif other not in (known := substitutes()):
            yield f"{where}: choose one of: {', '.join(known)}"
    if cfg.model.compile:
        yield "model.compile=true: clients' adapters are hooks inside of the layers, which compiled ones lack; drop it"
    if cfg.batch.max_row_tokens == 1:
        yield "batch.max_row_tokens=1: leaves no room for an answer; give at least 2, or 0 for the model's own limit"


def check_typed(cfg: RunConfig, keys: Collection[str]) -> None:
    """Raises UserError for an option typed by hand (`keys`) that has no effect in `cfg`, and for the length of an
    answer that is left at another task's."""
    own = cfg.env.name == "single_turn" or (cfg.plugins and cfg.env.name not in OUR_TASKS)
    if own and cfg.experiment == "arithmetic" and "sampler.max_new_tokens" not in keys:
        raise UserError(NO_LENGTH)
    for key in keys:
        for path, (applies, words) in APPLIES_TYPED.items():
            if (key == path or key.startswith(path + ".")) and not applies(cfg):
                raise UserError(f"{key}={option(cfg, key)}: has an effect only {words}; leave it out")


def check_world(cfg: RunConfig, world_size: int) -> None:
    """Raises UserError for a rule that `cfg` breaks on this many ranks."""
    if world_size < 1:
        raise UserError(f"run.world_size={world_size}: must be at least 1")
    if cfg.strategy.name == "single" and world_size > 1:
        raise UserError(
            f"strategy.name=single: for one process, but there are {world_size}; use auto, ddp or fsdp, or start "
            "without torchrun"
        )
    shards = cfg.strategy.shard_size
    if cfg.strategy.name == "hsdp" and world_size % shards:
        raise UserError(
            f"strategy.shard_size={shards}: does not divide the {world_size} ranks; give a divisor of {world_size}, or "
            f"start a multiple of {shards} processes"
        )
    path = "control.n_envs" if cfg.trainer == "control" else "batch.prompts_per_step"
    if option(cfg, path) < world_size:
        raise UserError(
            f"{path}={option(cfg, path)}: fewer than the {world_size} ranks, so some would have nothing to do; "
            f"give at least {world_size}, or start fewer processes"
        )


def _choices(cfg: RunConfig) -> Iterator[str]:
    for path in (*CHOICES, *REGISTERED):
        value, allowed = option(cfg, path), CHOICES.get(path) or names_of(cfg, path)
        if value not in allowed:
            yield f"{path}={value}: choose one of: {', '.join(allowed)}"


def _ranges(cfg: RunConfig) -> Iterator[str]:
    for known in all_options():
        value = option(cfg, known.path)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{known.path}={value}: must be a finite number (default {known.default!r})"
        if isinstance(value, (int, float)) and value < 0:
            yield f"{known.path}={value}: must not be negative (default {known.default!r})"
    if cfg.sampler.max_new_tokens == 0:
        yield NO_LENGTH
    for path in AT_LEAST_ONE:
        if option(cfg, path) < 1:
            yield f"{path}={option(cfg, path)}: must be at least 1"
    for path in ABOVE_ZERO:
        if not option(cfg, path) > 0:
            yield f"{path}={option(cfg, path)}: must be above 0"
    defaults = {known.path: known.default for known in all_options()}
    for path, (least, why) in LEAST.items():
        if 0 < option(cfg, path) < least:
            yield f"{path}={option(cfg, path)}: must be at least {least:g}: {why} (default {defaults[path]!r})"
    for path in PARTS:
        if not 0 <= option(cfg, path) <= 1:
            yield f"{path}={option(cfg, path)}: must lie between 0 and 1"
    for path in BELOW_ONE:
        if not 0 <= option(cfg, path) < 1:
            yield f"{path}={option(cfg, path)}: must be at least 0 and below 1"
    if unknown := sorted(set(cfg.data.filter) - FILTERS):
        yield f"data.filter={cfg.data.filter}: no kind {unknown[0]!r}; choose from: {', '.join(sorted(FILTERS))}"
    if negative := [token for token in cfg.sampler.stop_token_ids if token < 0]:
        yield f"sampler.stop_token_ids={cfg.sampler.stop_token_ids}: {negative[0]} is no token id; remove it"
    if not all(cfg.sampler.stop):
        yield "sampler.stop: an empty string would stop every turn at once; remove it"


def _inapplicable(cfg: RunConfig) -> Iterator[str]:
    for known in all_options():
        for path, (applies, words) in APPLIES.items():
            inside = known.path == path or known.path.startswith(path + ".")
            if inside and option(cfg, known.path) != known.default and not applies(cfg):
                value = option(cfg, known.path)
                yield f"{known.path}={value}: has an effect only {words}; leave it at {known.default!r}"


def _sampling(cfg: RunConfig) -> Iterator[str]:
    sampler = cfg.sampler
    if not sampler.temperature > 0:
        yield (
            "sampler.temperature=0: greedy samples have no policy gradient; give a temperature above 0 (for evaluation "
            "there is eval.temperature)"
        )
    if cfg.eval.temperature == 0 and cfg.eval.samples_per_prompt > 1:
        yield (
            f"eval.samples_per_prompt={cfg.eval.samples_per_prompt}: greedy episodes of one prompt are all equal; give "
            "eval.temperature above 0, or 1 sample"
        )
    longest = cfg.batch.max_row_tokens
    if longest and longest <= sampler.max_new_tokens:
        yield (
            f"batch.max_row_tokens={longest}: leaves no room for a prompt beside "
            f"sampler.max_new_tokens={sampler.max_new_tokens}; raise it, or 0 for the model's own limit"
        )
    elif longest and cfg.data.max_prompt_tokens + sampler.max_new_tokens > longest:
        yield (
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens}: with "
            f"sampler.max_new_tokens={sampler.max_new_tokens} above batch.max_row_tokens={longest}; lower one of them"
        )


def _batches(cfg: RunConfig) -> Iterator[str]:
    batch, optim = cfg.batch, cfg.optim
    if batch.prompts_per_step % batch.optim_steps_per_batch:
        divisors = [n for n in range(1, batch.prompts_per_step + 1) if batch.prompts_per_step % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - batch.optim_steps_per_batch))[:3])
        yield (
            f"batch.optim_steps_per_batch={batch.optim_steps_per_batch}: does not divide "
            f"batch.prompts_per_step={batch.prompts_per_step}; near ones that do: {', '.join(map(str, near))}"
        )
    for path in ("optim.lr", "warmup.lr", "algorithm.critic.lr"):
        if (part := option(cfg, path) * optim.weight_decay) >= 1:
            yield (
                f"optim.weight_decay={optim.weight_decay:g}: times {path}={option(cfg, path):g} it takes {part:.3g} of "
                "every weight in each step, so nothing is left of them; lower it (0.01 to 0.1 is usual)"
            )
    if optim.warmup_steps > batch.num_steps:
        yield f"optim.warmup_steps={optim.warmup_steps}: above batch.num_steps={batch.num_steps}; lower it"
    if cfg.algorithm.critic.warmup_steps >= batch.num_steps:
        yield (
            f"algorithm.critic.warmup_steps={cfg.algorithm.critic.warmup_steps}: the policy would never learn in "
            f"batch.num_steps={batch.num_steps}; lower it"
        )


def _adapters(cfg: RunConfig) -> Iterator[str]:
    lora = cfg.model.lora
    if lora.rank == 0:
        return
    what = f"model.lora.rank={lora.rank}"
    if not (lora.train_mlp or lora.train_attn or lora.train_unembed):
        yield (
            f"{what}: model.lora.train_mlp, train_attn and train_unembed are all false, so nothing would learn; set at "
            "least one of them to true"
        )
    if advantage_of(cfg).critic:
        yield (
            f"algorithm.advantage.name={cfg.algorithm.advantage.name}: its critic is a second model that is trained "
            f"whole, which {what} is there to avoid; use grpo, dr_grpo, rloo or reinforce++, or model.lora.rank=0"
        )
    if cfg.strategy.offload == "optimizer":
        yield (
            f"strategy.offload=optimizer: with {what} the frozen model has no optimizer that could move; leave it at "
            "none, or move the model itself: strategy.name=fsdp strategy.offload=all"
        )


def _feedback(cfg: RunConfig) -> Iterator[str]:
    if cfg.env.name == "feedback" and not cfg.feedback.enabled:
        yield "env.name=feedback: has no prompts; set feedback.enabled=true, or start from experiment=live_feedback"
    if cfg.feedback.enabled:
        yield from _service(cfg)
        if cfg.algorithm.filters.zero_variance:
            yield "algorithm.filters.zero_variance=true: what users rate is not sampled again; leave it out"


def _strategies(cfg: RunConfig) -> Iterator[str]:
    name, offload = cfg.strategy.name, cfg.strategy.offload
    if offload != "none" and name not in OFFLOAD[offload]:
        others = [f"strategy.offload={other}" for other, names in OFFLOAD.items() if name in names]
        remedy = f"for {name} there is {' or '.join(others)}" if others else "or leave it at none"
        yield f"strategy.offload={offload}: strategy.name={name} cannot; {' or '.join(OFFLOAD[offload])} can; {remedy}"
    if name == "hsdp" and cfg.strategy.shard_size == 0:
        yield (
            "strategy.shard_size=0: strategy.name=hsdp needs to know how many ranks share one copy of the model; give "
            "a divisor of the number of ranks, for example the GPUs of a node"
        )
    if name.startswith("zero") and cfg.model.dtype == "float64":
        yield f"model.dtype=float64: DeepSpeed (strategy.name={name}) has float32 and bfloat16; use fsdp for float64"
    if cfg.model.compile:
        for given, why in (
            (cfg.model.dtype == "float64" and "model.dtype=float64", "is computed without any rounding to float32"),
            (cfg.model.lora.rank and f"model.lora.rank={cfg.model.lora.rank}", "adds adapters by hooks"),
            (name.startswith("zero") and f"strategy.name={name}", "gathers weights by hooks"),
        ):
            if given:
                yield f"model.compile=true: {given} {why} inside of the layers, which compiled ones lack; leave one out"


def check_machine(cfg: RunConfig) -> None:
    """Raises UserError for a package that `cfg` needs and this machine lacks. Imports none of them."""
    if cfg.strategy.name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"strategy.name={cfg.strategy.name}: DeepSpeed is not installed; install the extra with "
            "pip install 'skyrl-spmd[deepspeed]', or use strategy.name=fsdp"
        )


def _places(cfg: RunConfig) -> Iterator[str]:
    yield from run_problems(cfg)
    tiny = cfg.model.tiny
    if cfg.model.path == "tiny" and (tiny.hidden_size % tiny.num_heads or tiny.hidden_size // tiny.num_heads % 2):
        yield (
            f"model.tiny.hidden_size={tiny.hidden_size}: must give an even number of channels to each of "
            f"model.tiny.num_heads={tiny.num_heads}"
        )
    if cfg.model.path == "tiny" and tiny.num_heads % tiny.num_kv_heads:
        yield f"model.tiny.num_kv_heads={tiny.num_kv_heads}: must divide model.tiny.num_heads={tiny.num_heads}"
    if not cfg.model.path:
        yield NO_MODEL
    yield from dashboard_problems(cfg.dashboard)


def ignored_on_resume(path: str, schedule: str) -> bool:
    """Options that may differ between a checkpoint and the run that goes on from it.

    They change where or how fast, not what is computed. batch.num_steps may, if no learning rate depends on it
    (`schedule` is optim.schedule).
    """
    if path in ("batch.num_steps", "control.total_steps"):
        return schedule == "constant"
    return path.startswith(RESUME_GROUPS) or path in RESUME_OPTIONS


RESUME_GROUPS = ("run.", "tracking.", "alerts.", "checkpoint.", "strategy.", "service.", "dashboard.")
RESUME_OPTIONS = frozenset(
    "dry_run eval.every_steps eval.sets eval.k eval.group_by eval.stop_when eval.patience "
    "batch.max_tokens_per_microbatch batch.packing batch.share_prefixes model.activation_checkpointing model.compile "
    "model.logits_chunk_tokens sampler.kv_cache_gib sampler.block_tokens sampler.backend sampler.max_running "
    "sampler.prefix_cache sampler.cuda_graphs sampler.keep_memory debug.check_replicas_every "
    "debug.check_weights_every control.vectorization control.record_every".split()
)
