"""`skyrl-tx launch --slurm`: the batch script of launch/slurm with this job's header, checked and submitted."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from skyrl.args import expand_home, path_arg
from skyrl.config.load import load_config
from skyrl.main import split_args
from skyrl.planner.plan import dry_run
from skyrl.types import UserError

SCRIPT = "train.sbatch"
BODY = "# ---- what follows is the same for every job\n"
SUBMIT_SECONDS = 60
SAVE_SECONDS = 180
MAX_NAME = 200  # bytes of a log's name, of the 255 that file systems allow
# Flags of sbatch that say how many ranks there are and where.
LAYOUT = r"-([NnGca]|-(nodes|ntasks|gpus|gres=gpu|cpus-per|array))"
# Around the lines of the batch script that `layout` runs.
SHELL = """\
set -u; say() { echo "launch: $*" >&2; }; fail() { echo "$*" >&2; exit 2; }
job=$SLURM_JOB_ID; [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
"""
RUNTIMES = ("apptainer", "singularity", "enroot", "pyxis")


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags for a batch job."""
    group.add_argument("--slurm", action="store_true", help="submits a batch job")
    group.add_argument("--print", action="store_true", help="prints the batch script instead")
    group.add_argument("--name", default="", help="of the job (run.name, or skyrl)")
    group.add_argument("--nodes", type=int, default=1, help="number of nodes (1)")
    group.add_argument("--gpus", type=int, default=0, help="GPUs of each node, each with a rank; 0: see --nproc")
    group.add_argument("--cpus", type=int, default=0, help="cores of each rank; 0: as the cluster sets it")
    group.add_argument("--time", default="", help="limit, as 8:00:00 or minutes")
    group.add_argument("--save-seconds", type=int, default=SAVE_SECONDS, help=f"signal before it ({SAVE_SECONDS})")
    group.add_argument("--partition", default="", help="partition")
    group.add_argument("--account", default="", help="account")
    group.add_argument("--array", default="", help="1-4: a job for each of these seeds")
    group.add_argument("--max-requeues", type=int, default=50, help="how often the job may queue itself again (50)")
    group.add_argument("--logs", type=path_arg, default="logs", help="folder for the output (logs)")
    group.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="any flag of sbatch: --qos=high")
    group.add_argument("--module", action="append", default=[], help="environment module to load")
    group.add_argument("--setup", type=path_arg, help="file to source first")
    group.add_argument("--container", default="", help="image: *.sif is apptainer's, *.sqsh pyxis', or a name")
    group.add_argument("--container-runtime", default="", help=f"for other images: {', '.join(RUNTIMES)}")
    group.add_argument("--container-args", default="", help="more arguments for it")
    group.add_argument("--staged", type=path_arg, help="folder made by skyrl-tx stage")
    group.add_argument("--online", action="store_true", help="the nodes have internet")


def body() -> str:
    """What train.sbatch does below its header, in every mode. The file lies beside the modules in an installed wheel,
    else at the root of the repository. Raises UserError where it is missing."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "slurm", here.parents[2] / "launch" / "slurm"):
        if (folder / SCRIPT).is_file():
            _, mark, below = (folder / SCRIPT).read_text(encoding="utf-8").partition(BODY)
            return mark + below
    raise UserError(f"launch: {SCRIPT} is not in {here.parent / 'slurm'}; install skyrl again")


def layout(nproc: int, environment: Mapping[str, str] = os.environ) -> tuple[list[str], dict[str, str]]:
    """(srun's flags for the ranks of this allocation, the environment for srun), as the batch script finds them: its
    own lines are run. `nproc`: ranks of a node, 0 for one a GPU or as many as were asked for. Says what stays idle.
    Raises UserError."""
    parts = {part.split(":")[0].split("\n")[0]: part for part in body().split("\n# ---- ")}
    lines = [part.partition("\n")[2] for title, part in parts.items() if title.startswith(("what the", "ranks"))]
    script = "\n".join([SHELL, *lines, 'printf "%s\\0" "${layout[@]}" "" && env -0'])
    own = {"SKYRL_RANKS_PER_NODE": str(nproc)} if nproc else {}
    done = subprocess.run(
        ["bash", "-c", script],
        env={**environment, **own},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise UserError(f"launch: {words[-1] if words else 'bash failed on the lines of ' + SCRIPT}")
    print(done.stderr, end="", file=sys.stderr, flush=True)
    flags, _, inside = done.stdout.partition("\0\0")
    return flags.split("\0"), dict(line.split("=", 1) for line in inside.split("\0") if "=" in line)


def render(flags: argparse.Namespace, mode: str, args: Sequence[str]) -> str:
    """The whole batch script. Raises UserError for flags that do not fit."""
    ranks = flags.gpus or flags.nproc or 1
    name = flags.name or next((arg[9:] for arg in args if arg.startswith("run.name=")), f"skyrl-{mode}")
    # Slurm would put the job's name in for %x as it is, a folder's / included.
    file = os.fsencode(re.sub(r"[^\w.+=-]", "_", name))[:MAX_NAME].decode(errors="ignore")
    logs = str(flags.logs.absolute()).replace("%", "%%")
    header = {"job-name": name, "nodes": flags.nodes, "ntasks-per-node": ranks}
    header |= {"gpus-per-node": flags.gpus or "", "cpus-per-task": flags.cpus or "", "time": flags.time}
    header |= {"partition": flags.partition, "account": flags.account, "array": flags.array}
    header |= {"signal": f"USR1@{flags.save_seconds}", "requeue": None, "open-mode": "append"}
    header |= {"output": f"{logs}/{file}-{'%A_%a' if flags.array else '%j'}.out"}
    lines = [f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in header.items() if value != ""]
    for line in flags.sbatch:
        if re.match(LAYOUT, line):
            raise UserError(f"launch: --sbatch={line}: planned here; use --nodes, --gpus, --nproc, --cpus or --array")
    for line in (lines := [*lines, *flags.sbatch]):
        if not re.fullmatch(r"--?[a-zA-Z][^\n]*", line):
            raise UserError(f"launch: {line!r}: sbatch needs a flag of one line, as in --sbatch=--qos=high")
    exports = {
        "SKYRL_PYTHON": sys.executable if not flags.container else "python",
        "SKYRL_COMMAND": mode,
        "SKYRL_RANKS_PER_NODE": str(ranks),
        "SKYRL_MAX_REQUEUES": str(flags.max_requeues),
        "SKYRL_MODULES": " ".join(flags.module),
        "SKYRL_SETUP": _there("--setup", flags.setup),
        "SKYRL_CONTAINER": _image(flags.container, flags.container_runtime),
        "SKYRL_CONTAINER_RUNTIME": flags.container_runtime,
        "SKYRL_CONTAINER_ARGS": flags.container_args,
        "SKYRL_STAGED": _there("--staged", flags.staged),
        "SKYRL_ONLINE": "1" if flags.online else "",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    quoted = (re.sub("(?<==).*", lambda value: shlex.quote(value[0]), line, count=1) for line in lines)
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in quoted), ""]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items() if value]
    return "\n".join([*lines, f"set -- {shlex.join(args)}", "", body()])


def submit(flags: argparse.Namespace, mode: str, args: Sequence[str]) -> int:
    """Checks the plan for the job's size, then submits, or prints the script with --print. Raises UserError."""
    for name in ("hosts", "max_restarts", "dry_run"):
        if getattr(flags, name):
            raise UserError(
                f"launch: --{name.replace('_', '-')}: not with --slurm; leave it out (--print shows the script)"
            )
    if flags.nodes < 1 or min(flags.gpus, flags.cpus, flags.max_requeues, flags.save_seconds) < 0:
        names = "--nodes, --gpus, --cpus, --max-requeues, --save-seconds"
        raise UserError(f"launch: {names}: give numbers that are not negative")
    if flags.gpus and flags.nproc:
        raise UserError(f"launch: --nproc={flags.nproc}: with --gpus={flags.gpus} each GPU has a rank; leave one out")
    if 0 < _seconds(flags.time) <= flags.save_seconds:
        raise UserError(
            f"launch: --time={flags.time}: the signal to save comes {flags.save_seconds} s before it (--save-seconds), "
            "so nothing is done, and the job would queue itself again for ever; give more time, or lower that"
        )
    script = render(flags, mode, args)
    _check_plan(flags, mode, args)
    if flags.print:
        print(script, end="")
        return 0
    flags.logs.mkdir(parents=True, exist_ok=True)  # Slurm drops the output of a job whose folder is missing
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=SUBMIT_SECONDS,
        )
    except FileNotFoundError:
        raise UserError(
            "launch: --slurm: there is no sbatch here; --print shows the script for another machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"launch: --slurm: sbatch gave no answer within {SUBMIT_SECONDS} s") from None
    if done.returncode:
        raise UserError(f"launch: --slurm: {' '.join(done.stderr.split())}")
    numbers = re.findall(r"^(\d+)(?:;.*)?$", done.stdout, re.M)  # a site's own words may stand before it
    print(numbers[-1] if numbers else done.stdout.strip())
    return 0


def _seconds(time: str) -> int:
    """Slurm's minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]; 0 for other texts."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return 0
    days, dash, rest = time.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [*numbers, 0, 0][:3] if dash or len(numbers) == 3 else [0, *numbers, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_plan(flags: argparse.Namespace, mode: str, args: Sequence[str]) -> None:
    """What would be refused on the nodes is refused here, before the job waits in the queue."""
    hydra, overrides = split_args(list(args))
    if hydra:
        raise UserError(
            f"launch: --slurm: {hydra[0]} is for one process; a sweep is `skyrl-tx train -m hydra/launcher=slurm ...`"
        )
    if mode == "serve":
        return
    staged: list[str] = []
    if flags.staged:
        os.environ["SKYRL_STAGED"] = str(flags.staged.absolute())  # staged options are written with it
        try:
            staged = (flags.staged / "options").read_text(encoding="utf-8").splitlines()
        except OSError:
            raise UserError(f"launch: --staged={flags.staged}: not made by skyrl-tx stage") from None
    size = flags.nodes * (flags.gpus or flags.nproc or 1)
    # dry_run with a number of ranks: the plan is not compared with this machine's memory
    cfg = load_config([*overrides, *staged, "dry_run=true", f"run.world_size={size}"], mode=mode)
    dry_run(cfg, size)


def _there(flag: str, path: Path | None) -> str:
    if path is not None and not path.exists():
        raise UserError(f"launch: {flag}={path}: not there")
    return str(path.absolute()) if path is not None else ""


def _image(image: str, runtime: str) -> str:
    """A file becomes an absolute path. What cannot be one (docker://a/b, a container of enroot's, an image of a
    registry) is for the program to judge."""
    if runtime and runtime not in RUNTIMES:
        raise UserError(f"launch: --container-runtime={runtime}: choose one of: {', '.join(RUNTIMES)}")
    if not image:
        return image
    if not runtime and not image.endswith((".sif", ".sqsh")):
        raise UserError(f"launch: --container={image}: give --container-runtime as well: {', '.join(RUNTIMES)}")
    image = expand_home(image, "launch: --container")
    if Path(image).is_file() or (Path(image).is_dir() and runtime not in ("enroot", "pyxis")):
        return str(Path(image).absolute())
    by_scheme = runtime in ("", "apptainer", "singularity")
    if by_scheme and ":" not in image or image.startswith(("/", ".")) or (runtime == "enroot" and "/" in image):
        raise UserError(f"launch: --container={image}: not there")
    return image
