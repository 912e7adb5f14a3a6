"""`skyrl-tx replay`: a step of RL again from its dumped rollouts, on one CPU process, by the loop's own code.

Phase "reward" plays the episodes again with what was drawn (a sampler that reads the dump), "advantage" goes by the
dumped rewards as far as advantages, "loss" takes the optimizer's step too (trainers.rl.train_step), from the weights
before it: a checkpoint's or the initial ones, by way of every step since, if all were dumped. Nothing is written.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from skyrl.algorithms.variance import score_of
from skyrl.args import Parser, path_arg
from skyrl.checkpoint.folder import CheckpointInfo, survey
from skyrl.config.load import flat, from_dict, load_config, to_dict, typed_options
from skyrl.config.schema import RunConfig
from skyrl.data import make_splits
from skyrl.distributed.init import World
from skyrl.distributed.watchdog import Watchdog
from skyrl.engine import Engine
from skyrl.envs.base import group_rewards_of
from skyrl.evaluation.weight_check import fingerprint
from skyrl.loop import check_base, create_policy, load_checkpoint, make_engine, make_run
from skyrl.planner.plan import make_plan, model_sizes
from skyrl.registry.plugins import import_plugins
from skyrl.rollout import rollout, to_rows
from skyrl.run import Run, Step
from skyrl.run_dir import RunFolder
from skyrl.run_dir.reader import RunReader, find_run
from skyrl.sampler.sampler import Sampler
from skyrl.text.chat import chat_of
from skyrl.tracking.base import Record, Sink, Tracker, without_wall_clock
from skyrl.trainers.experience import add_advantages, create_references, note_advantages
from skyrl.trainers.generation import first_groups, note_groups, note_objectives, record_episodes
from skyrl.trainers.rl import train_step
from skyrl.types import Episode, Prompt, Sample, SampleRequest, TokenSupport, Turn, UserError, few

PHASES = ("reward", "advantage", "loss")
GROUPS = ("algorithm", "optim", "env", "plugins", "debug")  # options that act on rollouts that are there
OPTIONS = "batch.optim_steps_per_batch batch.epochs_per_batch batch.max_tokens_per_microbatch batch.packing".split()
ROUNDING = 1e-5  # relative; what another device, dtype or number of ranks changes


def replay(args: Sequence[str]) -> int:
    """Runs the command line; 1 when a number is another one than was logged. Raises UserError."""
    p = Parser(prog="skyrl-tx replay", description="A step again from its dumped rollouts, by the loop's own code.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("overrides", nargs="*", help="option=value: what these would have done on the same rollouts")
    p.add_argument("--config", dest="more", nargs="+", default=[], metavar="OPTION=VALUE", help="overrides as well")
    p.add_argument("--step", type=int, help="step, as the console counts (default: the newest that was dumped)")
    p.add_argument("--phase", choices=PHASES, default="advantage", help="how far (advantage)")
    p.add_argument("--json", action="store_true", help="every number, for programs")
    given = p.parse_intermixed_args(list(args))
    found = replay_step(find_run(given.run, "replay"), given.step, given.phase, [*given.overrides, *given.more])
    print(json.dumps(found, indent=1) if given.json else describe(found))
    return int("differs" in found["compared"].values())


def replay_step(reader: RunReader, step: int | None, phase: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `skyrl-tx replay --json` prints: "logged", "replayed" and, with overrides, "overridden" metrics of the step,
    how the first two compare, and lines about "episodes" whose reward is another one now. Raises UserError for a step,
    phase or option that cannot be replayed."""
    values = reader.options("replay")
    cfg = from_dict(values)
    import_plugins(cfg.plugins)
    changed = _with_overrides(values, overrides) if overrides else None
    if cfg.feedback.enabled and phase == "reward":
        raise UserError("replay: --phase reward: the rewards of this run came from its users; replay advantage or loss")
    if cfg.algorithm.router.replay and phase == "loss":
        raise UserError(
            "replay: --phase loss: algorithm.router.replay=true, and rollouts keep no experts; replay advantage"
        )
    logged = {int(record["step"]): record for record in reader.metrics()[0] if record.get("phase") == "rl"}
    there = [int(name) for name in reader.dumps() if name.isdecimal() and int(name) in logged]
    if not there:
        raise UserError(
            f"replay: {reader.path} has no step of RL with its rollouts (tracking.rollouts_every keeps them)"
        )
    step = max(there) if step is None else step
    if step not in there:
        raise UserError(f"replay: --step={step}: {reader.path} has rollouts of steps {few(there, 12)} alone")
    start = _start(reader, cfg, there, step) if phase == "loss" else None
    begin = f"checkpoint {start.tag}" if start else "the initial weights" if phase == "loss" else "the rollouts alone"
    out: dict[str, Any] = {"run": str(reader.path), "step": step, "phase": phase, "from": begin}
    out |= {"overrides": list(overrides), "logged": without_wall_clock(logged[step])}
    one = _Replay(reader, cfg, logged, phase, step, start)
    out["replayed"], out["episodes"] = one.run(None)
    if changed is not None:
        out["overridden"], out["episodes"] = one.run(changed)
    pairs = {k: (out["logged"][k], v) for k, v in out["replayed"].items() if k in out["logged"]}
    close = {k for k, pair in pairs.items() if math.isclose(*pair, rel_tol=ROUNDING, abs_tol=ROUNDING)}
    same = {k for k, pair in pairs.items() if repr(pair[0]) == repr(pair[1])}
    out["compared"] = {k: "equal" if k in same else "rounding" if k in close else "differs" for k in pairs}
    return out


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The recorded options with those that a person typed, whole groups too (algorithm=dapo). Raises UserError."""
    typed, known, merged = typed_options(overrides), flat(values), copy.deepcopy(values)
    for key in typed:
        if key.split(".")[0] not in GROUPS and key not in OPTIONS:
            allowed = ", ".join((*GROUPS, *OPTIONS))
            raise UserError(f"replay: {key}: does not act on rollouts that are there; give options of {allowed}")
    names = [name for name in ("algorithm.advantage.name", "algorithm.loss.name", "env.name") if name in known]
    base = [f"{name}={known[name]}" for name in names if not typed.keys() & {name, name.split(".")[0]}]
    changed = to_dict(load_config(["experiment=custom", *base, *overrides]))
    for key in typed:
        for path in (key, *([key[: -len("name")] + "params"] if key in names[:2] else ())):  # of another one
            *above, last = path.split(".")
            target, source = merged, changed
            for name in above:
                target, source = target.setdefault(name, {}), source[name]
            target[last] = source[last]
    return from_dict(merged)


def _start(reader: RunReader, cfg: RunConfig, there: list[int], step: int) -> CheckpointInfo | None:
    """The newest checkpoint from which every step up to `step` has its rollouts; None: the initial weights. Raises
    UserError that says which steps can be replayed."""
    known = [info for info in survey(reader.path / "checkpoints")[0] if info.state.get("phase") == "rl"]
    starts: dict[int, CheckpointInfo | None] = {int(info.state["global_step"]): info for info in known}
    if not cfg.warmup.num_steps and cfg.run.resume in ("auto", "never"):
        starts[0] = None

    def before(number: int) -> int:
        number -= 1
        while number not in starts and number in there:
            number -= 1
        return number

    if before(step) in starts:
        return starts[before(step)]
    can = few([number for number in there if before(number) in starts], 12) or "none"
    raise UserError(
        f"replay: --step={step} --phase loss: the weights before it are not there, and no checkpoint from "
        f"which on every step has its rollouts; steps that can be replayed: {can} (checkpoint.keep_last=0 "
        "and tracking.rollouts_every=1 keep all)"
    )


class _DumpSampler:
    """A sampler that draws what was drawn: by the uid of a request, "<position>/<index>/<turn>"."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.drawn = {f"{e.position}/{e.index}/{n}": turn for e in episodes for n, turn in enumerate(e.turns)}
        self.asked: list[Sample] = []

    def unfinished(self) -> bool:
        return bool(self.asked)

    def add(self, request: SampleRequest) -> None:
        turn = self.drawn.get(request.uid)
        if turn is None or not np.array_equal(turn.context, request.tokens):
            what = "goes on for longer" if turn is None else "says something else"
            raise UserError(
                f"replay: episode {request.uid} (position/sample/turn): the environment {what} than in the "
                "run; is it the run's code, data and tokenizer? --phase advantage needs none"
            )
        self.asked.append(replace(turn.sample, uid=request.uid))

    def step(self) -> list[Sample]:
        asked, self.asked = self.asked, []
        return asked


class _Silent(Sink):
    """Nobody hears of the step; a Tracker without any sink would not count."""

    def write(self, record: Record) -> None:
        pass


class _Replay:
    """The way from the weights of `start` to the metrics of `step`, in a world of one rank that writes nothing."""

    def __init__(
        self, reader: RunReader, cfg: RunConfig, logged: dict[int, Record], phase: str, step: int, start: Any
    ) -> None:
        self.reader, self.logged, self.phase, self.step, self.start = reader, logged, phase, step, start
        self.cfg, self.world = _on_cpu(cfg), World(0, 1, 0, torch.device("cpu"))

    def run(self, changed: RunConfig | None) -> tuple[Record, list[str]]:
        """The record of the step, and lines about episodes with another reward; with `changed` options in the last
        step."""
        episodes, cfg = self._episodes(self.step), self.cfg
        run = self._open(cfg, episodes)
        if self.phase == "loss":
            create_policy(run.engine)
            if self.start is not None:
                check_base(fingerprint(run.engine, "base") if cfg.model.lora.rank else "", self.start, cfg)
                load_checkpoint(run, self.start)
            run.create_models()
            create_references(run)
            while run.state.global_step + 1 < self.step:
                self._train(run, self._episodes(run.state.global_step + 1))
                run.state.step, run.state.global_step = run.state.step + 1, run.state.global_step + 1
        run.state.global_step = self.step - 1
        if changed is not None:
            run = self._change(run, _on_cpu(changed), episodes)
        lines: list[str] = []
        if self.phase == "reward":
            episodes, lines = self._play(run, episodes)
        return self._train(run, episodes), lines

    def _episodes(self, step: int) -> list[Episode]:
        """The dumped episodes of a step, in the order of the stream. Raises UserError for a dump that is damaged."""
        name = f"{step:06d}"
        try:
            found = [_episode(entry) for entry in self.reader.rollouts(name)]
        except (KeyError, TypeError, ValueError) as error:
            where = self.reader.path / "rollouts" / name
            raise UserError(f"replay: {where}-r*.jsonl: damaged, or of an earlier release ({error!r})") from None
        return sorted(found, key=lambda one: (one.position, one.index))

    def _open(self, cfg: RunConfig, episodes: list[Episode], engine: Engine | None = None) -> Run:
        elsewhere = replace(cfg, dry_run=True, run=replace(cfg.run, world_size=1))  # this machine need not train it
        plan = replace(make_plan(elsewhere, 1, model_sizes=model_sizes(cfg), device="cpu"), cfg=cfg)
        watch = Watchdog(self.world, self.reader.path, hang_seconds=0.0, patience=0.0, save_by=None)
        folder, prompts = RunFolder(self.reader.path, rank=1), [one.prompt for one in episodes]  # rank 0 would write
        engine = engine or make_engine(cfg, self.world, plan, chat_of(cfg))
        run = make_run(cfg, plan, engine, (prompts, ()), folder, watch)
        run.tracker, run.state.phase = Tracker([_Silent()]), "rl"
        if self.phase != "loss" or engine.models:  # else they come with the weights
            for name, value in run.objectives.multipliers.items():
                run.objectives.multipliers[name] = float(self.logged[self.step].get(f"multiplier/{name}:mean", value))
        return run

    def _change(self, old: Run, cfg: RunConfig, episodes: list[Episode]) -> Run:
        """The run with other options from here on. Raises UserError for those that need a model which it had not."""
        run = self._open(cfg, episodes, old.engine)
        run.state, run.successes, run.engine.cfg = old.state, old.successes, cfg
        if run.kl is not None and cfg.algorithm.kl.coef == self.cfg.algorithm.kl.coef:
            run.kl.coef = old.kl_coef()
        needed = {run.plan.reference: run.plan.needs_reference, "critic": run.plan.needs_critic}
        for name in [name for name, is_needed in needed.items() if is_needed and name not in run.engine.models]:
            if self.phase == "loss" and run.state.step:
                raise UserError(
                    f"replay: these options need a {name} model, which this run did not have; replay its "
                    "first step of RL, where that model is made"
                )
        if self.phase == "loss":
            run.create_models()
        return run

    def _play(self, run: Run, dumped: list[Episode]) -> tuple[list[Episode], list[str]]:
        """The episodes played again by the environment as it is now, and lines about those with another reward."""
        env = run.cfg.env
        if group_rewards_of(env, batch=True):
            raise UserError("replay: --phase reward: a reward here judges whole batches, with models; replay advantage")
        if hidden := [name for name, value in flat({"options": env.options}).items() if "(hidden " in str(value)]:
            raise UserError(f"replay: env.{hidden[0]} is secret and not in config.yaml; give it after the run's name")
        known = {prompt.uid: prompt for prompts in make_splits(run.cfg)[0].values() for prompt in prompts}
        if lost := [one.prompt.uid for one in dumped if one.prompt.uid not in known]:
            raise UserError(f"replay: env.name={env.name} has no prompt {lost[0]} any more; was its data changed?")
        config = replace(run.rollout_config("train"), env=replace(env, workers=min(env.workers, 1)))
        prompts = list({one.position: known[one.prompt.uid] for one in dumped}.items())
        groups = rollout(cast(Sampler, _DumpSampler(dumped)), prompts, config, run.engine.chat)
        played, lines = [one for group in groups for one in group], []
        for one, before in zip(played, dumped, strict=True):
            now, then, one.baseline = one.invalid or one.reward, before.invalid or before.reward, before.baseline
            if now != then:
                lines.append(f"{one.prompt.uid} sample {one.index}: reward {then} in the run, now {now}")
        return played, lines

    def _train(self, run: Run, episodes: list[Episode]) -> Record:
        """The step under way from its episodes on, as far as the phase goes."""
        step = Step(run, run.state.step)
        found: dict[int, list[Episode]] = {}
        for one in episodes:
            for turn in one.turns:
                if turn.objectives:
                    turn.reward, turn.scale = run.objectives.combine(turn.objectives)
            one.reward, _ = score_of(turn.reward for turn in one.turns)
            found.setdefault(one.position, []).append(one)
        groups = list(found.values())
        run.objectives.names = []
        note_objectives(run, groups)
        keep_P = note_groups(run, step, groups)
        record_episodes(run, step, groups)
        batch, num_groups = first_groups(run, [one for one, keep in zip(found.items(), keep_P, strict=True) if keep])
        kl = run.cfg.algorithm.kl
        if self.phase == "loss":
            train_step(run, step, batch, num_groups)
        elif self.phase == "advantage" and (run.plan.needs_critic or (kl.coef and kl.placement == "reward")):
            raise UserError("replay: --phase advantage: these advantages need a model's scores; replay --phase loss")
        elif self.phase == "advantage" and num_groups:
            note_advantages(step, add_advantages(run, to_rows(batch)))
        run.tracker.add(step.sums.result(run.world))
        return without_wall_clock(run.tracker.finish_step(step.number, "rl"))


def _on_cpu(cfg: RunConfig) -> RunConfig:
    strategy = replace(cfg.strategy, name="single", device="cpu", offload="none")
    return replace(cfg, strategy=strategy, tracking=replace(cfg.tracking, rollouts_every=0))


def _episode(entry: dict[str, Any]) -> Episode:
    """An episode as the loop had it, from a line of a dump. Raises KeyError, TypeError or ValueError for a bad line."""
    turns = []
    for turn in entry["turns"]:
        tokens, logprobs = np.array(turn["tokens"], np.int64), np.array(turn["logprobs"], np.float32)
        cuts = [np.array(turn[name], np.int32) for name in ("counts", "ids") if name in turn]
        sample, context = (
            Sample("", tokens, logprobs, turn["stop"], turn["version"], TokenSupport(*cuts) if cuts else None),
            np.array(turn["context"], np.int64),
        )
        turns.append(Turn(context, sample, float(turn["reward"]), turn["read"], [], turn.get("objectives", {})))
    prompt = Prompt(entry["uid"], entry["env"], [], entry["extra"])
    metrics = {key: float(value) for key, value in entry["metrics"].items()}
    one = Episode(prompt, entry["index"], turns, float(entry["reward"]), entry["stop"], metrics, entry["invalid"])
    one.seed, one.position = entry["seed"], entry["position"]
    one.baseline = float(entry["baseline"]) if "baseline" in entry else None
    return one


def describe(found: dict[str, Any]) -> str:
    """What `replay_step` found, for a person."""
    over, compared = found.get("overridden"), found["compared"]
    rows = [["metric", "logged", "replayed", "", "overridden" if over else ""]]
    for key in sorted({*compared, *(over or ())}):
        cells = [f"{part[key]:.9g}" if key in part else "-" for part in (found["logged"], found["replayed"])]
        rows.append([key, *cells, compared.get(key, ""), f"{over[key]:.9g}" if over and key in over else ""])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [f"step {found['step']} of {found['run']}, phase {found['phase']}, from {found['from']}"]
    lines += [f"overridden: {' '.join(found['overrides'])}"] * bool(over)
    lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = Counter(compared.values())
    lines.append(f"{counts['equal']} equal, {counts['rounding']} but for rounding, {counts['differs']} differ")
    if left := sorted(found["logged"].keys() - found["replayed"].keys() - {"step", "phase"}):
        lines.append(f"logged, and not made here: {few(left, 8)}")
    return "\n".join([*lines, *found["episodes"][:20]])
