"""What `python -m skyrl.train`, `.sft` and `.serve` share: Hydra's command line around one function per run."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import hydra
from omegaconf import DictConfig

import skyrl
from skyrl.args import expand_home
from skyrl.config.load import (
    COMPOSE_ERRORS,
    ENTRY_OPTIONS,
    VERSION_BASE,
    config_dir,
    explain,
    finish,
    quote_text,
    register_schema,
)
from skyrl.config.schema import RunConfig
from skyrl.distributed import env
from skyrl.distributed.env import rank, report_to_launcher, world_size
from skyrl.distributed.faults import classify, describe
from skyrl.distributed.place import take_place
from skyrl.files import disk_reason
from skyrl.planner.device import ALLOCATOR, ALLOCATOR_OPTIONS
from skyrl.run_dir import REQUEUE_FILE
from skyrl.types import RunError, StopRun, UserError

FAILURE, USAGE_ERROR, INTERRUPTED = 1, 2, 130
# torchrun kills the other ranks as soon as one fails: rank 0's line must be out before another rank ends.
FOLLOWER_SECONDS = 3.0
OWN_THREAD_SECONDS = 15.0  # or until a thread of this process has told it, asking other ranks for their stacks first
# What rank 0 has to say comes first, if it fails as well; the others wait this long before they look.
AFTER_RANK_0_SECONDS = 0.5
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO)
INFO_FLAGS = ("-i", "--info")
# Hydra's flags -> allowed values; () = any, None = takes none.
FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("-m", "--multirun", "-r", "--run", "--hydra-help", "--resolve"), None),
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"), ()),
    **dict.fromkeys(INFO_FLAGS, ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys(("-sc", "--shell-completion"), None),
}


def run_entry(mode: str, prepare: Callable[[], list[str]] = list) -> None:
    """Runs a trainer (skyrl.trainers) or the server (skyrl.service.server) for the command line: once, or once per
    point of a sweep (-m; not for serve).

    Exit codes: 0; 2 with one line for what a person can fix; 1 with one line for a run that cannot go on or has lost a
    rank, or with a traceback for anything else; 75 after a signal or deadline, when the same command should be started
    again; 130 after an interrupt. Every rank runs this; the first rank that fails tells why, the others are silent.
    `prepare` runs once this process knows its rank, and gives options to add to the command line.
    """
    set_torch_defaults()
    args = sys.argv[1:]
    if "--version" in args or any(arg in ("-h", "--help") for arg in args):
        if rank() == 0:
            from skyrl.config.docs import help_text

            with quiet_pipe():
                print(f"skyrl {skyrl.__version__}" if "--version" in args else help_text(mode), flush=True)
        return
    try:
        take_place()  # under srun or mpirun alone, RANK and the others come from the launcher's own variables
        env.end_with_launcher()  # before torch is imported: a launcher may be killed in these seconds
        _Entry(mode, [*args, *prepare()]).run()
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))
    except COMPOSE_ERRORS as error:
        _end(_log_error(explain(error, mode), USAGE_ERROR))
    except (KeyboardInterrupt, UserError, RunError) as error:  # RunError: from a point of a sweep that ran elsewhere
        _end(_report(error, mode))
    if world_size() > 1:
        _end(0)


def set_torch_defaults() -> None:
    """Sets what torch reads from the environment when it is imported, unless a person has set it."""
    # Without it every rank whose connection to a rank that has ended breaks writes twenty lines of C++ frames, in which
    # the one line that says why is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Training and sampling take blocks of other sizes in turns: segments of a GPU that can grow leave no gaps between.
    if not any(name in os.environ for name in ALLOCATOR_OPTIONS):  # torch would read all of them
        os.environ[ALLOCATOR] = "expandable_segments:True"


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Around what prints for a person: whoever reads it may have seen enough (`| head`), which is no error."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is flushed at the end has a place to go
        sys.exit(128 + signal.SIGPIPE)


def _report(error: BaseException, mode: str) -> int:
    """Tells why the run ends, in one line where that is enough; returns the exit code."""
    if isinstance(error, UserError):
        return _log_error(str(error), error.exit_code)
    if isinstance(error, StopRun):
        report_to_launcher(str(error))
        return error.exit_code
    if isinstance(error, RunError):
        return _log_error(str(error), FAILURE, bundle=True)
    if isinstance(error, KeyboardInterrupt):
        kept = "with what was saved" if mode == "serve" else "from the last checkpoint"
        return _log_error(f"interrupted; the same command goes on {kept}", INTERRUPTED)
    if isinstance(error, BrokenPipeError) and error.filename is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _log_error("nobody reads what this prints; the same command goes on from the last checkpoint", FAILURE)
    fault, group = classify(error), _group()
    if fault is None and isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return _log_error(f"{disk_reason(error)}; free some space there, or make it writable", USAGE_ERROR)
    if fault is not None and fault.kind == "lost" and group is not None:
        return _log_error(group.about_lost_peer(error), FAILURE, bundle=True)
    own = error.__traceback__.tb_next if error.__traceback__ is not None else None
    trace = "".join(traceback.format_exception(type(error), error, own))
    if fault is None or fault.kind == "lost":
        return _log_error(trace, FAILURE, plain=True, bundle=True)
    from skyrl.distributed import phases

    phase = phases.status.phase if env.watchdog is not None else ""
    line = f"rank {rank()} on {socket.gethostname()}: {describe(fault, phase, phases.status.step, env.planned_memory)}"
    if fault.kind != "kernel":
        return _log_error(line, FAILURE, bundle=True, named=True)
    # It may be a fault of the program: where it was is worth its lines.
    return _log_error(f"{trace}skyrl: error: {line}\n", FAILURE, plain=True, bundle=True, named=True)


def _group() -> ModuleType | None:
    """skyrl.distributed.failure, once this process is one of a group of ranks. By name: this file lies below it."""
    if not env.in_group:  # without a group of ranks, torch need not be imported to tell an error
        return None
    from skyrl.distributed import failure

    return failure


def _log_error(
    message: str | None, code: int, *, plain: bool = False, bundle: bool = False, named: bool = False
) -> int:
    """Prints the message, unless another rank has told one; None: nothing to tell. Returns `code`.

    Ranks but 0 say who they are; where there is no group of ranks yet, all see the same, and rank 0 tells it: torchrun
    ends the others before they can, and under srun one rank of each node speaks. With `bundle` a crash bundle is left
    in the run folder. A traceback (`plain`) is the last thing printed. `named`: the message says which rank it is of.
    """
    group, me = _group(), rank()
    if group is not None:
        group.restore_sigterm()
    if me != 0 and message is not None:
        time.sleep(AFTER_RANK_0_SECONDS if group is not None else FOLLOWER_SECONDS)
    if message is None or not (group.claim_error_report() if group is not None else _first_of_step(message)):
        time.sleep(FOLLOWER_SECONDS)  # torchrun ends us here; with our exit it would cut short the one who tells
        if group is not None and group.reporting:
            time.sleep(OWN_THREAD_SECONDS)
        return code
    who = f"rank {me}: " if me != 0 and not named else ""
    # " in <phase>, step <n>" and "; details in <crash bundle>", while a run is watched.
    place, details = env.watchdog.crash_report(message) if bundle and env.watchdog is not None else ("", "")
    line = f"skyrl: error: {who}{message}{details}\n"
    if plain:
        line = f"skyrl: error: rank {me} failed{place}{details}\n" * bool(place) + who + message
    print(line, end="", file=sys.stderr, flush=True)
    report_to_launcher(who + message.rstrip())
    return code


def _first_of_step(message: str) -> bool:
    """Whether this is the first rank of a Slurm step to say so on this node; True outside of steps of several tasks.

    By an empty file in the temporary folder. One that is older than a minute is of an earlier start in the same
    step."""
    variables = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_PROCID")
    job, step, tasks, task = (os.environ.get(name, "") for name in variables)
    if not (job and step) or tasks in ("", "1") or task != os.environ.get("RANK"):
        return True
    digest = hashlib.sha256(message.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"skyrl-told-{os.getuid()}-{job}.{step}-{digest}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:
                os.utime(path)
                return True
        return False
    except OSError:  # two lines are better than none
        return True
    return True


def _refuse_restart(folder: Path) -> None:
    """Raises StopRun when torchrun, which restarts ranks whatever their exit code, restarts a run that it stopped for
    a signal or a deadline: the job is to be queued again, not to go on."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    with contextlib.suppress(OSError, ValueError):
        mark = json.loads((folder / REQUEUE_FILE).read_text())
        if (mark["host"], mark["launcher"]) == (socket.gethostname(), os.getppid()):
            raise StopRun(f"stopped and saved; {folder / REQUEUE_FILE} asks for the job to be queued again")


def _end(code: int) -> NoReturn:
    """Ends the process. After an error in a group of ranks at once: the usual end would wait for the others."""
    env.leave_exit_code(code)
    if not code or _group() is None:
        if world_size() == 1:
            sys.exit(code)
        leave(code)
    _flush()
    os._exit(code)


def leave(code: int = 0) -> NoReturn:
    """What Python does at its end, but for taking the interpreter down: a thread of torch's communication that lets go
    of a tensor meanwhile aborts the process, as seen once in a test, with all its work done; and it takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # who read it has gone, or it is closed
            stream.flush()


def end_now(error: BaseException, mode: str) -> NoReturn:
    """Tells why this process fails and ends it at once, from any thread; nothing of the program runs after."""
    code = _report(error, mode)
    _flush()
    os._exit(code)


def split_args(args: list[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, overrides); argparse wants all overrides in one place. Raises UserError."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("-"):
            overrides.append(arg)
            continue
        flag, equals, value = arg.partition("=")
        if flag == "--dry-run":
            overrides.append("dry_run=true")
            continue
        if flag not in FLAGS:
            raise UserError(f"{flag}: no such flag; options are written option=value, --help lists them")
        wanted = FLAGS[flag]
        if wanted is None:
            flags.append(flag)
            continue
        if not equals and rest and (not wanted or rest[0] in wanted or flag not in INFO_FLAGS):
            value = rest.pop(0)
        value = value or ("all" if flag in INFO_FLAGS else "")
        if not value:
            raise UserError(f"{flag}: needs a value" + (f", one of {', '.join(wanted)}" if wanted else ""))
        if wanted and value not in wanted:
            raise UserError(f"{flag} {value}: choose one of {', '.join(wanted)}")
        value = value if wanted else expand_home(value, flag)
        flags += [f"{flag}={value}"] if flag.startswith("--") else [flag, value]
    sweep = "-m" in flags or "--multirun" in flags
    return flags, [quote_text(override, sweep=sweep) for override in overrides]


class _Entry:
    """One command line. Hydra composes before the first job, in silence on all ranks but 0. What --help does not need
    is imported where it is used, here and above: people wait for that text."""

    def __init__(self, mode: str, args: list[str]) -> None:
        self.mode = mode
        self.args = args
        self.sweep = False
        self.failed = 0
        self.code = 0

    def run(self) -> None:
        from skyrl import sweep

        register_schema()
        # Without it Hydra prints its own error and exits; we want the exception, to say it in one line.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        flags, overrides = split_args(self.args)
        self.sweep = "-m" in flags or "--multirun" in flags
        if self.mode in ENTRY_OPTIONS:
            overrides = [quote_text(each, sweep=self.sweep) for each in ENTRY_OPTIONS[self.mode](overrides)]
        if self.sweep and self.mode == "serve":
            raise UserError("-m: a server does not end by itself, so there is no sweep; start one at a time")
        if not any(flag.startswith(("-i", "--info", "--hydra-help")) for flag in flags):
            flags += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        else:
            logging.raiseExceptions = False  # what they show goes by logging; its reader may have seen enough
        with contextlib.ExitStack() as stack:
            folder = ""
            if self.sweep:  # Hydra's sweeper writes multirun.yaml; the run folders hold all that is in it
                folder = sweep.sweep_folder(overrides) or stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="skyrl-sweep-")
                )
                flags.append(f"hydra.sweep.dir={folder}")
            sys.argv[1:] = [*flags, *overrides]  # what the user says comes last and wins
            self._compose_and_run()
            if folder and rank() == 0 and (best := sweep.best_of(folder)):
                print(best, flush=True)
        if self.failed:
            print(f"skyrl: {self.failed} run(s) of the sweep failed", file=sys.stderr, flush=True)
            sys.exit(self.code)

    def _compose_and_run(self) -> None:
        quiet = rank() != 0
        self.stdout, self.stderr = sys.stdout, sys.stderr
        name = "serve" if self.mode == "serve" else "config"
        main = hydra.main(version_base=VERSION_BASE, config_path=str(config_dir()), config_name=name)(self.job)
        if not quiet:
            main()
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main()

    def job(self, composed: DictConfig) -> float | None:
        """One run; its held-out accuracy, which a sweeper may steer by. In a sweep of one process a failed point is
        told and counted, and the next one starts."""
        with contextlib.redirect_stdout(self.stdout), contextlib.redirect_stderr(self.stderr):
            try:
                return self._run_one(composed)
            except Exception as error:
                code = _report(error, self.mode)
                if os.environ.get("SUBMITIT_EXECUTOR"):  # one point, for a sweep of another process
                    from skyrl import sweep

                    sweep.leave(error, code)
                if not self.sweep or world_size() > 1 or isinstance(error, StopRun):
                    # Other ranks may wait for us in a collective: only the end of the job frees them.
                    raise SystemExit(code) from None
                self.failed, self.code = self.failed + 1, max(self.code, code)
                return None

    def _run_one(self, composed: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        from skyrl import sweep

        cfg = finish(composed, HydraConfig.get().overrides.task, mode=self.mode)
        if self.mode == "serve":
            self._serve(cfg)
            return None
        if cfg.dry_run:
            from skyrl.evaluation.sets import all_prompts
            from skyrl.planner.plan import describe, dry_run
            from skyrl.text.fit import check_task

            evaluates = self.mode == "evaluate"
            plan = dry_run(cfg, cfg.run.world_size or world_size(), trains=not evaluates)
            lines, chat = list[str](), None
            # For another machine's plan the data need not be here.
            parts = partial(all_prompts, evaluates=evaluates)
            if cfg.trainer != "control":
                lines, chat = check_task(cfg, plan.max_row_tokens, files=not cfg.run.world_size, prompts=parts)
            with quiet_pipe():
                if rank() == 0:
                    print(describe(cfg, plan, chat, supervised=cfg.trainer == "sft"), *lines, sep="\n", flush=True)
            return None
        _refuse_restart(Path(cfg.run.dir))
        return sweep.play(cfg, self.mode, sweep=self.sweep)

    def _serve(self, cfg: RunConfig) -> None:
        from skyrl.planner.serve import dry_run_text
        from skyrl.trainers import importing_libraries
        from skyrl.web.auth import read_keys

        # Who may come in is looked at before any weights are.
        read_keys(cfg.service)
        if not cfg.dry_run:
            from skyrl.service.frontend import open_door

            door = open_door(cfg)  # clients are answered while torch is imported and the weights are loaded
            if door.done() and not door.exception():
                print(f"skyrl: loading {cfg.model.path}; door: {door.result().server.url}", file=sys.stderr, flush=True)
            with importing_libraries():
                from skyrl.service.server import serve

            serve(cfg, door)
            if rank() == 0:
                print("skyrl: stopped", file=sys.stderr, flush=True)
            return
        text = dry_run_text(cfg, world_size())
        with quiet_pipe():
            if rank() == 0:
                print(text, flush=True)
