"""Evaluation alone: every set is played, scored and written down; what was played before a stop is not played again.

Episodes are appended to their files prompt by prompt. A start with the same options, data, code and weights takes up
the prompts that are whole there, on any number of ranks, and plays the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.checkpoint.folder import MANIFEST
from skyrl.config.load import config_digest
from skyrl.config.schema import RunConfig
from skyrl.distributed.collectives import broadcast_object, on_leader
from skyrl.evaluation.measure import play_set, set_metrics
from skyrl.evaluation.scores import results_table
from skyrl.evaluation.sets import EvalSet
from skyrl.files import text_of, write_atomic
from skyrl.loop import run_loop
from skyrl.run import Run
from skyrl.run_dir import FINGERPRINT, RunFolder, RunReader
from skyrl.tracking.rollouts import append_rollouts
from skyrl.types import Episode, Prompt, Sample, Turn

KEY = "evaluation.key"  # digest of all that decides what is drawn: whether what lies there is of this evaluation
RESULTS = "evaluation.json"
COUNTED = ("data.", "model.", "env.", "code.")  # of the run's fingerprint; without our own code


def evaluate(cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """Plays eval.sets, or without any the held-out prompts, with the weights of model.path or of the checkpoint
    run.resume; writes evaluation.json and the rollouts, and prints a table. Returns what result.json holds. Raises
    StopRun, with all that was played kept, after a signal or at a deadline."""
    results: dict[str, Any] = {}
    told = run_loop(cfg, lambda run: results.update(_evaluate(run)), trains=False, hooks=hooks)
    accuracy = next(iter(results.values()))["accuracy"] if len(results) == 1 else None
    return {**told, "state": "evaluated", "accuracy": accuracy, "sets": results}


def _evaluate(run: Run) -> dict[str, Any]:
    """The results of all sets by name, the same on every rank."""
    on_leader(run.world, lambda: _begin(run))
    results = {}
    with run.phase("evaluation", "evaluate", 0):
        for one in run.sets:
            results[one.title] = _evaluate_set(run, one)
    on_leader(run.world, lambda: _write(run, results))
    metrics = broadcast_object(run.world, run.tracker.finish_step(0, "evaluate"))
    run.tell_hooks("on_evaluate", 0, metrics)
    return results


def _evaluate_set(run: Run, one: EvalSet) -> dict[str, Any]:
    """Plays what is left of a set; its results."""
    name, config, before = f"{one.config.dump}-000000", one.config, dict[int, list[Episode]]()

    def take_up() -> tuple[set[int], int]:
        before.update(_take_up(run.folder, name, one))
        return set(before), len([*run.folder.rollouts.glob(f"{name}-r*.jsonl")])

    known, files = on_leader(run.world, take_up)
    if known:
        run.say(f"{one.title}: {len(known)} of {len(one.prompts)} prompts were played before")
    mine = run.world.deal([pair for pair in enumerate(one.prompts) if pair[0] not in known])
    file = run.folder.rollouts / f"{name}-r{files + run.world.rank}.jsonl"  # never one whose last line may be torn
    judged = run.has_judges(config.env)  # rewards of whole batches come last: nothing is complete before

    def write(place: int, episodes: list[Episode]) -> None:
        append_rollouts(file, episodes, run.engine.tokenizer)

    groups = play_set(run, one, mine, **({} if judged else {"finished": write}))
    for episodes in groups if judged else ():
        write(0, episodes)
    places = [*before, *(place for place, _ in mine)]
    metrics, found = set_metrics(run.cfg, run.world, one, places, [*before.values(), *groups], plain=False)
    run.tracker.add(metrics)
    told: dict[str, Any] = {key: metrics[f"{config.prefix}{key}"] for key in ("invalid:sum", "cut_by_length:mean")}
    how = {key: getattr(config, key) for key in ("samples_per_prompt", "temperature", "max_new_tokens")}
    accuracy = found["metrics"].get(f"avg@{config.samples_per_prompt}", {}).get("value")
    told |= {"accuracy": accuracy, "training_prompts": one.overlap, **found}
    return {"env": config.env.name, "prompts": len(one.prompts), **how, **told}


def _begin(run: Run) -> None:
    """Removes what another evaluation has left in the folder."""
    facts = json.loads(text_of(run.folder.path / FINGERPRINT) or "{}")
    read = {k: v for k, v in facts.items() if k.startswith(COUNTED) and not k.startswith("code.skyrl/")}
    weights = text_of(Path(run.state.parent) / MANIFEST) if run.state.parent else ""
    sets = [repr(one.config) for one in run.sets]
    key = hashlib.sha256(repr([config_digest(run.cfg), sorted(read.items()), weights, sets]).encode()).hexdigest()
    if text_of(run.folder.path / KEY) != key:
        for path in run.folder.rollouts.glob("eval*-000000-r*.jsonl"):
            path.unlink()
        write_atomic(run.folder.path / KEY, key)


def _take_up(folder: RunFolder, name: str, one: EvalSet) -> dict[int, list[Episode]]:
    """The prompts of a set, by place, all of whose episodes lie in the files of earlier starts."""
    places = {prompt.uid: place for place, prompt in enumerate(one.prompts)}
    found: dict[int, dict[int, Episode]] = {}
    for entry in RunReader(folder.path).rollouts(name):
        if (place := places.get(entry["uid"])) is not None:
            found.setdefault(place, {})[entry["index"]] = _episode(one.prompts[place], entry)
    wanted = range(one.config.samples_per_prompt)
    return {place: [of[i] for i in wanted] for place, of in found.items() if of.keys() == set(wanted)}


def _episode(prompt: Prompt, entry: dict[str, Any]) -> Episode:
    """An episode as it was written down, as far as its scores need it."""
    turns = []
    for turn in entry["turns"]:
        tokens, logprobs = np.array(turn["tokens"], np.int64), np.array(turn["logprobs"], np.float32)
        sample = Sample(entry["uid"], tokens, logprobs, turn["stop"], turn["version"])
        context = np.array(turn["context"], np.int64)
        objectives = turn.get("objectives", {})
        turns.append(Turn(context, sample, turn["reward"], turn["read"], objectives=objectives))
    return Episode(
        prompt, entry["index"], turns, entry["reward"], entry["stop"], entry["metrics"], entry["invalid"], entry["seed"]
    )


def _write(run: Run, results: dict[str, Any]) -> None:
    model = run.state.parent or run.cfg.model.path
    told = {"model": model, "seed": run.cfg.seed, "sets": results}
    write_atomic(run.folder.path / RESULTS, json.dumps(told, indent=1) + "\n")
    where = f"  results     {run.folder.path / RESULTS}\n  rollouts    {run.folder.rollouts}"
    run.say(f"{model}\n{results_table(results)}\n{where}")
