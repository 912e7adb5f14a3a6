"""`skyrl-tx play`: one episode of a run again, turn by turn, with the environment as it is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from skyrl.algorithms.objectives import Objectives
from skyrl.args import Parser, path_arg
from skyrl.config.load import from_dict
from skyrl.config.schema import RunConfig
from skyrl.data import make_splits
from skyrl.envs.guard import Outcome
from skyrl.registry.plugins import import_plugins
from skyrl.report.charts import printable
from skyrl.run_dir import RunReader, find_run
from skyrl.tracking.rollouts import named
from skyrl.types import Message, Prompt, UserError
from skyrl.workers.calls import LocalCalls
from skyrl.workers.pool import WorkerPool, open_calls


def play(args: list[str]) -> None:
    """Runs the command line: an episode that was dumped, or, with --answer, the prompt of it with other answers."""
    p = Parser(prog="skyrl-tx play", description="Plays one episode of a run again: the environment, turn by turn.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--uid", required=True, help="of the prompt, as skyrl-tx rollouts shows it")
    p.add_argument("--index", type=int, default=0, help="which sample of the prompt (0)")
    p.add_argument("--step", type=int, help="the step it was dumped in (default: the newest that has it)")
    p.add_argument("--seed", type=int, help="that reset is given, instead of the episode's own")
    p.add_argument("--answer", action="append", help="what the model is to have written, one for each turn")
    given = p.parse_args(args)
    run = find_run(given.run, "play")
    cfg = from_dict(run.options("play"))
    episode = _dumped(run, given.uid, given.index, given.step)
    if episode is None and not given.answer:
        raise UserError(
            f"play: {run.path} has no dump of {given.uid} sample {given.index}; skyrl-tx rollouts {run.path} --list "
            "names the steps that were dumped, and --answer TEXT plays an answer of your own"
        )
    import_plugins(cfg.plugins)
    turns = [{"read": text} for text in given.answer] if given.answer else (episode or {})["turns"]
    seed = given.seed if given.seed is not None else (episode or {}).get("seed", 0)
    _play(cfg, _prompt(cfg, given.uid), seed, turns)


def _dumped(run: RunReader, uid: str, index: int, step: int | None) -> dict[str, Any] | None:
    """The newest dump of an episode."""
    for name in reversed(run.dumps()):
        if step is None or int(name.rpartition("-")[2]) == step:
            for episode in run.rollouts(name):
                if (episode["uid"], episode["index"]) == (uid, index):
                    print(f"{run.path}/rollouts: {name}")
                    return episode
    return None


def _prompt(cfg: RunConfig, uid: str) -> Prompt:
    for prompts in make_splits(cfg)[0].values():
        for prompt in prompts:
            if prompt.uid == uid:
                return prompt
    raise UserError(f"play: env.name={cfg.env.name} has no prompt {uid} any more; was its data changed?")


def _play(cfg: RunConfig, prompt: Prompt, seed: int, turns: Sequence[dict[str, Any]]) -> None:
    total, objectives = 0.0, Objectives(cfg.algorithm.objectives.weights, cfg.algorithm.objectives.constraints)
    with open_calls(replace(cfg.env, on_error="mask", workers=min(cfg.env.workers, 1)), cfg.plugins) as calls:
        calls.open(0, prompt, seed)
        opening = _answer(calls)
        print(f"======== {prompt.place}, seed {seed}")
        _show(opening.value or [])
        for number, turn in enumerate(turns, start=1):
            if opening.invalid:
                break
            calls.step(0, turn["read"])
            outcome = _answer(calls)
            print(printable(f"--- turn {number}: the model\n{turn['read']}"))
            if outcome.value is None:
                opening = outcome
                break
            result = outcome.value
            given = result.reward if isinstance(result.reward, dict) else {"reward": result.reward}
            known = turn.get("objectives", {"reward": turn.get("reward", given.get("reward", 0.0))})
            # What a group reward or a multiplier has added in the run is not there here.
            reward, _ = objectives.combine(given, constrained=False)
            before, _ = objectives.combine({name: known.get(name, 0.0) for name in given}, constrained=False)
            total += reward
            print(
                f"--- reward {reward:g}{named(given) if given.keys() != {'reward'} else ''}"
                + f" (in the run {before:g})" * (before != reward),
                end="",
            )
            print("".join(f", {name} {value:g}" for name, value in result.metrics.items()) + ", done" * result.done)
            _show(result.observation)
            if result.done:
                break
        calls.close(0)
    print(printable(f"======== invalid: {opening.invalid}") if opening.invalid else f"======== reward {total:g}")


def _answer(calls: LocalCalls | WorkerPool) -> Outcome:
    while True:
        for answer in calls.poll(wait=True):
            return answer.outcome


def _show(messages: list[Message]) -> None:
    for message in messages:
        print(printable(f"--- {message['role']}\n{message['content']}"))
