"""From options to a finished run: checks, resume, a loop, the end.

A loop (trainers/) is a function of an open Run. `run_loop` is all that surrounds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import skyrl
from skyrl.algorithms.kl import AdaptiveKL
from skyrl.algorithms.objectives import Objectives
from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.checkpoint.export import prepare_export, send_export
from skyrl.checkpoint.folder import Best, CheckpointInfo, clean_leftovers, find_resume, latest, newest, read_checkpoint
from skyrl.config.eval_sets import own_set
from skyrl.config.load import config_diff, config_digest, from_dict, to_dict
from skyrl.config.run_rules import closed_until
from skyrl.config.schema import DashboardConfig, RunConfig
from skyrl.data import PromptStream
from skyrl.distributed import env
from skyrl.distributed.agreement import is_allowed
from skyrl.distributed.collectives import agree, gather_objects, on_leader
from skyrl.distributed.compare import check_shared, compare_nodes
from skyrl.distributed.init import World
from skyrl.distributed.phases import FINISHING, LOADING, collectives, heartbeat, inside
from skyrl.distributed.stop import STOP_FILE, TEMPORARY, save_by
from skyrl.distributed.watchdog import Watchdog
from skyrl.engine import Engine, ModelSpec, meet
from skyrl.evaluation.sets import EvalSet, all_prompts, named_sets
from skyrl.evaluation.weight_check import fingerprint
from skyrl.hub.locate import name_for_others
from skyrl.planner.plan import Plan, describe_peak, describe_start, make_plan, model_sizes
from skyrl.run import Run, RunState
from skyrl.run_dir import (
    ADVISORIES,
    PROFILE_REQUEST,
    REQUEUE_FILE,
    RESULT,
    RunFolder,
    RunReader,
    changed_facts,
    drop_rollouts,
    keep_fingerprint,
    keep_steps,
    read_result,
)
from skyrl.text.chat import Chat, chat_of
from skyrl.text.fit import Progress, PromptCheck, leave_out, say_progress
from skyrl.tracking.advisories import stop_times
from skyrl.tracking.alerts import Alerts
from skyrl.tracking.base import Tracker, make_tracker
from skyrl.tracking.curves import write_curves
from skyrl.tracking.profiler import StepProfiler
from skyrl.tracking.prometheus import PrometheusExporter
from skyrl.tracking.system import SystemRecorder
from skyrl.types import LoraSpec, Prompt, StopRun, UserError, few
from skyrl.web.beside import dashboard_beside

Prompts = tuple[Sequence[Prompt], Sequence[EvalSet]]  # to train on, and what is evaluated
MakeEngine = Callable[[RunConfig, World, Plan], Any]  # what stands for an Engine in a run without a language model
ENV_SECONDS = 6.0  # by which an environment's call may exceed env.timeout_seconds before it is a hang


def run_loop(
    cfg: RunConfig,
    loop: Callable[[Run], None],
    *,
    supervised: bool = False,
    trains: bool = True,
    hooks: Sequence[Any] = (),
    make: MakeEngine | None = None,
) -> dict[str, Any]:
    """The whole run: opened or resumed, `loop`, last checkpoint, export, curves. Every trainer is one call of this.
    `supervised`: there is no RL in it. `trains`: False for an evaluation alone. `hooks`: see tracking/hooks.py. `make`:
    what owns the weights of a run without a language model, which has no chat and no prompts.
    Returns what result.json holds besides the numbers of metrics.jsonl.

    Raises StopRun, when all is saved, after a signal or at a deadline; UserError and RunError as what they call does.
    """
    with open_run(cfg, supervised, trains, make) as run:
        try:
            run.take_hooks(hooks)
            options = cfg.dashboard if run.world.is_leader else DashboardConfig()
            with dashboard_beside(options, run.folder.path.parent):
                loop(run)
        except StopRun:
            raise run.save_and_exit() from None
        with inside(FINISHING, run.state.global_step):
            hub = _finish(run)
        export = str(run.folder.export) if cfg.checkpoint.export and trains else None
        return {
            "export": export,
            "hub": hub,
            "parent": run.state.parent or None,
            "advisories": run.state.advisories.said,
        }


def _finish(run: Run) -> str | None:
    """Exports the policy, draws curves and says where all is, again on a finished run; what push_to_hub came to."""
    cfg, folder, state = run.cfg, run.folder, run.state
    run.checkpointer.wait()
    for line in run.checkpointer.poll():
        run.say(line)
    if cfg.checkpoint.export and run.plan.trains:
        run.engine.export("policy", folder.export, _how_trained(cfg, state))
    run.tracker.offset()  # syncs
    if not run.plan.trains:
        return None
    picture = folder.path / "curves.png"
    if run.drawing is not None:
        run.drawing.kill()  # an older picture must not come after the last one, and on a busy machine it takes minutes
        run.drawing.wait()
    curves = on_leader(run.world, lambda: write_curves(folder.metrics, picture))
    scored = cfg.trainer == "control" or (state.accuracy is None and state.score is not None)
    name, measured = (cfg.checkpoint.best_metric, state.score) if scored else ("held-out accuracy", state.accuracy)
    before = "before RL" if run.plan.phase == "rl" else "at first"
    first = f" ({before} {state.first_accuracy:.3f})" if state.first_accuracy is not None else ""
    run.say(f"done: {name} {'not measured' if measured is None else f'{measured:.3f}'}{first}")
    for line in run.left_out:
        run.say(f"  data        {line}")
    run.say(f"  run folder  {folder.path}")
    run.say(f"  curves      {curves}")
    if cfg.checkpoint.export and cfg.trainer == "control":
        run.say(f"  policy      {folder.export}   (skyrl.trainers.control.load_policy)")
    elif cfg.checkpoint.export:
        loads = "ForSequenceClassification" if cfg.trainer == "reward_model" else "ForCausalLM"
        run.say(f"  model       {folder.export}   (transformers.AutoModel{loads}.from_pretrained)")
        if cfg.model.lora.rank:
            run.say(f"  adapter     {folder.export / 'adapter'}   (peft.PeftModel.from_pretrained)")
    told = send_export(run.world, cfg.checkpoint, folder.export, f"{folder.path.name}, step {state.global_step}")
    if told is not None:
        run.say(f"  hub         {told}")
    return told


def _how_trained(cfg: RunConfig, state: RunState) -> str:
    """What a model's card says about its training: on what, how, how long, how well."""
    rl = cfg.trainer == "rl"
    warmup = f", the first {cfg.warmup.num_steps} of them supervised" if rl and cfg.warmup.num_steps else ""
    data = name_for_others(cfg.data.path) if cfg.data.path else "made by the environment"
    rows = {
        "trainer": cfg.trainer,
        "task": f"env.name={cfg.env.name}, data: {data}",
        "algorithm": f"{cfg.algorithm.advantage.name}, {cfg.algorithm.loss.name}" if rl else "",
        "steps": f"{state.global_step}{warmup}, seed {cfg.seed}",
        "optimizer": f"{cfg.optim.name}, learning rate {cfg.optim.lr:g}",
        "adapter": f"LoRA of rank {cfg.model.lora.rank}, merged" if cfg.model.lora.rank else "",
        "held-out accuracy": f"{state.accuracy:.4f}" if state.accuracy is not None else "not measured",
        f"before {'RL' if rl else 'training'}": "" if state.first_accuracy is None else f"{state.first_accuracy:.4f}",
        "made by": f"skyrl {skyrl.__version__}, torch {torch.__version__}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value), "\n"])


def open_run(cfg: RunConfig, supervised: bool = False, trains: bool = True, make: MakeEngine | None = None) -> Run:
    """The run as it should go on: fresh, or resumed. Arguments as of `run_loop`.

    Everything that can be refused is refused here, before the first step: plan, data, folder, model, checkpoint.
    """
    assert not cfg.dry_run, "main.py has planned it"
    world, sizes = meet(cfg)
    given = sizes if make is None else None
    plan = agree(world, partial(make_plan, cfg, world.size, model_sizes=given, device=world.choice, trains=trains))
    if plan.memory is not None:  # each rank has looked at its own GPU; the fullest decides for all
        keeps = all(gather_objects(world, plan.memory.keeps_sampling))
        plan = replace(plan, memory=replace(plan.memory, keeps_sampling=keeps))
    env.planned_memory = describe_peak(plan)
    opens = on_leader(world, lambda: closed_until(cfg.run))
    if opens is not None:
        line = f"run.window={cfg.run.window}: closed now; the same command goes on from {opens:%Y-%m-%d %H:%M:%S}"
        if world.is_leader:
            print(line, flush=True)
        gather_objects(world, None)  # as soon as one rank ends, torchrun ends the others
        raise StopRun(line, TEMPORARY)
    deadline = agree(world, lambda: save_by(cfg.run))
    patience = cfg.env.timeout_seconds + ENV_SECONDS
    watch = Watchdog(world, Path(cfg.run.dir), hang_seconds=cfg.run.hang_seconds, patience=patience, save_by=deadline)
    watch.start()
    folder = RunFolder(Path(cfg.run.dir), world.rank)
    try:
        chat, parts, held_out = None, dict[str, Sequence[Prompt]](), ""
        if make is None:
            chat = agree(world, lambda: chat_of(cfg))
            chat.vocab_size = sizes.vocab_size
            parts, held_out = agree(world, lambda: all_prompts(cfg, not trains))
        hosts, facts = compare_nodes(cfg, world, parts)
        left_out = [held_out] if held_out else []
        if chat is not None:
            parts, told = _fitting_prompts(cfg, world, chat, plan.max_row_tokens, parts)
            left_out += [line for line in told if line]
        cfg, plan = _with_epochs(cfg, plan, len(parts.get("train", ())))
        if make is None:
            sets, told = agree(world, lambda: named_sets(cfg, parts))
            left_out += told
        else:  # what it plays stands for its prompts
            sets = [EvalSet(own_set(cfg), [Prompt(cfg.control.env_id, cfg.trainer, [])], cfg.control.env_id)]
        _claim_folder(cfg, world, folder, hosts, facts)
        watch.claim()
    except UserError:
        folder.close()
        watch.close()
        raise
    try:
        info = on_leader(world, lambda: _checkpoint(cfg, folder))
        unheard = prepare_export(world, cfg.checkpoint) if trains else ()
        if world.is_leader:
            more = [("data", line) for line in _about_data(parts, sets)] if chat is not None else []
            more += [*(("", line) for line in left_out), *_about_start(cfg, chat, folder, info, trains)]
            print(describe_start(cfg, plan, more, supervised=supervised, device_name=world.choice.name), flush=True)
            said = chat.warnings() if chat is not None else ()
            for line in (*world.choice.notes, *said, *unheard):
                print(f"warning: {line}", flush=True)
        engine = agree(world, lambda: (make or partial(make_engine, chat=chat))(cfg, world, plan))
        return _open(engine, plan, parts, sets, folder, watch, info, left_out, supervised)
    except BaseException:
        folder.close()
        watch.disarm()
        raise


def _with_epochs(cfg: RunConfig, plan: Plan, rows: int) -> tuple[RunConfig, Plan]:
    """With the number of steps that data.epochs passes over so many rows are."""
    if not cfg.data.epochs:
        return cfg, plan
    group, size = ("warmup", "rows_per_step") if cfg.trainer == "sft" else ("batch", "prompts_per_step")
    steps = -(-cfg.data.epochs * rows // getattr(getattr(cfg, group), size))
    cfg = replace(cfg, **{group: replace(getattr(cfg, group), num_steps=steps)})
    return cfg, replace(plan, cfg=cfg, num_steps=cfg.batch.num_steps)


def _claim_folder(
    cfg: RunConfig, world: World, folder: RunFolder, hosts: dict[str, dict[str, Any]], facts: dict[str, str]
) -> None:
    """Locks the run folder, on rank 0. Raises UserError, on every rank, when it belongs to another run."""

    def refuse() -> list[str]:
        _refuse_other_run(cfg, folder)
        return _refuse_edited(cfg, folder, facts)

    def claim() -> None:
        lines = folder.open(to_dict(cfg), hosts=hosts, check=refuse)
        lines += clean_leftovers(folder.checkpoints)
        for mark in (REQUEUE_FILE, STOP_FILE, RESULT, PROFILE_REQUEST):  # of the last start
            (folder.path / mark).unlink(missing_ok=True)
        for line in lines:
            print(line, flush=True)

    on_leader(world, claim)
    check_shared(world, folder.path, "run.dir")


def _refuse_other_run(cfg: RunConfig, folder: RunFolder) -> None:
    """A folder with checkpoints may be resumed only with options that compute the same."""
    info = _checkpoint(cfg, folder)
    if info is None:
        if cfg.run.resume == "never" and latest(folder.checkpoints) is not None:
            raise UserError(
                f"run.resume=never: {folder.path} holds the checkpoints of an earlier run; give another run.name, or "
                "remove that folder"
            )
    elif _is_own(info, folder) and (changes := _changes(cfg, info)):
        raise UserError(
            f"run.resume={cfg.run.resume}: checkpoint {info.path} was made with other options "
            f"({'; '.join(changes[:4])}); give these options, or begin a run of its own from it: "
            f"run.resume={info.path} run.name=<another>"
        )


def _checkpoint(cfg: RunConfig, folder: RunFolder) -> CheckpointInfo | None:
    """What the run goes on or begins from: as run.resume says, a run folder meaning its newest checkpoint. A run that
    began from another's goes on from its own, by the same command."""
    setting = cfg.run.resume
    if setting not in ("auto", "never"):
        # Of this folder's own an older one may be named, whatever has become of the newest.
        own = None if _inside(Path(setting), folder.path) else latest(folder.checkpoints)
        if own is not None and own.state.get("parent"):
            return own
        inside = latest(Path(setting) / "checkpoints")
        setting = str(inside.path) if inside is not None else setting
    return find_resume(setting, folder.checkpoints)


def _inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def _is_own(info: CheckpointInfo, folder: RunFolder) -> bool:
    return _inside(info.path, folder.path)


def _changes(cfg: RunConfig, info: CheckpointInfo) -> list[str]:
    """Options that compute something else than those of the checkpoint."""
    # digests of different releases differ, since options are added; what they mean need not
    return [] if info.config_digest == config_digest(cfg) else config_diff(from_dict(info.state["config"]), cfg)


def _refuse_edited(cfg: RunConfig, folder: RunFolder, facts: dict[str, str]) -> list[str]:
    """A folder with checkpoints goes on only with the code and data that it began with, or where run.allow_different
    names what has changed; the fingerprint is then what is read now. After a stop because no verifier worked the code
    and data are expected to be mended. Returns lines worth showing."""
    edited, ours = changed_facts(folder.path, facts) if newest(folder.checkpoints) else ([], [])
    last = read_result(folder.path) or {}
    said = last.get("advisories", last.get("notices", ()))  # as earlier releases call them
    no_verifier = last.get("state") == "stopped" and "all_invalid" in said
    mended = ("code.", "data.", "env.") if no_verifier else ()
    refused = [name for name in edited if not is_allowed(name, cfg.run.allow_different) and not name.startswith(mended)]
    if refused:
        raise UserError(
            f"run.dir={folder.path}: what this run reads has changed since its last start: {few(refused)}; to go on "
            f"with it as it is now: run.allow_different=[{','.join(refused[:4])}]; to start anew: another run.name"
        )
    lines = [f"changed since the last start, and allowed: {', '.join(edited)}"] if edited else []
    if ours:
        lines.append(f"warning: changed since the last start of this run: {few(ours)}")
    keep_fingerprint(folder.path, facts)
    return lines


def _open(
    engine: Engine,
    plan: Plan,
    parts: dict[str, Sequence[Prompt]],
    sets: Sequence[EvalSet],
    folder: RunFolder,
    watch: Watchdog,
    info: CheckpointInfo | None,
    left_out: list[str],
    supervised: bool,
) -> Run:
    cfg, world = plan.cfg, engine.world
    if not engine.models:
        agree(world, lambda: create_policy(engine, trainable=plan.trains))
    prompts = parts["train"] if "train" in parts else sets[0].prompts
    run = make_run(cfg, plan, engine, (prompts, sets), folder, watch)
    run.left_out, run.supervised = left_out, supervised
    if cfg.model.lora.rank:
        with inside(LOADING, 0):
            run.state.base = fingerprint(engine, "base")
    offset = _resume(run, info) if info is not None else (0 if cfg.run.resume == "auto" else None)
    agree(world, lambda: _start_tracking(run, offset))
    run.tracker.restore(run.state.pending)
    run.saved = (run.state.global_step, run.state.unrecorded)
    return run


def make_run(cfg: RunConfig, plan: Plan, engine: Engine, prompts: Prompts, folder: RunFolder, watch: Watchdog) -> Run:
    """A run before its first step, that nobody hears of: it has no sinks, and nothing is written."""
    (train_prompts, sets), world, adaptive = prompts, engine.world, cfg.algorithm.kl
    return Run(
        cfg=cfg,
        plan=plan,
        world=world,
        folder=folder,
        engine=engine,
        stream=PromptStream(train_prompts, cfg.seed, cfg.data.shuffle),
        held_out=next((one.prompts for one in sets if not one.config.name), []),
        sets=sets,
        tracker=Tracker([]),
        checkpointer=Checkpointer(
            folder.checkpoints,
            keep_last=cfg.checkpoint.keep_last,
            keep_best=cfg.checkpoint.keep_best,
            async_save=cfg.checkpoint.async_save,
            rank=world.rank,
            world_size=world.size,
            group=world.saving,
            config_digest=config_digest(cfg),
            best=Best(cfg.checkpoint.best_metric, cfg.checkpoint.best_mode),
        ),
        state=RunState(phase="warmup" if cfg.warmup.num_steps else plan.phase),
        kl=AdaptiveKL(adaptive.coef, adaptive.target, adaptive.horizon) if adaptive.target > 0 else None,
        objectives=Objectives(cfg.algorithm.objectives.weights, cfg.algorithm.objectives.constraints),
        watch=watch,
    )


def _about_data(parts: dict[str, Sequence[Prompt]], sets: Sequence[EvalSet]) -> Iterator[str]:
    """What is trained on and what is evaluated, and how."""
    held_out = next((len(one.prompts) for one in sets if not one.config.name), 0)
    if "train" in parts:
        yield f"{len(parts['train'])} prompts to train on, {held_out} held out"
    for one in sets:
        if one.config.name or "train" not in parts:
            how = "greedy" if one.config.temperature == 0 else f"temperature {one.config.temperature:g}"
            many = f"{len(one.prompts)} prompts x {one.config.samples_per_prompt}"
            yield f"evaluated: {one.title}, {many}, {how}, at most {one.config.max_new_tokens} tokens a turn"


def _about_start(
    cfg: RunConfig, chat: Chat | None, folder: RunFolder, info: CheckpointInfo | None, trains: bool
) -> list[tuple[str, str]]:
    """Lines of the table at the start: what is sampled how, and what is resumed."""
    sampler = cfg.sampler
    resumed = "nothing: a new run"
    if info is not None:
        state = RunState.from_checkpoint(info.state)
        resumed = f"resuming from {info.path}: {state.phase} step {state.global_step}"
        if not trains:
            resumed = f"nothing: the weights of {info.path} ({state.phase} step {state.global_step})"
        elif not _is_own(info, folder) and _changes(cfg, info):
            what = "weights and optimizer state" if cfg.run.resume_optimizer else "weights"
            resumed = f"nothing: a new run with the {what} of {info.path} ({state.phase} step {state.global_step})"
    if chat is None:
        return [("resume", resumed)]
    return [
        ("sampler", f"backend {sampler.backend}" + (f", temperature {sampler.temperature:g}" if trains else "")),
        ("turns end", f"with {chat.describe_ends()}"),
        ("resume", resumed),
    ]


def _fitting_prompts(
    cfg: RunConfig, world: World, chat: Chat, row_tokens: int, parts: dict[str, Sequence[Prompt]]
) -> tuple[dict[str, Sequence[Prompt]], list[str]]:
    """The prompts of each part that can be played, and a line for each part that counts what data.filter left
    out. Each rank looks at its share; all know the same afterwards. Collective. Raises UserError, on all ranks."""
    found = []
    for split, part in parts.items():
        mine = world.deal(range(len(part)))
        say = say_progress(
            f"checking {split} prompts", len(mine), lambda line: print(line, flush=True) if world.is_leader else None
        )

        def progress(done: int, say: Progress = say) -> None:
            heartbeat()
            say(done)

        check = PromptCheck.of(cfg, split, row_tokens)
        found += check.run(chat, ((index, part[index]) for index in mine), progress)
    everything = [one for found in gather_objects(world, found) for one in found]
    left = {split: leave_out(cfg, split, part, everything) for split, part in parts.items()}
    return {split: kept for split, (kept, _) in left.items()}, [line for _, line in left.values() if line]


def _start_tracking(run: Run, offset: int | None) -> None:
    """The tracker, with sinks on rank 0, which also gets what advisories compare and where they go."""
    cfg, world, folder, state = run.cfg, run.world, run.folder, run.state
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    totals = {phase: run.total_of(phase) for phase in ("warmup", "sft", run.plan.phase)}
    last_step, recorder = (state.global_step - state.unrecorded) if offset else -1, None
    if cfg.tracking.system:
        gpu = str(getattr(torch.cuda.get_device_properties(world.device), "uuid", "")) if name else ""
        gpu = "" if torch.version.hip else gpu
        recorder = SystemRecorder(
            folder.path, world.rank, last_step=last_step, world_size=world.size, gpu=gpu, collectives=collectives
        )
    run.tracker = make_tracker(
        cfg,
        folder.path,
        world.rank,
        resume_from=offset,
        world_size=world.size,
        gpu_name=name,
        totals=totals,
        recorder=recorder,
    )
    if cfg.tracking.prometheus_port:
        host, port = cfg.tracking.prometheus_host, cfg.tracking.prometheus_port + world.local_rank
        labels = {"run": cfg.run.name, "rank": str(world.rank)}
        run.tracker.exporter = PrometheusExporter(host, port, run.tracker.values, labels)
    run.profiler = StepProfiler(folder.path, world.rank)
    if world.is_leader:
        keep_steps(folder.path / ADVISORIES, state.global_step if offset else -1)
        run.alerts, reader = Alerts(cfg, folder.path), RunReader(folder.path)
        run.history.facts["stops"] = stop_times(reader.stops())
        for record in reader.metrics()[0]:
            run.history.add(record)


def make_engine(cfg: RunConfig, world: World, plan: Plan, chat: Chat | None) -> Engine:
    """The engine of a plan, without a model."""
    return Engine(
        cfg,
        world,
        dtype=plan.dtype,
        strategy=plan.strategy,
        max_row_tokens=plan.max_row_tokens,
        memory=plan.memory,
        chat=chat,
    )


def create_policy(engine: Engine, *, trainable: bool = True) -> None:
    """Makes the model that learns, "policy": all of model.path, or with model.lora an adapter over it, which is then
    "base" and frozen. Whole models need not be `trainable`. With trainer=reward_model it says a reward, not tokens."""
    lora = engine.cfg.model.lora
    if not lora.rank:
        head: Any = "reward" if engine.cfg.trainer == "reward_model" else "logits"
        engine.create("policy", ModelSpec(head=head, trainable=trainable))
        return
    parts = {"mlp": lora.train_mlp, "attn": lora.train_attn, "unembed": lora.train_unembed}
    engine.create("base", ModelSpec(trainable=False))
    spec = LoraSpec(rank=lora.rank, alpha=lora.alpha, seed=engine.cfg.seed, **parts)
    engine.create("policy", ModelSpec(lora=spec, base="base"))


def check_base(found: str, info: CheckpointInfo, cfg: RunConfig) -> None:
    """Raises UserError when the frozen model, whose fingerprint was `found`, is not the one under the saved adapter."""
    if info.state.get("base", "") != found:
        raise UserError(
            f"model.path={cfg.model.path}: holds other weights than those that checkpoint {info.path} has an adapter "
            "for; put these back, or give another run.name"
        )


def _resume(run: Run, info: CheckpointInfo) -> int | None:
    """Puts everything back as the checkpoint says; returns where its metrics.jsonl ended, 0 for another run's."""
    check_base(run.state.base, info, run.cfg)
    own = _is_own(info, run.folder)
    if not own and (not run.plan.trains or agree(run.world, lambda: _changes(run.cfg, info))):
        _branch(run, info)
        return 0
    load_checkpoint(run, info)
    if not own:
        run.state.parent = str(info.path)
    if run.world.is_leader and own:
        drop_rollouts(run.folder.rollouts, run.state.global_step)
    return run.state.metrics_offset if own else 0


def load_checkpoint(run: Run, info: CheckpointInfo) -> None:
    """Puts state, models and all that changes by the step back as the checkpoint has them. Collective; only reads."""
    run.state = RunState.from_checkpoint(info.state)
    if len(run.state.models) > 1:
        run.create_models()
    tensors = run.engine.state()
    data = torch.zeros(run.state.successes, dtype=torch.uint8)
    run.checkpointer.load(info.path, tensors | ({"self_imitation": {"data": data}} if len(data) else {}))
    run.engine.load_state(tensors)
    if len(data):
        run.successes = json.loads(data.numpy().tobytes())
    if run.kl is not None and run.state.kl:
        run.kl.load_state_dict(run.state.kl)
    run.objectives.load_state_dict(run.state.multipliers)


def _branch(run: Run, info: CheckpointInfo) -> None:
    """Begins a run of its own from another's policy, and critic if both have one: their weights and, unless
    run.resume_optimizer=false, optimizer state. It counts from step 0, does no warm-up that its parent has done, and
    its reference is the policy that it begins with."""
    parent = RunState.from_checkpoint(info.state)
    run.state.parent = str(info.path)
    if parent.phase != "warmup" and not run.supervised:
        run.state.phase = run.plan.phase
    if run.plan.needs_critic and "critic" in parent.models:
        run.engine.create("critic", ModelSpec(head="value"))
    optimizer = run.cfg.run.resume_optimizer and run.plan.trains
    tensors = run.engine.state(optimizer=optimizer)
    run.checkpointer.load(info.path, tensors, partial=True)
    run.engine.load_state(tensors, optimizer=optimizer)


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Writes the policy of a checkpoint, of any strategy and world size, as a Hugging Face folder; one process.

    The config that the checkpoint keeps says which model it is; an adapter needs the model under it to be there still.
    Raises UserError for a checkpoint that is damaged or not there, and for a `folder` that exists.
    """
    if folder.exists():
        raise UserError(f"export: {folder} exists; give a new folder")
    info = read_checkpoint(checkpoint)
    cfg = from_dict(info.state["config"])
    if cfg.trainer == "control":
        raise UserError(
            f"export: {checkpoint} is a policy for control, which its run exports: {checkpoint.parents[1]}/export"
        )
    cfg = replace(cfg, strategy=replace(cfg.strategy, name="single", device="cpu"))
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    plan = make_plan(cfg, 1, model_sizes=model_sizes(cfg), device="cpu")
    engine = Engine(cfg, world, dtype=plan.dtype, strategy="single", max_row_tokens=plan.max_row_tokens)
    create_policy(engine, trainable=False)
    check_base(fingerprint(engine, "base") if cfg.model.lora.rank else "", info, cfg)
    tensors = engine.state(optimizer=False)
    reader = Checkpointer(
        checkpoint.parent, keep_last=0, keep_best=False, async_save=False, rank=0, world_size=1, group=None
    )
    reader.load(checkpoint, tensors, partial=True)
    engine.load_state(tensors, optimizer=False)
    engine.export("policy", folder, _how_trained(cfg, RunState.from_checkpoint(info.state)))
