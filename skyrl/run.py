"""Everything that exists while a run lives: opened in one place, resumed in one place, closed in one place.

The loops (trainer.py) read like the algorithm because this file holds the rest: folder and lock, engine and models,
data, checkpoints, tracking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from skyrl.algorithms.kl import AdaptiveKL
from skyrl.checkpoint import Checkpointer, CheckpointInfo, clean_leftovers, find_resume, latest
from skyrl.config.load import config_diff, config_digest, from_dict, to_dict
from skyrl.config.schema import RunConfig
from skyrl.config.validation import import_plugins
from skyrl.data import PromptStream, make_prompts
from skyrl.distributed.collectives import agree, all_reduce_sum, broadcast_object, gather_objects, on_leader
from skyrl.distributed.env import REQUEUE_FILE
from skyrl.distributed.failure import ignore_sigterm, is_lost_peer
from skyrl.distributed.init import World, init_distributed, world_size_from_environment
from skyrl.distributed.phases import BETWEEN_PHASES, LOADING, SAVING, enter, inside
from skyrl.distributed.stop import INTERRUPTED, STOP_FILE, StopRequest, save_by
from skyrl.distributed.watchdog import Watchdog, mark_requeue
from skyrl.engine import Engine, ModelSpec
from skyrl.evaluate import evaluate
from skyrl.planner.plan import Plan, describe, make_plan, model_facts
from skyrl.rollout import Play, Renderer
from skyrl.run_dir import RunFolder, drop_rollouts
from skyrl.tracking.base import Tracker, make_tracker
from skyrl.tracking.rollouts import write_rollouts
from skyrl.types import Episode, LoraSpec, Metrics, Prompt, StopRun, UserError
from skyrl.weight_check import fingerprint

SAVE_SECONDS = 15.0  # a save under way may take this long after an error
LOST_PEER_SECONDS = 3.0  # the same when another rank is gone, without which it hardly can
ENV_SECONDS = 6.0  # by which an environment's call may exceed env.timeout_seconds before it is a hang
STOPS = "stops.jsonl"


@dataclass
class RunState:
    """What a checkpoint remembers beside tensors; replicated, and free of world size.

    `phase` is "warmup" or "rl", `step` counts finished steps of it. `position` is the next prompt of the training
    stream, `warmup_position` the same for warm-up. `done` counts steps of both phases and names checkpoints.
    `accuracy` was measured when `done` was `evaluated_at`. `half`: the last step is learned, but its evaluation and its
    record, of which `pending` is the part that is known, are still to come. `base`: fingerprint of the frozen model
    under an adapter, which is not saved.
    """

    phase: str = "warmup"
    step: int = 0
    done: int = 0
    position: int = 0
    warmup_position: int = 0
    kl: dict[str, float] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    accuracy: float | None = None
    evaluated_at: int = -1
    first_accuracy: float | None = None
    metrics_offset: int = 0
    half: bool = False
    base: str = ""
    pending: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Run:
    """One run on this rank."""

    cfg: RunConfig
    plan: Plan
    world: World
    folder: RunFolder
    engine: Engine
    renderer: Renderer
    stream: PromptStream
    held_out: Sequence[Prompt]
    tracker: Tracker
    checkpointer: Checkpointer
    state: RunState
    kl: AdaptiveKL | None
    watch: Watchdog
    saved: tuple[int, bool] = (0, False)  # `done` and `half` of the newest checkpoint, or of the start

    def say(self, text: str) -> None:
        """One line for a person, from rank 0."""
        self.tracker.say(text)

    def play(self, kind: Literal["train", "eval"]) -> Play:
        """How episodes are played; the key says what each draw belongs to."""
        cfg, training = self.cfg, kind == "train"
        params = self.plan.sampling if training else self.plan.eval_sampling
        group_size = cfg.batch.samples_per_prompt if training else cfg.eval.samples_per_prompt
        return Play(
            cfg.env, params, group_size, self.engine.max_row_tokens, (cfg.seed, kind), self.watch.stop_requested
        )

    @contextlib.contextmanager
    def doing(self, phase: str, span: str, step: int) -> Iterator[None]:
        """Tells who watches that this rank is in `phase` of step `step`, and times it as `span`."""
        with inside(phase, step), self.tracker.span(span):
            yield

    def stop_point(self) -> None:
        """Raises StopRun on every rank when any has been asked to stop. Collective; called where nothing of the step
        under way has been learned yet, and between steps."""
        if all_reduce_sum(self.world, np.array([float(self.watch.stop_requested())]))[0]:
            raise StopRun

    def commit_point(self) -> None:
        """The last stop point of a step, which then counts as done. A save in the background is waited for here, so
        that no more than the save interval is ever unsaved; it overlaps with sampling."""
        if self.checkpointer.pending:
            with self.doing(SAVING, "save", self.state.step):
                self.checkpointer.wait()
        self.stop_point()

    @contextlib.contextmanager
    def undone_by_stop(self) -> Iterator[None]:
        """A StopRun inside leaves the state as it was before: the step is done again, with the same draws."""
        before = dataclasses.asdict(self.state)
        try:
            yield
        except StopRun:
            vars(self.state).update(before)
            raise

    def evaluate(self) -> Metrics:
        """Plays the held-out prompts; adds the metrics to the current step and keeps the accuracy."""
        with self.doing("evaluation", "evaluate", self.state.step):
            metrics, groups = evaluate(self.engine, self.held_out, self.play("eval"), self.renderer, self.stop_point)
        self.tracker.add(metrics)
        self.dump(groups, "eval")
        self.state.evaluated_at = self.state.done
        self.state.accuracy = metrics.get("eval/accuracy:mean")
        if self.state.first_accuracy is None:
            self.state.first_accuracy = self.state.accuracy
        return metrics

    def dump(self, groups: list[list[Episode]], kind: str) -> None:
        """Writes episodes to the run folder, when the plan says so for the step under way."""
        every = self.cfg.tracking.rollouts_every
        if every and (kind == "eval" or self.plan.due("rollouts", self.state.step)):
            name = f"{'eval-' if kind == 'eval' else ''}{self.state.done:06d}"
            write_rollouts(self.folder.rollouts, name, groups, self.renderer.tokenizer, rank=self.world.rank)

    def save(self, *, block: bool = False) -> None:
        """Saves all models and the state; returns when the weights are copied, or with `block` when all is on disk."""
        state = self.state
        state.kl = self.kl.state_dict() if self.kl is not None else {}
        tensors = self.engine.state()
        state.models = sorted(tensors)
        state.metrics_offset = broadcast_object(self.world, self.tracker.offset())
        state.pending = broadcast_object(self.world, self.tracker.pending()) if state.half else {}
        with self.doing(SAVING, "save", state.step):
            self.checkpointer.save(
                f"{state.done:06d}",
                tensors,
                {**dataclasses.asdict(state), "config": to_dict(self.cfg)},
                score=state.accuracy if state.evaluated_at == state.done else None,
                block=block,
            )
        self.saved = (state.done, state.half)

    def leave(self) -> StopRun:
        """All ranks have agreed to stop: saves what is not saved yet, and tells people and launcher. Collective.

        Returns what `train` raises then. In the run folder: a line in stops.jsonl, and the file `requeue` when the same
        command should be started again.
        """
        asked = next(r for r in gather_objects(self.world, self.watch.stop_request) if r is not None)
        if self.saved != (self.state.done, self.state.half):
            self.save(block=True)
        with inside(SAVING, self.state.step):
            self.checkpointer.wait()
            waited = gather_objects(
                self.world, time.monotonic() - self.watch.stop_requested_at if self.watch.stop_requested() else 0.0
            )
        for line in self.checkpointer.poll():
            self.say(line)
        if self.world.is_leader:
            self._tell_stop(asked, max(waited))
        return StopRun(f"stopped by {asked.reason} on rank {asked.rank}, saved", asked.exit_code)

    def _tell_stop(self, asked: StopRequest, seconds: float) -> None:
        newest = latest(self.folder.checkpoints)
        record = {
            **dataclasses.asdict(asked),
            "done": self.state.done,
            "checkpoint": newest.tag if newest is not None else "",
            "seconds": round(seconds, 3),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with open(self.folder.path / STOPS, "a") as file:
            file.write(json.dumps(record) + "\n")
        if asked.exit_code != INTERRUPTED:
            mark_requeue(self.folder.path)
        (self.folder.path / STOP_FILE).unlink(missing_ok=True)
        self.say(
            f"stopped by {asked.reason} on rank {asked.rank} in {asked.phase}; saved and left after {seconds:.1f} s; "
            "the same command goes on"
        )

    def start_rl(self) -> None:
        """Makes the models that RL needs beside the policy: the frozen reference is the policy as it is now, or with
        model.lora the base, which is there already."""
        with inside(LOADING, self.state.step):
            if self.plan.needs_reference and self.plan.reference not in self.engine.models:
                self.engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))
            if self.plan.needs_critic and "critic" not in self.engine.models:
                self.engine.create("critic", ModelSpec(head="value"))

    def proof_due(self) -> bool:
        """Whether the step under way proves that the sampler draws from the trained weights; the first one does."""
        every = self.cfg.debug.check_weights_every
        return every > 0 and self.state.step % every == 0

    def kl_coef(self) -> float:
        """The KL coefficient in force."""
        return self.kl.coef if self.kl is not None else self.cfg.algorithm.kl.coef

    def __enter__(self) -> Run:
        self.tracker.restart_clock()
        enter(BETWEEN_PHASES, self.state.step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Waits for writes, closes sinks, gives the lock back. After an error no other rank is waited for."""
        if error is not None and not isinstance(error, StopRun):
            self.watch.disarm()
        try:
            if error is None or isinstance(error, StopRun):
                self.checkpointer.wait()
                self.tracker.close()
            else:
                self._close_after(error)
        finally:
            self.folder.close()
        if isinstance(error, StopRun) and self.world.size > 1:
            gather_objects(self.world, None)  # as soon as one rank ends, torchrun ends the others
            ignore_sigterm()
        elif error is None or isinstance(error, StopRun):
            self.watch.close()

    def _close_after(self, error: BaseException) -> None:
        """Lets a save under way complete where it can. What fails here is not told: the error before it counts."""
        lost = is_lost_peer(error)
        if lost:
            ignore_sigterm()
        self.checkpointer.close(LOST_PEER_SECONDS if lost else SAVE_SECONDS)
        with contextlib.suppress(UserError):
            self.tracker.close()


def open_run(cfg: RunConfig) -> Run | None:
    """The run as it should go on: fresh, or resumed. None after a dry run, which only prints the plan.

    Everything that can be refused is refused here, before the first step: plan, data, folder, model, checkpoint.
    """
    import_plugins(cfg.plugins)
    facts = model_facts(cfg)
    if cfg.dry_run:
        size = cfg.run.world_size or world_size_from_environment()
        plan = make_plan(cfg, size, model_facts=facts)
        if int(os.environ.get("RANK", "0")) == 0:
            print(describe(cfg, plan))
        return None
    world = init_distributed(cfg)
    plan = make_plan(cfg, world.size, model_facts=facts, device=world.device.type)
    deadline = agree(world, lambda: save_by(cfg.run))
    patience = cfg.env.timeout_seconds + ENV_SECONDS
    watch = Watchdog(world, Path(cfg.run.dir), hang_seconds=cfg.run.hang_seconds, patience=patience, save_by=deadline)
    watch.start()
    try:
        prompts = agree(world, lambda: (make_prompts(cfg, "train"), make_prompts(cfg, "test")))
        folder = _claim_folder(cfg, world)
        watch.claim()
    except UserError:
        watch.close()
        raise
    try:
        return _open(cfg, world, plan, prompts, folder, watch)
    except BaseException:
        folder.close()
        watch.disarm()
        raise


def _claim_folder(cfg: RunConfig, world: World) -> RunFolder:
    """The run folder, locked by rank 0. Raises UserError, on every rank, when it belongs to another run."""
    folder = RunFolder(Path(cfg.run.dir), world.rank)

    def claim() -> None:
        lines = folder.open(to_dict(cfg), command=sys.argv)
        try:
            _refuse_other_run(cfg, folder)
            lines += clean_leftovers(folder.checkpoints)
            for mark in (REQUEUE_FILE, STOP_FILE):
                (folder.path / mark).unlink(missing_ok=True)
        except UserError:
            folder.close()
            raise
        for line in lines:
            print(line, flush=True)

    on_leader(world, claim)
    return folder


def _refuse_other_run(cfg: RunConfig, folder: RunFolder) -> None:
    """A folder with checkpoints may be resumed only with options that compute the same."""
    info = find_resume(cfg.run.resume, folder.checkpoints)
    if info is None:
        if cfg.run.resume == "never" and latest(folder.checkpoints) is not None:
            raise UserError(
                f"run.resume=never: {folder.path} holds the checkpoints of an earlier run; give another run.name, or "
                "remove that folder"
            )
        return
    # digests of different releases differ, since options are added; what they mean need not
    if info.config_digest != config_digest(cfg) and (changes := config_diff(from_dict(info.state["config"]), cfg)):
        raise UserError(
            f"run.resume={cfg.run.resume}: checkpoint {info.path} was made with other options "
            f"({'; '.join(changes[:4])}); give these options, or another run.name"
        )


def _open(
    cfg: RunConfig,
    world: World,
    plan: Plan,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    folder: RunFolder,
    watch: Watchdog,
) -> Run:
    train_prompts, held_out = prompts
    info = on_leader(world, lambda: find_resume(cfg.run.resume, folder.checkpoints))
    engine = agree(world, lambda: _policy_engine(cfg, world, plan))
    renderer = Renderer(engine.tokenizer, cfg.sampler.stop_token_ids)
    agree(world, lambda: _refuse_long_prompts(cfg, world, renderer, prompts))
    adaptive = cfg.algorithm.kl
    run = Run(
        cfg=cfg,
        plan=plan,
        world=world,
        folder=folder,
        engine=engine,
        renderer=renderer,
        stream=PromptStream(train_prompts, cfg.seed, cfg.data.shuffle),
        held_out=[held_out[i] for i in range(min(len(held_out), cfg.eval.num_prompts))],
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
        ),
        state=RunState(phase="warmup" if cfg.warmup.num_steps else "rl"),
        kl=AdaptiveKL(adaptive.coef, adaptive.target, adaptive.horizon) if adaptive.target > 0 else None,
        watch=watch,
    )
    if cfg.model.lora.rank:
        with inside(LOADING, 0):
            run.state.base = fingerprint(engine, "base")
    offset = _resume(run, info) if info is not None else (0 if cfg.run.resume == "auto" else None)
    run.tracker = _make_tracker(run, offset)
    run.tracker.restore(run.state.pending)
    run.saved = (run.state.done, run.state.half)
    return run


def _refuse_long_prompts(
    cfg: RunConfig, world: World, renderer: Renderer, prompts: tuple[Sequence[Prompt], Sequence[Prompt]]
) -> None:
    """Holds every prompt against data.max_prompt_tokens, each rank its share. Raises UserError with its place."""
    limit = cfg.data.max_prompt_tokens
    for part in prompts if limit else ():
        for i in range(world.rank, len(part), world.size):
            tokens = len(renderer.start(part[i].messages))
            if tokens > limit:
                where = part[i].extra.get("source", f"prompt {part[i].uid}")
                raise UserError(
                    f"{where}: {tokens} tokens, above data.max_prompt_tokens={limit}; leave it out of the data, or "
                    "raise that limit"
                )


def _make_tracker(run: Run, offset: int | None) -> Tracker:
    """The tracker, with sinks on rank 0. Raises its UserError on every rank."""
    cfg, world = run.cfg, run.world
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    made: list[Tracker] = []
    on_leader(
        world,
        lambda: made.append(
            make_tracker(cfg, run.folder.path, 0, resume_from=offset, world_size=world.size, gpu_name=name)
        ),
    )
    return made[0] if made else Tracker([])


def _policy_engine(cfg: RunConfig, world: World, plan: Plan) -> Engine:
    engine = Engine(cfg, world, dtype=plan.dtype, strategy=plan.strategy, max_row_tokens=plan.max_row_tokens)
    create_policy(engine)
    return engine


def create_policy(engine: Engine, *, trainable: bool = True) -> None:
    """Makes the model that learns, "policy": all of model.path, or with model.lora an adapter over it, which is then
    "base" and frozen. Whole models need not be `trainable`."""
    lora = engine.cfg.model.lora
    if not lora.rank:
        engine.create("policy", ModelSpec(trainable=trainable))
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
    """Puts everything back as the checkpoint says; returns where its metrics.jsonl ended, None for another folder's."""
    saved = {key: value for key, value in info.state.items() if key != "config"}
    check_base(run.state.base, info, run.cfg)
    run.state = RunState(**saved)
    if len(run.state.models) > 1:
        run.start_rl()
    tensors = run.engine.state()
    run.checkpointer.load(info.path, tensors)
    run.engine.load_state(tensors)
    if run.kl is not None and run.state.kl:
        run.kl.load_state_dict(run.state.kl)
    own = info.path.resolve().parent == run.folder.checkpoints.resolve()
    if run.world.is_leader:
        print(f"resuming from {info.path}: {run.state.phase} step {run.state.step}", flush=True)
        if own:
            drop_rollouts(run.folder.rollouts, run.state.done)
    return run.state.metrics_offset if own else None
