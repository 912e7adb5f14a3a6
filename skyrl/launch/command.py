"""`skyrl-tx launch`: reads its flags, says what it runs, runs it, and ends with the code that a batch script needs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skyrl.args import Parser, help_of
from skyrl.config.load import load_config
from skyrl.config.run_rules import closed_until
from skyrl.distributed import place
from skyrl.distributed.env import LAUNCHED
from skyrl.distributed.stop import INTERRUPTED, OF_BATCH, TEMPORARY
from skyrl.launch import hosts, machine, processes, sbatch
from skyrl.launch.rank import BIND, MODES
from skyrl.main import split_args
from skyrl.run_dir import REQUEUE_FILE
from skyrl.types import UserError

CLOCK_SLACK_SECONDS = 5.0  # a file server's clock may be behind ours
SHUTDOWN_SECONDS = 600  # torchrun's patience with ranks that save, should it be asked to end itself
# A task that ends first (rank 0 still writes, say) must not take the others with it, nor wait for them without end.
SRUN_WAIT_SECONDS = 120


def parser() -> argparse.ArgumentParser:
    """The flags of `skyrl-tx launch`."""
    p = Parser(
        prog="skyrl-tx launch",
        usage="skyrl-tx launch [flags] -- train|sft|evaluate|serve [option=value ...]",
        description="Starts a rank on each GPU, or on each core where there is none.",
        epilog=help_of("launch"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--nproc", type=ranks_arg, default=0, help="ranks of a node; auto: one a GPU, else one a core")
    p.add_argument("--no-bind", action="store_true", help="leaves ranks on all cores instead of on their own")
    p.add_argument("--max-restarts", type=int, default=0, help="restarts from the last checkpoint after a failure (0)")
    p.add_argument("--dry-run", action="store_true", help="prints what would run")
    group = p.add_argument_group("several hosts")
    group.add_argument("--hosts", default="", help="names, each with :ranks if it differs: a,b:4")
    group.add_argument("--rsh", default=hosts.RSH, help=f"how to run a {{line}} of shell on {{host}} ({hosts.RSH})")
    group.add_argument("--port", type=int, default=0, help="rendezvous on the first host; 0: a free one")
    sbatch.add_flags(p.add_argument_group("Slurm"))
    for name in ("--nnodes", "--node-rank"):
        p.add_argument(name, type=int, default=1 if name == "--nnodes" else 0, help=argparse.SUPPRESS)
    p.add_argument("--rendezvous", default="", help=argparse.SUPPRESS)
    p.add_argument("--address", default="", help=argparse.SUPPRESS)
    p.add_argument("--window-begins", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--asks-again", type=float, default=None, help=argparse.SUPPRESS)
    p.add_argument("--remote-commands", action="store_true", help=argparse.SUPPRESS)
    return p


def ranks_arg(text: str) -> int:
    """The type of --nproc: a number of ranks, 0 for auto."""
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: give a number of ranks, or auto")
    return 0 if text == "auto" else int(text)


@dataclass(frozen=True)
class Job:
    """What to run: train, sft, evaluate or serve with its arguments, and the run folder where that is known."""

    mode: str
    args: tuple[str, ...]
    folder: Path | None


def launch(args: Sequence[str]) -> int:
    """Runs the command line; the exit code. Raises UserError."""
    args = list(args)
    split = args.index("--") if "--" in args else next((i for i, arg in enumerate(args) if arg in MODES), len(args))
    flags = parser().parse_args(args[:split])
    job = read_job(args[split + 1 :] if "--" in args else args[split:])
    if flags.asks_again is not None:  # for batch scripts: 0 if that run wants to be started again
        return int(job.folder is None or not asks_again(job.folder, flags.asks_again))
    if flags.window_begins:  # for batch scripts: when run.window begins, if it is closed
        opens = closed_until(load_config(split_args(list(job.args))[1], mode=job.mode).run)
        print(opens.strftime("%Y-%m-%dT%H:%M:%S") if opens is not None else "")
        return 0
    if flags.slurm:
        return sbatch.submit(flags, job.mode, job.args)
    if flags.print:
        raise UserError("launch: --print shows a batch script: add --slurm; --dry-run shows other commands")
    if flags.hosts:
        if place.in_allocation():
            raise UserError(f"launch: --hosts={flags.hosts}: Slurm has chosen the hosts of this job; leave it out")
        return hosts.launch(flags, job.mode, job.args)
    if place.in_allocation() and flags.nnodes == 1:
        return _in_slurm(flags, job)
    if not flags.remote_commands:
        _refuse_several()
    return _on_this_node(flags, job)


def _refuse_several(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError when srun or mpirun has started several launches: their ranks would not know of each other."""
    if (started := place.launcher_place(environment)) is not None:
        raise UserError(
            f"launch: this is {started}, and the launches would not know of each other; start one, outside of srun (it "
            "starts the ranks on all nodes of a job), or the ranks themselves: srun python -m skyrl.train"
        )


def read_job(args: Sequence[str]) -> Job:
    """The command after --, its options checked before anything is started. Raises UserError."""
    if not args or args[0] not in MODES:
        given = f"{args[0]}: " if args else ""
        raise UserError(f"launch: {given}say what to run after --, one of: {', '.join(MODES)}")
    mode, rest = args[0], tuple(args[1:])
    flags, overrides = split_args(list(rest))
    if flags:  # a sweep, or a config folder that only Hydra's own command line knows
        return Job(mode, rest, None)
    cfg = load_config(overrides, mode=mode)
    return Job(mode, rest, None if mode == "serve" or cfg.dry_run else Path(cfg.run.dir))


def ranks_of(nproc: int, found: machine.Machine) -> int:
    """The ranks of this node: as asked, else one a GPU, on a CPU one a core (a rank's matrix products are small there,
    and sampling is per rank). Raises UserError for more than there are GPUs."""
    if found.visible_gpus and nproc > found.visible_gpus:
        raise UserError(f"launch: --nproc={nproc}: this node shows {found.visible_gpus} GPUs; give at most that")
    return nproc or found.visible_gpus or found.usable_cores


def torchrun(flags: argparse.Namespace, ranks: int) -> list[str]:
    """torchrun's part of the command line: one node with a port of the kernel's choice, or one of several nodes."""
    command = [sys.executable, "-m", "skyrl.launch.torchrun", f"--nproc-per-node={ranks}", f"--nnodes={flags.nnodes}"]
    command += ["--rdzv-backend=c10d", f"--max-restarts={flags.max_restarts}"]
    if flags.nnodes == 1:
        address, endpoint, conf = "127.0.0.1", "127.0.0.1:0", "is_host=1"
    else:
        address, endpoint = flags.address, flags.rendezvous
        conf = f"is_host={int(flags.node_rank == 0)},join_timeout={hosts.JOIN_SECONDS}"
    return [*command, f"--rdzv-endpoint={endpoint}", f"--rdzv-conf={conf}", f"--local-addr={address}"]


def _on_this_node(flags: argparse.Namespace, job: Job) -> int:
    found = machine.look()
    ranks = ranks_of(flags.nproc, found)
    shares = machine.shares(found, ranks, bind=not flags.no_bind)
    command = [*torchrun(flags, ranks), f"--rdzv-id=skyrl-{os.getppid() if flags.remote_commands else os.getpid()}"]
    if flags.nnodes > 1:
        command[-1] = f"--rdzv-id=skyrl-{flags.rendezvous}"
    command += ["-m", "skyrl.launch.rank", job.mode, *job.args]
    extra = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(shares[0].threads)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS)),
    }
    if flags.no_bind:
        extra[BIND] = "none"
    say(f"{found.describe()}; {ranks} rank{'s' * (ranks != 1)}")
    if idle := idle_share(found, ranks):
        say(idle)
    for rank, share in enumerate(shares):
        place = f"CPUs {machine.show_cpus(share.cpus)}" if share.cpus and ranks > 1 else "not bound"
        say(f"local rank {rank}: {place}, {share.threads} thread{'s' * (share.threads != 1)}")
    say(show(command, extra))
    if flags.dry_run:
        return 0
    since = time.time()
    with tempfile.TemporaryDirectory(prefix="skyrl-launch-") as folder:
        left = Path(folder) / "left"
        environment = {**os.environ, **extra, LAUNCHED: str(left)}
        code, child = processes.run(command, environment, remote_commands=flags.remote_commands)
        return exit_code(code, child.heard, job, since, left=child.early or left.exists())


def idle_share(found: machine.Machine, ranks: int, environment: Mapping[str, str] = os.environ) -> str:
    """Words about what this launch, inside a step of one node, leaves idle of a Slurm job; "" without any."""
    nodes, gpus = int(environment.get("SLURM_JOB_NUM_NODES", "1")), found.visible_gpus
    idle = [f"{nodes - 1} of {nodes} nodes (start it outside of srun to use all)"] * (nodes > 1)
    idle += [f"{gpus - ranks} of {gpus} GPUs (--nproc auto uses all)"] * (
        gpus > ranks and "SLURM_JOB_ID" in environment
    )
    return f"idle: {', '.join(idle)}" if idle else ""


def _in_slurm(flags: argparse.Namespace, job: Job) -> int:
    """The ranks as tasks of one srun step over the whole allocation."""
    if flags.max_restarts:
        raise UserError("launch: --max-restarts needs torchrun; inside Slurm a failed job is queued again instead")
    layout, environment = sbatch.layout(flags.nproc)
    # Shells that `srun --pty` has opened hold what they were given: steps wait for it, unless they share it.
    shared = ["--overlap"] if int(os.environ.get("SLURM_STEP_ID", place.SPECIAL_STEPS)) < place.SPECIAL_STEPS else []
    command = ["srun", "--kill-on-bad-exit=0", f"--wait={SRUN_WAIT_SECONDS}", *shared, *layout]
    command += [sys.executable, "-m", "skyrl.launch.rank", job.mode, *job.args]
    extra = {BIND: "none"} if flags.no_bind else {}
    say(show(command, extra))
    if flags.dry_run:
        return 0
    since = time.time()
    code, child = processes.run(command, {**environment, **extra}, through=True)
    return exit_code(code, child.heard, job, since, left=code == TEMPORARY)


def exit_code(code: int, heard: Sequence[int], job: Job, since: float, *, left: bool = False) -> int:
    """The exit code for a launcher's `code`, which may hide that of the ranks (torchrun's is 1 for all).

    75 when the run folder has a request to be started again that is newer than `since`, when ranks `left` before they
    had anything to save, or when a batch system asked a server; 130 when a person asked for the end.
    """
    if code == 0:
        return 0
    if signal.SIGINT in heard:
        return INTERRUPTED
    if left or (job.folder is not None and asks_again(job.folder, since)):
        return TEMPORARY
    if job.folder is None and set(OF_BATCH) & set(heard):
        return TEMPORARY
    return code


def asks_again(folder: Path, since: float) -> bool:
    """Whether the run in `folder` has asked, after the time `since`, to be started again."""
    try:
        return (folder / REQUEUE_FILE).stat().st_mtime >= since - CLOCK_SLACK_SECONDS
    except OSError:
        return False


def show(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A line for a shell that runs the command."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])


def say(text: str) -> None:
    """One line to standard error, so that it is never part of what a run prints."""
    print(f"launch: {text}", file=sys.stderr, flush=True)
