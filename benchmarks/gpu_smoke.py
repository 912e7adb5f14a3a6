"""What nobody has seen on a GPU yet, in ten minutes and one file: run it, and send that file.

    python benchmarks/gpu_smoke.py                     # --size 4b for a larger model
    python benchmarks/gpu_smoke.py --only paged,graphs --out x.json
    python benchmarks/gpu_smoke.py                     # on a CPU: a toy model, and what was skipped

First whether CUDA computes the right numbers, then how fast: checks come in the order of what they tell. Each has a
verdict (ok, failed, skipped), its reason and its figures; on a GPU a run of all checks writes
baselines/<GPU>/gpu_smoke.json, else gpu_smoke.json. Most run on one GPU, memory_fsdp on up to eight, two_ranks on two
or four. They run in processes of their own: one that crashes, hangs or leaves its GPU unusable takes no other with it.
Weights are random, in the shape of a real model: nothing is downloaded. Decoding is held against what the memory's
bandwidth allows: a step reads all weights once and the keys and values of every running sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
from skyrl.main import set_torch_defaults  # noqa: E402

set_torch_defaults()  # before torch is imported, as in a run
import common  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from common import GIB, GPU  # noqa: E402
from gpu_checks import CHECKS, Failed, Setup, Skipped  # noqa: E402

from skyrl.distributed.init import shutdown  # noqa: E402
from skyrl.planner.device import machine_facts  # noqa: E402

KINDS = "ddp,fsdp,fsdp+all,hsdp/2,zero3,zero3+all"
RESUME_LIMIT = 1e-3  # of a metric after a kill against the same run without one, relative
NOT_COMPARED = ("time/", "speed/", "memory/")  # metrics of the clock and the machine
HANGS_SECONDS = 240.0  # without a word from a process of checks


def run_limited(command: list[str], seconds: float, cwd: str | None = None) -> tuple[int | None, str, str]:
    """Exit code (None: it was ended after so many seconds), output and errors; nothing that it started is left."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return (None, *process.communicate())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """`skyrl.train` as a user starts it, with the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["batch.num_steps=2", "warmup.num_steps=2", f"run.dir={folder}/run"]
        code, out, err = run_limited([sys.executable, "-m", "skyrl.train", *options], args.left(), folder)
        figures = {"first_lines": out.splitlines()[:3], "end": (out + err).splitlines()[-6:]}
        if code != 0:
            raise _not_zero(code, figures)
        last = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1]
        return {**figures, "last_step": json.loads(last)}


def _not_zero(code: int | None, figures: dict[str, Any]) -> Failed:
    return Skipped("no time left", figures) if code is None else Failed(f"ended with {code}: see end", figures)


def two_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Layouts over two ranks, on four GPUs or more over four: time, memory, bytes, and losses equal to ddp's
    (benchmarks/strategies.py, which leaves DeepSpeed's out where it is not installed)."""
    count = torch.cuda.device_count()
    if GPU and count < 2:
        raise Skipped("needs two GPUs")
    what = ["--ranks", "4" if count >= 4 else "2", "--kinds", KINDS if GPU else "ddp,fsdp", "--steps", "3", "--dry"]
    command = [sys.executable, str(Path(__file__).with_name("strategies.py")), *what]
    code, out, err = run_limited(command, args.left())
    figures = {"table": out.splitlines(), "end": err.splitlines()[-6:]}
    if code != 0:
        raise _not_zero(code, figures)
    return figures


def killed_rank(args: argparse.Namespace) -> dict[str, Any]:
    """A rank is killed in the middle of training: the job ends in one line, and the same command comes to the end that
    the run has without a kill."""
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    options = [f"strategy.device={device}", "warmup.num_steps=2", "eval.num_prompts=4", "checkpoint.every_steps=1"]
    options += ["batch.num_steps=12", "debug.deterministic=true", "checkpoint.export=false"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:

        def command(name: str) -> list[str]:
            return [*launcher, "-m", "skyrl.train", *options, f"run.dir={folder}/{name}"]

        def end(name: str) -> list[str]:
            code, out, err = run_limited(command(name), min(300.0, args.left()), folder)
            if code is None:
                what = f"the run {name!r} did not end" if args.left() > 0 else "no time left"
                raise (Failed if args.left() > 0 else Skipped)(what, {"end": (out + err).splitlines()[-12:]})
            return (out + err).splitlines()

        def metrics(name: str) -> list[dict[str, Any]]:
            lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
            return [{k: v for k, v in json.loads(line).items() if not k.startswith(NOT_COMPARED)} for line in lines]

        with open(f"{folder}/output", "w+") as output:
            process = subprocess.Popen(
                command("killed"), cwd=folder, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                until = time.monotonic() + max(1.0, min(300.0, args.left()))
                saved: list[int] = []
                while max(saved, default=0) < 5 and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.05)
                    found = [path.name for path in Path(folder).glob("killed/checkpoints/*")]
                    saved = [int(name) for name in found if name.isdigit()]
                if max(saved, default=0) < 5:
                    end_so_far = Path(f"{folder}/output").read_text().splitlines()[-12:]
                    raise Failed("no fifth step in time", {"device": device, "saved": saved, "end": end_so_far})
                begun, ranks = time.monotonic(), psutil.Process(process.pid).children()
                for rank in ranks[-1:]:
                    rank.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(1.0, min(60.0, args.left())))
                seconds = time.monotonic() - begun
            finally:  # torchrun and, where that has not ended them, its ranks
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            told = output.read().splitlines()
        errors = [line for line in told if line.startswith("skyrl: error:")]
        figures = {"device": device, "saved": saved, "seconds_to_the_end": seconds, "errors": errors}
        if len(errors) != 1 or "ended without a message" not in errors[0]:
            raise Failed("the killed rank is not named in one line", {**figures, "end": told[-12:]})
        told = end("killed") + end("quiet")
        ours, wanted = metrics("killed"), metrics("quiet")
        figures["steps"] = [len(ours), len(wanted)]
        if len(ours) != len(wanted):
            raise Failed("the same command did not come to the end", {**figures, "end": told[-12:]})
        pairs = zip(ours, wanted, strict=True)
        differ = [(k, one.get(k), v) for one, other in pairs for k, v in other.items() if not _close(one.get(k), v)]
        if differ:
            raise Failed("the run goes on in another way than without the kill", {**figures, "differ": differ[:8]})
    if device == "cpu":
        raise Skipped("needs two GPUs; on the CPU it holds", figures)
    return figures


def _close(a: Any, b: Any) -> bool:
    both = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return a == b or (both and abs(a - b) <= RESUME_LIMIT * max(1.0, abs(b)))


APART = {check.__name__: check for check in (recipe, two_ranks, killed_rank)}
# Right numbers first, by what they tell, then speed; those of one engine lie together.
ORDER = (
    "paged graphs gap gradients synchronisations memory long_row killed_rank memory_fsdp two_ranks recipe decoding "
    "lora training"
).split()


def outcome(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A check's verdict and figures, whatever it raises."""
    begun = time.monotonic()
    try:
        found: dict[str, Any] = {"verdict": "ok", **action()}
    except Failed as error:
        verdict = "skipped" if isinstance(error, Skipped) else "failed"
        found = {"verdict": verdict, "reason": str(error), **error.figures}
    except Exception as error:
        trace = traceback.format_exc().splitlines()[-8:]
        found = {"verdict": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}", "trace": trace}
    return {**found, "seconds": round(time.monotonic() - begun, 1)}


def run_child(args: argparse.Namespace) -> None:
    """The checks of args.names on one engine; a line of JSON for the begin and the end of each in args.results."""

    def tell(name: str, found: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") == "0":
            with open(args.results, "a") as results:
                print(json.dumps({"check": name, **found}, default=str), file=results)

    setup = Setup(args, "fsdp" if args.names == ["memory_fsdp"] else "single")
    for name in args.names:
        tell(name, {"begun": True})
        tell(name, outcome(partial(CHECKS[name], setup)))
        gc.collect()
        if GPU:
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # its fault stays in this process: the parent starts another one for the rest
                os._exit(1)
            torch.cuda.empty_cache()
    shutdown()


def run_apart(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Verdicts of checks of one engine, in a process of their own; again without the one in which it ended."""
    found: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in found]:
        results = Path(args.folder) / f"results-{'-'.join(left)}.jsonl"
        results.touch()
        given = {**vars(args), "names": left, "results": str(results), "left": None}
        ranks = min(8, torch.cuda.device_count()) if left == ["memory_fsdp"] else 1
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        reason = _run_watched([sys.executable, *torchrun, __file__, "--child", json.dumps(given)], results, args)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        found |= {line.pop("check"): line for line in lines if "verdict" in line}
        if reason == "no time left" or not lines:  # or no engine could be made
            verdict = "skipped" if reason == "no time left" else "failed"
            return found | {name: {"verdict": verdict, "reason": reason} for name in left if name not in found}
        if (last := lines[-1].get("check")) and last not in found:
            found[last] = {"verdict": "failed", "reason": reason}
    return found


def _run_watched(command: list[str], results: Path, args: argparse.Namespace) -> str:
    """Why the process ended: by itself, after HANGS_SECONDS without a word in `results`, or for want of time."""
    said = results.with_suffix(".txt")
    with open(said, "w") as output:
        process = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=subprocess.STDOUT)
        size, since, reason = 0, time.monotonic(), ""
        while process.poll() is None and not reason:
            time.sleep(0.1)
            if results.stat().st_size > size:
                size, since = results.stat().st_size, time.monotonic()
            if args.left() <= 0:
                reason = "no time left"
            elif time.monotonic() - since > HANGS_SECONDS:
                reason = f"no word for {HANGS_SECONDS:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    end = " | ".join(said.read_text().splitlines()[-3:])[:600]
    return reason or f"the process ended with {process.returncode}: {end}"


def device_figures() -> dict[str, Any]:
    """What the devices are, and with what they are driven."""
    if not GPU:
        return {"device": "cpu", "gpus": 0}
    about = torch.cuda.get_device_properties(0)
    found = {"device": about.name, "gpus": torch.cuda.device_count(), "memory_gib": about.total_memory / GIB}
    found |= {"capability": f"{about.major}.{about.minor}", "driver": machine_facts()["driver"]}
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")
    found["environment"] = {name: os.environ[name] for name in names if name in os.environ}
    with contextlib.suppress(AttributeError):  # a build without NCCL
        found["nccl"] = str(torch.cuda.nccl.version())
    return found | {"cuda": torch.version.cuda or torch.version.hip}


def main() -> None:
    """Runs the checks in order while there is time, prints a line for each, and writes one JSON."""
    small = GPU and torch.cuda.get_device_properties(0).total_memory < 40 * GIB
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=common.SHAPES, default="0.6b" if GPU else "toy")
    parser.add_argument("--requests", type=int, default=(64 if small else 256) if GPU else 16)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 512) if GPU else (8, 40))
    parser.add_argument("--packed", type=int, default=8192 if GPU else 512, help="tokens of a micro-batch in training")
    parser.add_argument("--checkpointing", action="store_true", default=small, help="the default below 40 GiB")
    parser.add_argument("--positions", type=int, default=8192 if GPU else 1024)
    parser.add_argument("--steps", type=int, default=8 if GPU else 3)
    parser.add_argument("--seconds", type=float, default=600.0, help="no check goes on after that")
    parser.add_argument("--only", default="", help=f"of {','.join(ORDER)}")
    parser.add_argument("--out", default="", help="default: see above")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(argparse.Namespace(**json.loads(args.child)))
    names = args.only.split(",") if args.only else ORDER
    if wrong := [name for name in names if name not in ORDER]:
        parser.error(f"--only={args.only}: {wrong[0]!r} is no check; they are {','.join(ORDER)}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    keep = GPU and not args.only
    out = Path(args.out or (common.baseline("gpu_smoke") if keep else "gpu_smoke.json"))
    until = time.monotonic() + args.seconds
    args.left = lambda: until - time.monotonic()
    figures: dict[str, Any] = {**device_figures(), "model": f"qwen3-{args.size} shape, random", "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        if args.left() > 0:
            common.write_model(Path(folder), args.size, args.positions)
        alone = {*APART, "memory_fsdp"}
        for separate, members in itertools.groupby(names, lambda name: name if name in alone else ""):
            group = list(members)
            if args.left() <= 0:
                found = {name: {"verdict": "skipped", "reason": "no time left"} for name in group}
            elif separate in APART:
                found = {separate: outcome(partial(APART[separate], args))}
            else:
                found = run_apart(group, args)
            for name, one in found.items():
                print(f"{one['verdict']:<8}{name:<18}{one.get('reason', '')}", flush=True)
            figures["checks"] |= found
            out.write_text(json.dumps({**common.provenance(), **figures}, indent=1, default=str) + "\n")
    print(out)


if __name__ == "__main__":
    main()
