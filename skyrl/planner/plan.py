"""The Plan: every number that follows from several options, computed once and frozen, after every rule was checked.

Prompts are dealt round robin: rank r plays prompts r, r + world_size, ... of a step. The engine only sums, so a number
of ranks that does not divide prompts_per_step costs idle time on some ranks and nothing else.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from skyrl.algorithms.losses import check_spec
from skyrl.config import policy_rules, validation
from skyrl.config.eval_sets import longest_answer
from skyrl.config.schema import AlgorithmConfig, CriticConfig, OptimConfig, RunConfig
from skyrl.planner.control import control_problems, describe_control, find_environment
from skyrl.planner.device import DeviceChoice, choose, look
from skyrl.planner.memory import (
    GIB,
    MemoryEstimate,
    ModelSizes,
    available,
    check_fits,
    estimate,
    model_sizes,
    needs_reference,
    trained_parameters,
    with_room,
)
from skyrl.text.chat import Chat, chat_of
from skyrl.text.tokenizer import TINY_VOCABULARY
from skyrl.types import AdamParams, LossSpec, SamplingParams, UserError

__all__ = ["Plan", "describe", "dry_run", "learning_rate", "make_plan", "make_spec", "make_value_spec", "model_sizes"]

MEMORY_PARTS = tuple(
    "weights masters gradients optimizer adapter reference critic activations logits transient update gathered drawing "
    "states cache".split()
)
Due = Literal["rollouts", "replicas"]


@dataclass(frozen=True)
class Plan:
    """What a run will do, in numbers. The same on every rank, whatever the rank.

    `max_row_tokens` is 0 when neither the options nor model sizes say it: then the model does.
    """

    cfg: RunConfig
    world_size: int
    device: str
    dtype: str
    strategy: str
    max_row_tokens: int
    num_steps: int
    prompts_per_update: int
    updates_per_step: int
    needs_reference: bool
    needs_critic: bool
    sampling: SamplingParams
    eval_sampling: SamplingParams
    sizes: ModelSizes | None = None
    memory: MemoryEstimate | None = None
    trains: bool = True

    @property
    def reference(self) -> str:
        """The engine's name for the model that KL is measured to; with model.lora the base, of which there is one."""
        return "base" if self.cfg.model.lora.rank else "reference"

    @property
    def phase(self) -> str:
        """What the run's state and records call the steps after the warm-up."""
        return "rl" if self.cfg.trainer == "sft" else self.cfg.trainer

    def prompts_on_rank(self, rank: int) -> int:
        """How many of a step's prompts rank `rank` plays; rank 0 has the most."""
        return len(range(rank, self.cfg.batch.prompts_per_step, self.world_size))

    def lr_at(self, step: int) -> float:
        """The policy's learning rate in step `step`, counted from 0."""
        return learning_rate(self.cfg.optim, self.cfg.optim.lr, step, self.num_steps, self.cfg.optim.warmup_steps)

    def adam_at(self, step: int) -> AdamParams:
        """The policy's optimizer step in step `step`, counted from 0."""
        return self._adam(self.lr_at(step))

    def critic_adam_at(self, step: int) -> AdamParams:
        """The critic's: the same schedule from algorithm.critic.lr."""
        optim = self.cfg.optim
        return self._adam(learning_rate(optim, self.cfg.algorithm.critic.lr, step, self.num_steps, optim.warmup_steps))

    def warmup_adam_at(self, step: int) -> AdamParams:
        """Supervised warm-up, step counted from 0: its own schedule from warmup.lr over warmup.num_steps."""
        steps, schedule = self.cfg.warmup.num_steps, self.cfg.warmup.schedule
        optim = self.cfg.optim if schedule == "auto" else replace(self.cfg.optim, schedule=schedule)
        rises = math.ceil(round(steps * self.cfg.warmup.warmup_ratio, 6))
        return self._adam(learning_rate(optim, self.cfg.warmup.lr, step, steps, rises))

    def _adam(self, lr: float) -> AdamParams:
        names = ("beta1", "beta2", "eps", "weight_decay", "grad_clip_norm", "momentum")
        return AdamParams(lr, **{name: getattr(self.cfg.optim, name) for name in names})

    def policy_learns(self, step: int) -> bool:
        """False in the first steps, counted from 0, in which only the critic does."""
        return not self.needs_critic or step >= self.cfg.algorithm.critic.warmup_steps

    def due(self, kind: Due, step: int) -> bool:
        """Whether `kind` happens in step `step`, counted from 1."""
        every = {"rollouts": self.cfg.tracking.rollouts_every, "replicas": self.cfg.debug.check_replicas_every}[kind]
        return every > 0 and step > 0 and step % every == 0


def make_spec(cfg: AlgorithmConfig, temperature: float) -> LossSpec:
    """The policy's LossSpec; KL only with kl.placement=loss. An adaptive coefficient replaces kl_coef at each step.

    Raises UserError for numbers that do not apply.
    """
    spec = LossSpec(
        name=cfg.loss.name,
        params=dict(cfg.loss.params),
        temperature=temperature,
        kl_coef=cfg.kl.coef if cfg.kl.placement == "loss" else 0.0,
        kl_estimator=cfg.kl.estimator,
        entropy_coef=cfg.loss.entropy_coef,
        correction=cfg.loss.correction,
        correction_cap=cfg.loss.correction_cap,
        correction_low=cfg.loss.correction_low,
        router_aux_coef=cfg.router.aux_coef,
    )
    check_spec(spec)
    return spec


def make_value_spec(critic: CriticConfig) -> LossSpec:
    """The LossSpec of the value model that advantage.name=gae trains beside the policy."""
    return LossSpec(name="value", params={"clip": critic.clip})


def learning_rate(optim: OptimConfig, peak: float, step: int, num_steps: int, warmup_steps: int) -> float:
    """Learning rate in step `step` of `num_steps`, counted from 0.

    Rises linearly so that step warmup_steps - 1 is the first at the peak (step 0 is already above 0), then follows
    optim.schedule; the last step is exactly at peak * final_lr_ratio for linear and cosine.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if optim.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    left = 1.0 - done if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * left)


def make_plan(
    cfg: RunConfig,
    world_size: int,
    *,
    model_sizes: ModelSizes | None = None,
    device: DeviceChoice | str | None = None,
    trains: bool = True,
) -> Plan:
    """The plan of `cfg` on `world_size` ranks. `device`: what a rank has chosen, or cpu or cuda; None =
    strategy.device, or what is here.

    `trains`: False for an evaluation, whose weights have neither gradients nor an optimizer.
    With model sizes also the row limit and the memory estimate; then a model that does not fit in this machine is
    refused, unless run.world_size says that another machine is meant. Raises UserError for every broken rule.
    """
    validation.check(cfg)
    validation.check_world(cfg, world_size)
    for problem in control_problems(cfg) if cfg.trainer == "control" else ():
        raise UserError(problem)
    if not cfg.run.world_size:  # else the plan is for another machine
        if cfg.trainer == "control":
            find_environment(cfg)
        validation.check_machine(cfg)
        policy_rules.check_packages(cfg)
    choice = device if isinstance(device, DeviceChoice) else _device(cfg, device or "")
    device, dtype = choice.kind, choice.dtype
    if cfg.trainer == "control" and cfg.model.dtype == "auto":  # small networks, for which bfloat16 is too coarse
        dtype = "float32"
    if cfg.model.compile and not cfg.run.world_size and (missing := compiler_problem(device)):
        raise UserError(f"model.compile=true: {missing}, or leave it out")
    strategy = cfg.strategy.name
    if strategy == "auto":
        strategy = "single" if world_size == 1 else "ddp"
    row_tokens, memory = cfg.batch.max_row_tokens, None
    if model_sizes is not None:
        row_tokens = max_row_tokens(cfg, model_sizes)
        if (longest := longest_answer(cfg)) >= row_tokens:
            where = "sampler.max_new_tokens" if longest == cfg.sampler.max_new_tokens else "eval.sets: max_new_tokens"
            raise UserError(f"{where}={longest}: leaves no room for a prompt in rows of {row_tokens} tokens; lower it")
        _check_against_model(cfg, model_sizes, dtype)
        answers = longest * cfg.env.max_turns
        memory = estimate(
            cfg,
            model_sizes,
            world_size=world_size,
            dtype=dtype,
            strategy=strategy,
            device=device,
            # for the cache: prompts as long as they may be, or as long again as the answers where there is no limit
            row_tokens=min(row_tokens, answers + (cfg.data.max_prompt_tokens or max(answers, 128))),
        )
        if not trains:
            kept = replace(memory, masters=0, gradients=0, optimizer=0)
            memory = replace(kept, activations=0, logits=0, transient=0, update=0)
        if not cfg.run.world_size:
            memory = with_room(cfg, memory, device)
            check_fits(cfg, model_sizes, memory, device)
    batch = cfg.batch
    return Plan(
        cfg=cfg,
        world_size=world_size,
        device=device,
        dtype=dtype,
        strategy=strategy,
        max_row_tokens=row_tokens,
        num_steps=batch.num_steps,
        prompts_per_update=batch.prompts_per_step // batch.optim_steps_per_batch,
        updates_per_step=batch.optim_steps_per_batch * batch.epochs_per_batch,
        needs_reference=needs_reference(cfg),
        needs_critic=cfg.trainer == "rl" and validation.advantage_of(cfg).critic,
        sampling=replace(_sampling(cfg, cfg.sampler.temperature), processed_logprobs=True),
        eval_sampling=_sampling(cfg, cfg.eval.temperature),
        sizes=model_sizes,
        memory=memory,
        trains=trains,
    )


def compiler_problem(device: str) -> str:
    """What this machine lacks to compile layers for `device`, "" for nothing: the compiler that torch's inductor takes
    (CXX, else g++, clang++), and on a GPU Triton."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "no Triton here, which torch brings for GPUs"
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return "" if any(shutil.which(name) for name in names if name) else "no C++ compiler here; install g++"


def max_row_tokens(cfg: RunConfig, sizes: ModelSizes) -> int:
    """The longest row, prompt with answer. Raises UserError when the option asks for more than the model has."""
    if cfg.batch.max_row_tokens > sizes.max_positions:
        raise UserError(
            f"batch.max_row_tokens={cfg.batch.max_row_tokens}: the model has {sizes.max_positions} positions; give at "
            "most that, or 0"
        )
    return cfg.batch.max_row_tokens or sizes.max_positions


def _check_against_model(cfg: RunConfig, sizes: ModelSizes, dtype: str) -> None:
    answer, given = (cfg.sampler.max_new_tokens + 1) * sizes.cache_bytes_per_token(dtype), cfg.sampler.kv_cache_gib
    if 0 < given * GIB < answer:
        raise UserError(
            f"sampler.kv_cache_gib={given:g}: one answer of sampler.max_new_tokens={cfg.sampler.max_new_tokens} takes "
            f"{answer / GIB:.3g}; raise it, or 0 for automatic"
        )
    if outside := [token for token in cfg.sampler.stop_token_ids if token >= sizes.vocab_size]:
        raise UserError(
            f"sampler.stop_token_ids={cfg.sampler.stop_token_ids}: {outside[0]} is never drawn, the model has "
            f"{sizes.vocab_size} tokens; remove it"
        )
    router = cfg.algorithm.router
    if cfg.trainer == "rl" and (router.replay or router.aux_coef) and not sizes.num_experts:
        raise UserError(f"algorithm.router: {cfg.model.path} has no experts; leave replay and aux_coef out")
    tiny = cfg.model.tiny.vocab_size
    if cfg.model.path == "tiny" and 0 < tiny < len(TINY_VOCABULARY) and cfg.model.tokenizer in ("", "tiny"):
        raise UserError(
            f"model.tiny.vocab_size={tiny}: its tokenizer has {len(TINY_VOCABULARY)} entries; give at least that, or 0"
        )


def dry_run(cfg: RunConfig, world_size: int, *, trains: bool = True) -> Plan:
    """The plan, with everything checked that can be checked without building. Raises UserError."""
    plan = make_plan(cfg, world_size)  # the rules first: a model may take a while to look at
    if cfg.trainer == "control":
        return plan
    return make_plan(cfg, world_size, model_sizes=model_sizes(cfg), trains=trains)


def _device(cfg: RunConfig, kind: str) -> DeviceChoice:
    """This machine's device, unless `kind` says another; a plan for another machine only looks at which one is here.
    strategy.device=cuda may be planned for where no GPU is. Raises UserError for GPUs that cannot be used, if the plan
    is for this machine."""
    dtype, facts = cfg.model.dtype, None
    if not kind and (kind := cfg.strategy.device) != "cpu":
        with suppress(ImportError):  # a login node
            facts = look(kind, int(os.environ.get("LOCAL_RANK", "0")))
        if facts and not cfg.run.world_size and (kind == "auto" or facts.count or facts.nvidia or facts.amd):
            return choose(kind, dtype, facts)
        if kind == "auto":
            kind = "cuda" if facts and facts.count and not facts.problem else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" else "float32"
    return DeviceChoice(kind, dtype)


def _sampling(cfg: RunConfig, temperature: float) -> SamplingParams:
    sampler = cfg.sampler
    return SamplingParams(
        max_tokens=sampler.max_new_tokens,
        temperature=temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        min_p=sampler.min_p,
        stop=tuple(sampler.stop),
        stop_token_ids=tuple(sampler.stop_token_ids),
    )


def describe(cfg: RunConfig, plan: Plan, chat: Chat | None = None, *, supervised: bool = False) -> str:
    """The plan as a table for a person, without a line break at the end; `supervised`: without what only RL does.
    chat: where it is loaded already."""
    lines = _describe_run(cfg, plan, supervised)
    if plan.sizes is not None and plan.memory is not None:
        lines += [*describe_turns(cfg, chat), _describe_model(plan, plan.sizes), *_describe_adapter(plan, plan.sizes)]
        lines += _describe_memory(plan, plan.memory)
    return _as_table(lines)


def describe_start(
    cfg: RunConfig, plan: Plan, more: list[tuple[str, str]], *, supervised: bool, device_name: str
) -> str:
    """The same for a run that begins: its memory in one line, and what only a run knows (`more`)."""
    lines = _describe_run(cfg, plan, supervised, device_name)
    if plan.sizes is None:  # no language model
        return _as_table([*lines, *more])
    lines.append(_describe_model(plan, plan.sizes))
    lines += [*_describe_adapter(plan, plan.sizes), ("memory", describe_peak(plan)), *more]
    return _as_table(lines)


def _as_table(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _describe_run(cfg: RunConfig, plan: Plan, supervised: bool, device_name: str = "") -> list[tuple[str, str]]:
    head = [("run", f"{cfg.run.name} in {cfg.run.dir}"), ("ranks", describe_ranks(plan, device_name))]
    if cfg.trainer == "control":
        return [*head, *describe_control(cfg)]
    longest = f"at most {plan.max_row_tokens} tokens" if plan.max_row_tokens else "the limit of the model"
    steps = f"{cfg.warmup.num_steps} SFT steps x {cfg.warmup.rows_per_step} rows" if cfg.warmup.num_steps else "none"
    if supervised and cfg.warmup.num_steps:
        first, last = (plan.warmup_adam_at(step).lr for step in (0, cfg.warmup.num_steps - 1))
        what = [("SFT", steps), ("lr", f"{first:.3g} first, {cfg.warmup.lr:.3g} peak, {last:.3g} last")]
    else:
        what = [*_describe_rl(cfg, plan), ("warm-up", steps)] if plan.trains else []
    if plan.trains:  # which of the quicker ways the forward pass goes, and why not
        why = next((name for name in ("share_prefixes", "packing") if not getattr(cfg.batch, name)), "")
        shared = f"rows apart (batch.{why}=false)" if why else "beginnings that rows share computed once"
        how = "; layers compiled by torch (inductor)" if cfg.model.compile else ""
        what.append(("training", f"{shared}{how}"))
    return [*head, *what, ("rows", f"{longest}, {cfg.sampler.max_new_tokens} a turn")]


def _describe_rl(cfg: RunConfig, plan: Plan) -> list[tuple[str, str]]:
    batch, algorithm = cfg.batch, cfg.algorithm
    lr = ("lr", f"{plan.lr_at(0):.3g} first, {cfg.optim.lr:.3g} peak, {plan.lr_at(plan.num_steps - 1):.3g} last")
    if cfg.trainer != "rl":
        loss = {"dpo": f" by {cfg.preference.loss}", "distill": f" from {cfg.distill.teacher}"}.get(cfg.trainer, "")
        return [("trainer", f"{cfg.trainer}{loss}, {plan.num_steps} steps x {batch.prompts_per_step} prompts"), lr]
    uneven = batch.prompts_per_step % plan.world_size
    most, least = plan.prompts_on_rank(0), plan.prompts_on_rank(plan.world_size - 1)
    episodes = batch.prompts_per_step * batch.samples_per_prompt
    return [
        (
            "step",
            f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} samples = {episodes} episodes; "
            + (f"{least} or {most}" if uneven else f"{most}")
            + " prompts on a rank",
        ),
        ("updates", f"{plan.updates_per_step} a step, {plan.prompts_per_update} prompts each; {plan.num_steps} steps"),
        (
            "algorithm",
            f"{algorithm.advantage.name}, {algorithm.loss.name}, {algorithm.loss.reduction}"
            + (f", KL {algorithm.kl.coef:g} in the {algorithm.kl.placement}" if algorithm.kl.coef else "")
            + (", critic" if plan.needs_critic else ""),
        ),
        lr,
    ]


def describe_ranks(plan: Plan, device_name: str = "") -> str:
    """ "8 x cuda (NVIDIA H100 80GB HBM3), fsdp, bfloat16"."""
    name = f" ({device_name})" if device_name else ""
    text = f"{plan.world_size} x {plan.device}{name}, {_layout(plan.cfg, plan)}, {plan.dtype}"
    if plan.memory is not None and not plan.memory.keeps_sampling and plan.cfg.sampler.keep_memory == "auto":
        text += "; too little memory to keep what sampling holds while training: it is built again for each rollout"
    return text


def describe_turns(cfg: RunConfig, chat: Chat | None = None) -> list[tuple[str, str]]:
    """Lines of the plan: what ends a turn and who says so, and what is doubtful about it. None on a login node without
    transformers. Raises UserError for a tokenizer or template that cannot be had."""
    try:
        chat = chat or chat_of(cfg)
    except ImportError:
        return []
    return [("turns end", chat.describe_ends()), *(("", f"warning: {line}") for line in chat.warnings())]


def _layout(cfg: RunConfig, plan: Plan) -> str:
    text = plan.strategy
    if cfg.strategy.name == "hsdp":
        text += f" ({plan.world_size // cfg.strategy.shard_size} copies x {cfg.strategy.shard_size} shards)"
    if cfg.model.lora.rank and plan.strategy.startswith("zero"):
        text += " (the frozen base by fsdp)"
    return (
        text
        + {"none": "", "optimizer": ", optimizer in CPU memory", "all": ", all in CPU memory"}[cfg.strategy.offload]
    )


def _describe_adapter(plan: Plan, sizes: ModelSizes) -> list[tuple[str, str]]:
    lora = plan.cfg.model.lora
    if not lora.rank:
        return []
    parts = [("attention", lora.train_attn), ("feed-forward", lora.train_mlp), ("output", lora.train_unembed)]
    where = ", ".join(name for name, trained in parts if trained)
    trained = trained_parameters(plan.cfg, sizes)
    share = 100 * trained / sizes.num_parameters
    text = f"rank {lora.rank}, alpha {lora.alpha:g} on {where}: {trained / 1e6:,.2f}M parameters ({share:.2g} %) learn"
    return [("lora", text)]


def describe_peak(plan: Plan) -> str:
    """What one rank's memory is for by the plan, in one line; "" for a plan without a model."""
    if plan.memory is None:
        return ""
    parts = {name: getattr(plan.memory, name) / GIB for name in MEMORY_PARTS}
    shown = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size >= 0.005)
    room = available(plan.device)
    there = f" of {room[0] / GIB:.1f}" if room is not None else ""
    return f"{plan.memory.peak / GIB:.2f}{there} GiB" + f" ({shown})" * bool(shown)


def _describe_model(plan: Plan, sizes: ModelSizes) -> tuple[str, str]:
    count, unit = (
        (sizes.num_parameters / 1e6, "M") if sizes.num_parameters >= 1e5 else (sizes.num_parameters / 1e3, "K")
    )
    text = f"{sizes.name}, {count:,.1f}{unit} parameters in {plan.dtype}, {sizes.num_layers} layers, "
    return "model", f"{text}hidden {sizes.hidden_size}, vocabulary {sizes.vocab_size}"


def _describe_memory(plan: Plan, memory: MemoryEstimate) -> list[tuple[str, str]]:
    lines = [("memory", "estimate for one rank, GiB")]
    for name in MEMORY_PARTS:
        size = getattr(memory, name)
        if size:
            lines.append(("", f"{name:<14}{size / GIB:>9.3f}"))
    lines.append(("", f"{'peak':<14}{memory.peak / GIB:>9.3f}"))
    if plan.cfg.run.world_size:
        lines.append(("", "not compared with this machine: the plan is for another one (run.world_size)"))
        return lines
    room = available(plan.device)
    if room is None:
        lines.append(("", f"no {plan.device} device here to compare with"))
    else:
        lines.append(("", f"{'available':<14}{room[0] / GIB:>9.3f}  {room[1]}"))
    return lines
