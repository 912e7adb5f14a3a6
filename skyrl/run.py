"""An open run, and the frame that every loop runs in: `for step in run.steps(...)`.

The loops (trainers/) read like the algorithm because this file holds the rest: what a step is, when it counts, when it
is taken back, evaluated and saved, and how a run that is asked to stop leaves.

A step has one border, its `commit`. Before it nothing has been learned: a stop takes everything back, and the step is
done again after a resume, with the same draws. After it the step counts, whatever happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from skyrl.algorithms.declare import ADVANTAGES
from skyrl.algorithms.kl import AdaptiveKL
from skyrl.algorithms.objectives import Objectives
from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.checkpoint.folder import newest
from skyrl.config.eval_sets import EvalSetConfig, own_set
from skyrl.config.load import to_dict
from skyrl.config.schema import EnvConfig, RunConfig
from skyrl.data import PromptStream
from skyrl.distributed.collectives import MetricSums, all_reduce_sum, broadcast_object, gather_objects, on_leader
from skyrl.distributed.failure import ignore_sigterm, is_lost_peer
from skyrl.distributed.init import World
from skyrl.distributed.phases import BETWEEN_PHASES, IN_HOOK, LOADING, SAVING, enter, inside
from skyrl.distributed.stop import STOP_FILE, StopRequest
from skyrl.distributed.watchdog import Watchdog
from skyrl.engine import Engine, ModelSpec
from skyrl.envs.base import group_rewards_of
from skyrl.evaluation.measure import look_whether_to_end, play_and_measure
from skyrl.evaluation.sets import EvalSet
from skyrl.files import write_atomic
from skyrl.planner.plan import Plan
from skyrl.rollout import Judges, RolloutConfig, rank_tools, score_batch
from skyrl.run_dir import RESULT, STOPS, RunFolder, mark_stop
from skyrl.sampler.sampler import Sampler
from skyrl.tracking.advisories import Advisories, Advisory, History
from skyrl.tracking.alerts import Alerts
from skyrl.tracking.base import Tracker, memory_metrics
from skyrl.tracking.curves import draw_beside
from skyrl.tracking.hooks import Hooks
from skyrl.tracking.profiler import StepProfiler
from skyrl.tracking.rollouts import write_rollouts
from skyrl.types import Episode, Metrics, Prompt, StopRun, UserError
from skyrl.workers.pool import shut_pool

SAVE_SECONDS = 15.0  # a save under way may take this long after an error
LOST_PEER_SECONDS = 3.0  # the same when another rank is gone, without which it hardly can
DRAW_SECONDS = (30.0, 600.0)  # between two pictures of a run that goes on: at first, and at most
BACKENDS = {
    "kernels": "compiled CPU kernels",
    "fused": "a fused decode plan over the model's own parameters",
    "module": "the model's own forward",
}
T = TypeVar("T")


@dataclass
class RunState:
    """What a checkpoint remembers beside tensors; replicated, and free of world size.

    `phase` names the loop under way, `step` counts its finished steps, `global_step` those of all phases: it names
    checkpoints. `position` is the next prompt of the training stream, `warmup_position` the same for warm-up.
    `accuracy` and `score`, the value of checkpoint.best_metric, were measured when `global_step` was `evaluated_at`.
    `unrecorded`: the last step is learned, but its evaluation and its record, of which `pending` is the part that is
    known, are still to come. `advisories`: what was said so far. `parent`: the checkpoint that it began from, if that
    is another run's. `base`: fingerprint of the frozen model under an adapter, which is not saved.
    `successes`: bytes of Run.successes, which lie beside the models. `best`: the best `score` so far, `waited`:
    evaluations since; `stopped_by`: eval.stop_when and eval.patience by which training has ended early.
    """

    phase: str = "warmup"
    step: int = 0
    global_step: int = 0
    position: int = 0
    warmup_position: int = 0
    kl: dict[str, float] = field(default_factory=dict)
    multipliers: dict[str, list[float]] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    accuracy: float | None = None
    score: float | None = None
    evaluated_at: int = -1
    first_accuracy: float | None = None
    metrics_offset: int = 0
    unrecorded: bool = False
    base: str = ""
    pending: dict[str, list[float]] = field(default_factory=dict)
    advisories: Advisories = field(default_factory=Advisories)
    parent: str = ""
    successes: int = 0
    best: float | None = None
    waited: int = 0
    stopped_by: list[Any] = field(default_factory=list)

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any]) -> RunState:
        """The state as a checkpoint holds it, beside the config; also under the names of earlier releases."""
        older = {"done": "global_step", "half": "unrecorded", "notices": "advisories"}
        state = cls(**{older.get(key, key): value for key, value in saved.items() if key != "config"})
        if isinstance(state.advisories, dict):
            state.advisories = Advisories(**state.advisories)
        return state


@dataclass
class Step:
    """One step of a loop, while it is under way. `index` counts this loop's steps from 0; `number` is the step as
    everything that a person sees counts it: over all phases, from 1."""

    run: Run
    index: int
    sums: MetricSums = field(default_factory=MetricSums)  # of this rank; summed over ranks when the step ends

    @property
    def number(self) -> int:
        """The step that console, metrics, rollouts and checkpoints call by this number."""
        return self.run.state.global_step + 1

    def deal(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list that all ranks have."""
        return self.run.world.deal(items)

    def log(self, metrics: Metrics) -> None:
        """Adds metrics that are global already, as the engine's are."""
        self.run.tracker.add(metrics)

    def skip_updates(self, count: int) -> None:
        """Counts optimizer steps that are not taken, since no rank has a token to learn from. Weights, moments and the
        optimizer's own count of steps stay; the schedule goes by steps of the loop and is not shifted."""
        self.log({"skipped_updates:sum": float(count)})

    def phase(self, name: str, span: str) -> contextlib.AbstractContextManager[None]:
        """Tells the watchdog and the clock what this rank does in the block."""
        return self.run.phase(name, span, self.number)

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A part of a phase, for the timeline (tracking/system.py)."""
        return self.run.tracker.part(name)

    def check_stop(self) -> None:
        """Leaves the step, to be done again later, when any rank was asked to stop. Collective."""
        self.run.check_stop()

    def commit(self) -> None:
        """The last place where the step can be taken back; called just before weights change. Collective.

        A save in the background is waited for here, so that no more than the save interval is ever unsaved; it
        overlaps with sampling."""
        if self.run.checkpointer.pending:
            with self.run.phase(SAVING, "save", self.number):
                self.run.checkpointer.wait()
        self.run.check_stop()


@dataclass
class Run:
    """One run on this rank."""

    cfg: RunConfig
    plan: Plan
    world: World
    folder: RunFolder
    engine: Engine
    stream: PromptStream
    held_out: Sequence[Prompt]
    sets: Sequence[EvalSet]  # what is evaluated; the held-out prompts first, if there are any
    tracker: Tracker
    checkpointer: Checkpointer
    state: RunState
    kl: AdaptiveKL | None
    objectives: Objectives
    watch: Watchdog
    left_out: list[str] = field(default_factory=list)  # lines that count the prompts that data.filter left out
    supervised: bool = False  # there is no RL in it
    backend: str = ""  # of the sampler, once there has been one
    invalid: str = ""  # why an episode of this rank was invalid
    drawing: subprocess.Popen[bytes] | None = None  # what draws the curves so far
    draw_at: float = 0.0  # when they are drawn next; 0 before the first step
    draw_every: float = DRAW_SECONDS[0] / 2
    judges: list[tuple[EnvConfig, Judges]] = field(default_factory=list)  # rewards of whole batches, once needed
    saved: tuple[int, bool] = (0, False)  # `global_step` and `unrecorded` of the newest checkpoint, or of the start
    hooks: Hooks | None = None  # None where no rank has any
    history: History = field(default_factory=History)  # what advisories compare; on rank 0
    alerts: Alerts | None = None  # on rank 0
    profiler: StepProfiler | None = None
    measured: tuple[int, bool] | None = None  # `saved` when the newest checkpoint's size was taken
    successes: list[dict[str, Any]] = field(default_factory=list)  # of self-imitation: the oldest first
    measure: Callable[[Run], Metrics] | None = None  # evaluates instead of playing the held-out prompts
    before_step: dict[str, Any] | None = None  # the state to go back to when the step under way is taken back

    def say(self, text: str) -> None:
        """One line for a person, from rank 0."""
        self.tracker.say(text)

    def take_hooks(self, hooks: Sequence[Any]) -> None:
        """Hooks that are called from here on, on the ranks that were given them. Collective."""
        if any(gather_objects(self.world, bool(hooks))):
            self.hooks = Hooks(hooks, self.world.rank)

    def tell_hooks(self, event: str, step: int, thing: Any) -> None:
        """Calls the hooks of `event` on all ranks that have some. Collective: no rank goes on before all are done, and
        one whose hook has failed raises UserError on all of them."""
        if self.hooks is None:
            return
        with inside(IN_HOOK, step):
            told = gather_objects(self.world, self.hooks.call(event, step, thing))
        for rank, (lines, _) in enumerate(told):
            for line in lines:
                self.say(f"warning: rank {rank}: {line}")
        problem = next((problem for _, problem in told if problem), "")
        if problem:
            raise UserError(problem)

    def total_of(self, phase: str) -> int:
        """The last step of a phase, as everything that a person sees counts steps: over all phases."""
        warmup, before = self.cfg.warmup.num_steps, self.state.global_step - self.state.step
        if phase != self.plan.phase:
            return warmup
        return self.plan.num_steps + (before if self.state.phase == phase else warmup)

    def steps(
        self,
        phase: str,
        total: int,
        *,
        then: str = "",
        evaluate_every: int = 0,
        evaluate_first: bool = False,
        called: str = "",
    ) -> Iterator[Step]:
        """The steps of one loop that are still to be done; `for step in run.steps(...)` is the frame of every trainer.

        Between two steps it records metrics, evaluates (every `evaluate_every` steps, 0 = never, and after the last),
        saves (every checkpoint.every_steps, after the last, and after the best evaluation) and looks whether the run
        was asked to stop. A loop whose phase is over yields nothing. `then` names the phase that begins when this one
        has ended; `called` is the phase's name in the records, if it has another one there.
        """
        state = self.state
        if state.phase != phase:
            return
        if evaluate_first and state.global_step == 0 and self.sets:
            self.evaluate()
            self.finish_step(0, called or phase)
        if then and state.step > total:
            raise UserError(
                f"{total} steps of {phase}: this run has done {state.step} already; give at least that many"
            )
        while (state.step < total and not self.ends_early) or state.unrecorded or then:
            if state.step < total and not state.unrecorded and not self.ends_early:
                self.before_step = dataclasses.asdict(state)
                self.check_stop()
                step = Step(self, state.step)
                with self.profiled(step):
                    yield step
                self._end_step(step)
            every = self.cfg.checkpoint.every_steps
            if state.step == total or (evaluate_every and state.step % evaluate_every == 0):
                self.evaluate()
            last = state.step == total or self.ends_early
            metrics = self.finish_step(state.global_step, called or phase)
            state.unrecorded = False
            if self.hooks is not None:
                self.tell_hooks("on_step", state.global_step, broadcast_object(self.world, metrics))
            if not last:
                self._draw_curves()
            for line in self.checkpointer.poll():
                self.say(line)
            save = last or (every > 0 and state.step % every == 0) or self._is_best()
            if last and then:
                state.phase, state.step = then, 0
            if save:
                self.save()
            if last:
                return

    @contextlib.contextmanager
    def profiled(self, step: Step) -> Iterator[None]:
        """Around a step, which a person may have asked to profile on this rank."""
        if self.profiler is not None:
            self.profiler.begin(step.number)
        yield
        if self.profiler is not None:
            with inside(SAVING, step.number):
                self.profiler.end(step.number)

    def _end_step(self, step: Step) -> None:
        """What was learned counts from here on."""
        metrics = step.sums.result(self.world)
        self.tracker.add(metrics)
        self.tracker.add(memory_metrics())
        if self.plan.due("replicas", step.number):
            self.engine.check_replicas()
        self.before_step = None
        self.state.step += 1
        self.state.global_step += 1
        self.state.unrecorded = True
        of_groups = self.cfg.trainer == "rl" and ADVANTAGES.get(self.cfg.algorithm.advantage.name).group
        self.advise(self.state.advisories.look(self.state.global_step, metrics, of_groups=of_groups))
        if self.state.advisories.hopeless:
            self._stop_without_verifiers()

    def finish_step(self, step: int, phase: str) -> Metrics:
        """Writes the record of a step and says what it gives cause for; returns it on rank 0, {} elsewhere."""
        metrics = self.tracker.finish_step(step, phase)
        if self.world.is_leader:
            if self.measured != self.saved:
                self.measured = self.saved
                found = newest(self.folder.checkpoints)
                with contextlib.suppress(OSError):  # old ones are deleted meanwhile
                    files = found.path.rglob("*") if found is not None else ()
                    self.history.facts["checkpoint_gib"] = sum(path.stat().st_size for path in files) / 2**30
            if self.tracker.recorder is not None:
                self.history.facts |= {k: v for k, v in self.tracker.recorder.last.items() if k == "disk_free_gib"}
            self.history.add({"step": step, "phase": phase, **metrics})
            self.advise(self.state.advisories.look_back(self.history))
        return metrics

    def advise(self, found: Sequence[Advisory]) -> None:
        """Says advisories, keeps them in advisories.jsonl and sends them where alerts go; on rank 0."""
        for one in found if self.world.is_leader else ():
            self.say(one.line)
            if self.alerts is not None:
                self.alerts.tell(one)

    def _draw_curves(self) -> None:
        """Now and then draws the curves so far, beside the run: after half a minute, then after twice as long as before
        each time, since each costs a second or two of one core."""
        now = time.monotonic()
        if self.world.is_leader and now >= self.draw_at and (self.drawing is None or self.drawing.poll() is not None):
            self.drawing = draw_beside(self.folder.path) if self.draw_at else None
            self.draw_every = min(2 * self.draw_every, DRAW_SECONDS[1])
            self.draw_at = now + self.draw_every

    def _stop_without_verifiers(self) -> None:
        """Ends a run in which no verifier works, and all of its episodes are masked. Collective. Raises UserError."""
        reason = next((text for text in gather_objects(self.world, self.invalid) if text), "no reason was kept")
        if self.world.is_leader:
            result = {"name": self.cfg.run.name, "state": "stopped", "advisories": self.state.advisories.said}
            write_atomic(self.folder.path / RESULT, json.dumps(result, indent=1) + "\n")
        raise UserError(
            f"env.name={self.cfg.env.name}: all verifiers fail, in step {self.state.global_step} of every episode; "
            f"the first: {reason}; mend it, then the same command goes on"
        )

    def note_sampler(self, sampler: Sampler) -> None:
        """Says once by what sequences are drawn."""
        if not self.backend:
            self.backend = sampler.backend
            self.say(f"{'sampler':<12}{BACKENDS.get(self.backend, self.backend)}")

    def rollout_config(self, kind: Literal["train", "eval"], one: EvalSetConfig | None = None) -> RolloutConfig:
        """How episodes are played, in an evaluation those of the set `one`; the key says what each draw belongs to."""
        cfg, training = self.cfg, kind == "train"
        one = one or own_set(cfg)
        combine = self.objectives.combine if one.own else Objectives().combine
        drawn = dataclasses.replace(self.plan.eval_sampling, temperature=one.temperature, max_tokens=one.max_new_tokens)
        what = "sampling" if training else f"evaluating {one.name}".rstrip()
        share = f" (rank 0 of {self.world.size})" if self.world.size > 1 else ""
        return RolloutConfig(
            env=one.env,
            params=self.plan.sampling if training else drawn,
            group_size=cfg.batch.samples_per_prompt if training else one.samples_per_prompt,
            max_row_tokens=self.engine.max_row_tokens,
            key=(cfg.seed, kind),
            plugins=cfg.plugins,
            combine=partial(combine, constrained=training),
            stop_requested=self.watch.stop_requested,
            progress=partial(self.tracker.progress, f"{what} episodes{share}"),
        )

    @contextlib.contextmanager
    def phase(self, name: str, span: str, step: int) -> Iterator[None]:
        """Tells the watchdog that this rank is in phase `name` of step `step`, and times it as `span`."""
        with inside(name, step), self.tracker.span(span, name):
            yield

    def check_stop(self) -> None:
        """Raises StopRun on every rank when any has been asked to stop. Collective; called where nothing of the step
        under way has been learned yet, and between steps."""
        if all_reduce_sum(self.world, np.array([float(self.watch.stop_requested())]))[0]:
            raise StopRun

    def evaluate(self) -> Metrics:
        """Measures the policy on the held-out prompts and on eval.sets without learning: plays them or, for the former
        with `measure`, does as that says. Adds global metrics to the current step, keeps the accuracy, and returns the
        metrics.

        "eval/accuracy:mean" is the mean of the environment's "correct:mean", else of the reward above 0. Prompts are
        dealt to the ranks; which rank plays one changes nothing. Ranks that were asked to stop leave when they have
        played. Nothing without held-out prompts and sets. Collective.
        """
        if not self.sets:
            return {}
        metrics: Metrics = {}
        with self.phase("evaluation", "evaluate", self.state.global_step):
            for one in self.sets:
                own = None if one.config.name else self.measure
                metrics |= play_and_measure(self, one)[1] if own is None else own(self)
            self.check_stop()
        self.tracker.add(metrics)
        self.state.score = self._score(metrics)
        self.state.evaluated_at = self.state.global_step
        self.state.accuracy = metrics.get("eval/accuracy:mean")
        if self.state.first_accuracy is None:
            self.state.first_accuracy = self.state.accuracy
        if self.state.phase != "warmup" or self.supervised:
            if reason := look_whether_to_end(self.cfg, self.state, metrics):
                self.say(f"step {self.state.global_step}: training ends here: {reason}")
        self.tell_hooks("on_evaluate", self.state.global_step, metrics)
        return metrics

    def next_prompts(self) -> list[Prompt]:
        """The next batch.prompts_per_step prompts of the training stream, all of them on every rank."""
        first, count = self.state.position, self.cfg.batch.prompts_per_step
        self.state.position += count
        return [self.stream.at(position) for position in range(first, first + count)]

    @property
    def ends_early(self) -> bool:
        """Whether training has ended by eval.stop_when or eval.patience, as they are now."""
        return self.state.stopped_by == [self.cfg.eval.stop_when, self.cfg.eval.patience]

    def has_judges(self, env: EnvConfig | None = None) -> bool:
        """Whether some rewards of an environment, by default the run's, are of whole batches; they live as it does."""
        return bool(self._judges_of(env or self.cfg.env))

    def _judges_of(self, env: EnvConfig) -> Judges:
        if (found := next((judges for known, judges in self.judges if known == env), None)) is None:
            found = [(one, one(**params)) for one, params in group_rewards_of(env, batch=True)]
            self.judges.append((env, found))
        return found

    def score_batch(self, groups: list[list[Episode]], config: RolloutConfig) -> None:
        """Adds the rewards of whole batches, if there are any, to this rank's episodes. The frozen reference is what it
        will be, the policy as it is now, until RL begins. Collective, outside of sampling."""
        if judges := self._judges_of(config.env):
            reference = self.plan.reference if self.plan.reference in self.engine.models else "policy"
            score_batch(judges, groups, config, rank_tools(self.engine, reference))

    def _score(self, metrics: Metrics) -> float | None:
        """What checkpoints are compared by; None where nothing was measured. For a metric that evaluations do not have
        raises UserError before the first step; later, when work would be lost, it is said."""
        name = self.cfg.checkpoint.best_metric
        if name not in metrics and self.cfg.checkpoint.keep_best and metrics:
            known = ", ".join(sorted(metrics))
            text = f"checkpoint.best_metric={name}: the evaluation has no such metric; it has: {known}"
            if self.state.global_step == 0 and "eval/reward:mean" in metrics:  # where nothing was scored it may come
                raise UserError(text)
            self.say(text)
        return metrics.get(name)

    def _is_best(self) -> bool:
        """Whether this step was evaluated and is better than all checkpoints there are. Collective."""
        state = self.state
        if state.evaluated_at != state.global_step or (score := state.score) is None:
            return False
        self.checkpointer.wait()
        return on_leader(self.world, lambda: self.checkpointer.improves(score))

    def write_rollouts(self, groups: list[list[Episode]], name: str) -> None:
        """Writes this rank's episodes to the run folder."""
        write_rollouts(self.folder.rollouts, name, groups, self.engine.tokenizer, rank=self.world.rank)

    def save(self, *, block: bool = False) -> None:
        """Saves all models and the state; returns when the weights are copied, or with `block` when all is on disk."""
        state = self.state
        state.kl = self.kl.state_dict() if self.kl is not None else {}
        state.multipliers = self.objectives.state_dict()
        tensors = self.engine.state()
        state.models, state.successes = sorted(tensors), 0
        if self.successes:
            data = np.frombuffer(bytearray(json.dumps(self.successes).encode()), np.uint8)
            tensors["self_imitation"], state.successes = {"data": torch.from_numpy(data)}, len(data)
        state.metrics_offset = broadcast_object(self.world, self.tracker.offset())
        state.pending = broadcast_object(self.world, self.tracker.pending()) if state.unrecorded else {}
        with self.phase(SAVING, "save", state.global_step):
            self.checkpointer.save(
                f"{state.global_step:06d}",
                tensors,
                {**dataclasses.asdict(state), "config": to_dict(self.cfg)},
                score=state.score if state.evaluated_at == state.global_step else None,
                block=block,
            )
        self.saved = (state.global_step, state.unrecorded)
        if self.hooks is not None:
            self.checkpointer.wait()  # a hook may look into the folder
            self.tell_hooks("on_checkpoint", state.global_step, self.folder.checkpoints / f"{state.global_step:06d}")

    def save_and_exit(self) -> StopRun:
        """All ranks have agreed to stop: takes the step under way back, saves what is not saved yet, and tells people
        and launcher. Collective.

        Returns what `run_loop` raises then. In the run folder: a line in stops.jsonl, and what `mark_stop` leaves.
        """
        if self.before_step is not None:
            vars(self.state).update({**self.before_step, "advisories": Advisories(**self.before_step["advisories"])})
        request = next(r for r in gather_objects(self.world, self.watch.stop_request) if r is not None)
        if self.saved != (self.state.global_step, self.state.unrecorded):
            self.save(block=True)
        with inside(SAVING, self.state.global_step):
            self.checkpointer.wait()
            waited = gather_objects(
                self.world, time.monotonic() - self.watch.stop_requested_at if self.watch.stop_requested() else 0.0
            )
        for line in self.checkpointer.poll():
            self.say(line)
        if self.world.is_leader:
            self._record_stop(request, max(waited))
        return StopRun(f"stopped by {request.reason} on rank {request.rank}, saved", request.exit_code)

    def _record_stop(self, request: StopRequest, seconds: float) -> None:
        found = newest(self.folder.checkpoints)
        record = {
            **dataclasses.asdict(request),
            "done": self.state.global_step,
            "checkpoint": found.tag if found is not None else "",
            "seconds": round(seconds, 3),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with open(self.folder.path / STOPS, "a") as file:
            file.write(json.dumps(record) + "\n")
        mark_stop(self.folder.path, request.reason, request.exit_code)
        (self.folder.path / STOP_FILE).unlink(missing_ok=True)
        self.say(
            f"stopped by {request.reason} on rank {request.rank} in {request.phase}; saved and left after "
            f"{seconds:.1f} s; the same command goes on"
        )

    def create_models(self) -> None:
        """Makes the models that RL needs beside the policy: the frozen reference is the policy as it is now, or with
        model.lora the base, which is there already."""
        with inside(LOADING, self.state.global_step):
            if self.plan.needs_reference and self.plan.reference not in self.engine.models:
                averaged = self.cfg.algorithm.reference.ema > 0
                self.engine.create("reference", ModelSpec(trainable=False, copy_of="policy", averaged=averaged))
            if self.plan.needs_critic and "critic" not in self.engine.models:
                self.engine.create("critic", ModelSpec(head="value"))

    def kl_coef(self) -> float:
        """The KL coefficient in force."""
        return self.kl.coef if self.kl is not None else self.cfg.algorithm.kl.coef

    def __enter__(self) -> Run:
        self.tracker.restart_clock()
        enter(BETWEEN_PHASES, self.state.global_step)
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
            if self.alerts is not None:
                self.alerts.close()
            self.folder.close()
            shut_pool()  # a reward that the next run of this process brings may have the same name and other code
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
