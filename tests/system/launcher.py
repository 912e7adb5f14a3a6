"""Starts real command lines of skyrl: alone, under torchrun, or as ranks forked from a process that did the imports.

Importing torch and transformers takes seconds, a tiny run less than one: where the launcher is not what is tested, the
ranks are forked from `Warm`, which is otherwise as torchrun is: same environment, and when one rank fails the others
get SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A whole run of a second or two: warm-up, RL with evaluations, checkpoints every 2 steps. Without a recipe, so that
# none has to fit these tests.
TINY = (
    "~experiment model.tiny.hidden_size=32 model.tiny.num_heads=2 model.tiny.num_kv_heads=1 model.tiny.num_layers=1 "
    "model.tiny.ffn_size=64 batch.num_steps=6 batch.prompts_per_step=4 batch.samples_per_prompt=4 "
    "batch.max_tokens_per_microbatch=64 warmup.num_steps=4 warmup.rows_per_step=8 warmup.lr=1e-2 optim.lr=1e-2 "
    "eval.num_prompts=8 eval.every_steps=2 checkpoint.every_steps=2 checkpoint.export=false tracking.rollouts_every=1 "
    "env.options.max_digits=1 env.options.min_digits=1 sampler.max_new_tokens=4 run.collective_timeout_seconds=60"
).split()

PLUGINS = str(ROOT / "tests" / "system" / "plugins")
# The same on an environment whose rewards vary from the first step on (plugins/letters.py).
LETTERS = [option for option in TINY if not option.startswith("env.")]
LETTERS += ["env.name=letters", "plugins=[letters]", "debug.deterministic=true", "checkpoint.keep_last=0"]


@dataclass
class Done:
    """A finished command: its exit code (the first failing rank's), outputs and duration."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines in which skyrl says what is wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("skyrl: error:")]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's traces, with the repository on the path."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in (*launcher, "HYDRA_FULL_ERROR")}
    path = os.pathsep.join([str(ROOT), PLUGINS])
    # The log level is what skyrl sets itself; a process that forks ranks imports torch before that.
    return {
        **clean,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **more,
    }


def python(*args: str, cwd: Path, module: str = "skyrl.train", timeout: float = 120, **env: str) -> Done:
    """`python -m <module> <args>`."""
    return _finish([sys.executable, "-m", module, *args], cwd, timeout, env)


def torchrun(*args: str, cwd: Path, ranks: int = 2, timeout: float = 120, **env: str) -> Done:
    """`torchrun --nproc_per_node=<ranks> -m skyrl.train <args>`."""
    return _finish([*torchrun_command(ranks), *args], cwd, timeout, env)


def torchrun_command(ranks: int = 2) -> list[str]:
    """What comes before the options."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*launcher, f"--master_port={free_port()}", "-m", "skyrl.train"]


def _finish(command: list[str], cwd: Path, timeout: float, env: dict[str, str]) -> Done:
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Done(process.returncode, out, err, time.monotonic() - start)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Warm:
    """A process with all imports done, from which ranks are forked. One command at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def run(
        self,
        *args: str,
        cwd: Path,
        ranks: int = 1,
        module: str = "skyrl.train",
        kill: Callable[[], bool] | None = None,
        only: Sequence[int] = (),
        timeout: float = 90,
        path: str = PLUGINS,
        before: str = "",
        number: int = signal.SIGKILL,
    ) -> Done:
        """Runs a command on some ranks. kill: asked every few milliseconds; when it says yes, signal `number` to all
        ranks, or to those in `only`. before: Python that each rank runs first."""
        start = time.monotonic()
        order = {"args": args, "cwd": str(cwd), "ranks": ranks, "module": module, "path": path, "before": before}
        order["port"] = free_port()
        self._tell(order)
        pids = self._hear()["pids"]
        killed = False
        while True:
            answer = self._ask()
            if answer["codes"] is not None:
                break
            if kill is not None and not killed and kill():
                killed = True
                self._tell({"kill": [pids[rank] for rank in (only or range(ranks))], "number": number})
                self._hear()
            if time.monotonic() - start > timeout:
                self._tell({"kill": pids})
                self._hear()
                raise TimeoutError(f"{args}: not done after {timeout} s\n{self._output(cwd)}")
            time.sleep(0.004)
        out, err = self._output(cwd)
        return Done(answer["codes"], out, err, time.monotonic() - start)

    def _output(self, cwd: Path) -> tuple[str, str]:
        return (cwd / ".stdout").read_text(), (cwd / ".stderr").read_text()

    def _ask(self) -> dict:
        self._tell({"poll": True})
        return self._hear()

    def _tell(self, order: dict) -> None:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm process ended with {self.process.wait()}")
        return json.loads(line)


# ---- inside the warm process ---------------------------------------------------------------------------------------


def _serve() -> None:
    import importlib

    for module in ("skyrl.trainers.rl", "skyrl.train", "skyrl.sft", "torch.distributed.fsdp", "tests.forked"):
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    living: dict[int, int] = {}
    first_failure = 0
    for line in sys.stdin:
        order = json.loads(line)
        if "args" in order:
            living, first_failure = {_fork(order, rank): rank for rank in range(order["ranks"])}, 0
            answer: dict = {"pids": list(living)}
        elif "kill" in order:
            for pid in order["kill"]:
                if pid in living:
                    os.kill(pid, order.get("number", signal.SIGKILL))
            answer = {}
        else:
            for pid in list(living):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del living[pid]
                    code = os.waitstatus_to_exitcode(status)
                    if code and not first_failure:
                        first_failure = code
                        for other in living:
                            os.kill(other, signal.SIGTERM)
            answer = {"codes": None if living else first_failure}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(order: dict, rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.chdir(order["cwd"])
        for number, name in ((1, ".stdout"), (2, ".stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if rank == 0 else 0)
            os.dup2(os.open(name, flags, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.path.insert(0, order["cwd"])
        if order["path"]:
            sys.path.insert(0, order["path"])
        os.environ["TMPDIR"] = tempfile.tempdir = order["cwd"]
        if order["ranks"] > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(order["ranks"]),
                LOCAL_WORLD_SIZE=str(order["ranks"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(order["port"]),
            )
        sys.argv = [f"{order['module']}.py", *order["args"]]
        exec(order["before"], {"rank": rank})
        code = 0
        try:
            sys.modules[order["module"]].main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        _end_of_python()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = code or 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_of_python() -> None:
    import atexit

    atexit._run_exitfuncs()


def when(condition: Callable[[], bool], *, delay: float = 0.0) -> Callable[[], bool]:
    """For `kill`: says yes `delay` seconds after the condition became true."""
    since: list[float] = []

    def ask() -> bool:
        if not since and condition():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay

    return ask


def lines_in(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def draw(seed: int) -> random.Random:
    """The draws of a test."""
    return random.Random(f"skyrl system tests {seed}")


if __name__ == "__main__":
    _serve()
