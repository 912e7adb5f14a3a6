"""What `python -m skyrl.train` and `python -m skyrl.sft` share: Hydra's command line around one function per run."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from skyrl.config.load import COMPOSE_ERRORS, VERSION_BASE, config_dir, explain, finish, register_schema, tell
from skyrl.types import UserError

USAGE_ERROR = 2
# torchrun kills the other ranks as soon as one fails: rank 0's line must be out before another rank ends.
FOLLOWER_SECONDS = 3.0
INFO_FLAGS = ("-i", "--info")
# Hydra's flags -> allowed values; () = any, None = takes none.
FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("-m", "--multirun", "-r", "--run", "--hydra-help", "--version", "--resolve"), None),
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"), ()),
    **dict.fromkeys(INFO_FLAGS, ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys(("-sc", "--shell-completion"), None),
}


def rank() -> int:
    """This process's rank under torchrun or srun, 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this job, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_entry(mode: str) -> None:
    """Runs skyrl.trainer.<mode>(cfg) for the command line, once or once per point of a sweep (-m).

    Exit codes: 0; 2 with one line for what a person can fix; 1 with a traceback for anything else. Every rank runs
    this; only rank 0 prints what all of them would print.
    """
    args = sys.argv[1:]
    if any(arg in ("-h", "--help") for arg in args):
        if rank() == 0:
            from skyrl.config.help import help_text

            print(help_text(mode))
        return
    try:
        _Entry(mode, args).run()
    except UserError as error:
        _leave(str(error))
    except COMPOSE_ERRORS as error:
        _leave(explain(error))


def _leave(message: str) -> None:
    """Ends the process with one line: rank 0's, or, when rank 0 saw no error, that of the rank that did."""
    if rank() == 0:
        tell(message)
    else:
        time.sleep(FOLLOWER_SECONDS)  # torchrun ends us here when rank 0 failed as well
        tell(f"rank {rank()}: {message}")
    sys.exit(USAGE_ERROR)


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
        flags += [f"{flag}={value}"] if flag.startswith("--") else [flag, value]
    return flags, overrides


class _Entry:
    """One command line. Hydra composes before the first job, in silence on all ranks but 0."""

    def __init__(self, mode: str, args: list[str]) -> None:
        self.mode = mode
        self.args = args
        self.sweep = False
        self.failed = 0
        self.code = 0

    def run(self) -> None:
        register_schema()
        # Without it Hydra prints its own error and exits; we want the exception, to say it in one line.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        flags, overrides = split_args(self.args)
        self.sweep = "-m" in flags or "--multirun" in flags
        if not any(flag.startswith(("-i", "--info", "--hydra-help")) for flag in flags):
            flags += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        with contextlib.ExitStack() as stack:
            if self.sweep:  # Hydra's sweeper writes multirun.yaml; the run folders hold all that is in it
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="skyrl-sweep-"))
                flags.append(f"hydra.sweep.dir={folder}")
            sys.argv[1:] = [*flags, *overrides]  # what the user says comes last and wins
            self._compose_and_run()
        if self.failed:
            print(f"skyrl: {self.failed} run(s) of the sweep failed", file=sys.stderr, flush=True)
            sys.exit(self.code)

    def _compose_and_run(self) -> None:
        quiet = rank() != 0
        self.stdout, self.stderr = sys.stdout, sys.stderr
        main = hydra.main(version_base=VERSION_BASE, config_path=str(config_dir()), config_name="config")(self.job)
        if not quiet:
            main()
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main()

    def job(self, composed: DictConfig) -> None:
        """One run. In a sweep of one process a failed point is told and counted, and the next one starts."""
        with contextlib.redirect_stdout(self.stdout), contextlib.redirect_stderr(self.stderr):
            try:
                self._run_one(composed)
            except UserError as error:
                if not self.sweep or world_size() > 1:
                    _leave(str(error))
                tell(str(error))
                self.failed, self.code = self.failed + 1, max(self.code, USAGE_ERROR)
            except Exception as error:
                traceback.print_exception(type(error), error, error.__traceback__.tb_next)
                sys.stderr.flush()
                if not self.sweep or world_size() > 1:
                    sys.exit(1)  # other ranks may wait for us in a collective: only the end of the job frees them
                self.failed, self.code = self.failed + 1, max(self.code, 1)

    def _run_one(self, composed: DictConfig) -> None:
        cfg = finish(composed, HydraConfig.get().overrides.task, mode=self.mode)
        if cfg.dry_run:
            from skyrl.config.plan import dry_run

            text = dry_run(cfg, cfg.run.world_size or world_size())
            if rank() == 0:
                print(text, flush=True)
            return
        # By name: this folder lies below the trainer, and a command line that is wrong should not wait for torch.
        getattr(importlib.import_module("skyrl.trainer"), self.mode)(cfg)
