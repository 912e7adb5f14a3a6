"""What nobody has seen on a GPU yet, in ten minutes and one file: run it, and send that file.

    python benchmarks/gpu_smoke.py                     # every GPU of this machine is used; --size 4b for a larger model
    python benchmarks/gpu_smoke.py --only paged,graphs --out x.json
    python benchmarks/gpu_smoke.py                     # on a CPU: a toy model, and what was skipped

First whether CUDA computes the right numbers, then how fast: checks come in the order of what they tell. Each has a
verdict (ok, failed, skipped), its reason and its figures; on a GPU a run of all checks writes
baselines/<GPU>/gpu_smoke.json, else gpu_smoke.json. They run in processes of their own, so that a kernel that fails
takes one check with it and not the rest. Weights are random, in the shape of a real model: nothing is downloaded.
Decoding is held against what the memory's bandwidth allows: a step reads all weights once and the keys and values of
every running sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import common  # noqa: E402
from common import GIB, GPU  # noqa: E402

from skyrl.config.load import load_config  # noqa: E402
from skyrl.distributed.init import World, init_distributed, shutdown  # noqa: E402
from skyrl.engine import Engine, ModelSpec  # noqa: E402
from skyrl.planner.memory import BYTES, ModelSizes  # noqa: E402
from skyrl.planner.plan import Plan, describe_peak, make_plan, model_sizes  # noqa: E402
from skyrl.sampler import make  # noqa: E402
from skyrl.tracking.flops import ModelShape, causal_attended, peak_flops, train_flops  # noqa: E402
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Sample, SampleRequest, SamplingParams  # noqa: E402

KINDS = "fsdp,fsdp+all,hsdp/2,zero3,zero3+all"
GAP_LIMIT = 0.05  # mean absolute difference of log-probabilities, sampler against trainer, in bfloat16
GROWTH_LIMIT = 1.02  # of what is allocated after a step against the step before
RESUME_LIMIT = 1e-3  # of a metric after a kill against the same run without one, relative
NOT_COMPARED = ("time/", "speed/", "memory/")  # metrics of the clock and the machine


class Failed(Exception):
    """A check that ran to its end and found something wrong; `figures` are kept."""

    def __init__(self, reason: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.figures = figures or {}


class Skipped(Failed):
    """A check that says nothing on this machine, or not all, with the reason."""


class Setup:
    """A model in an engine, made once for all checks of one process."""

    def __init__(self, args: argparse.Namespace, strategy: str = "single") -> None:
        self.args, self.lines = args, _Lines()
        logging.getLogger("skyrl").addHandler(self.lines)
        self.options = [
            "env.options={}",
            f"model.path={args.folder}",
            f"strategy.name={strategy}",
            f"batch.max_tokens_per_microbatch={args.packed}",
            f"batch.max_row_tokens={args.positions}",
            f"sampler.max_running={args.requests}",
        ]
        self.cfg = load_config(self.options)
        self.world: World = init_distributed(self.cfg)
        self.sizes: ModelSizes = model_sizes(self.cfg)
        self.plan: Plan = make_plan(self.cfg, self.world.size, model_sizes=self.sizes, device=self.world.choice)
        self.engine = self.make_engine()
        self.engine.create("policy", ModelSpec())

    def make_engine(self, *overrides: str) -> Engine:
        """An engine without models, from the same options and these."""
        cfg = load_config([*self.options, *overrides])
        plan = {"dtype": self.plan.dtype, "strategy": self.plan.strategy, "memory": self.plan.memory}
        return Engine(cfg, self.world, max_row_tokens=self.args.positions, **plan)

    def frozen(self, *overrides: str) -> Engine:
        """Another engine with the same weights, to sample from and to score with."""
        engine = self.make_engine(*overrides)
        engine.create("policy", ModelSpec(trainable=False))
        return engine

    def requests(self, count: int = 0, model: str = "policy") -> list[SampleRequest]:
        """Requests of varied lengths, the same at every call."""
        rng = np.random.default_rng(0)
        low, high = self.args.lengths
        prompts, outs = rng.integers(low, high + 1, (2, count or self.args.requests))
        return [
            SampleRequest(str(i), rng.integers(3, 100, n), SamplingParams(int(m), seed=i), model=model)
            for i, (n, m) in enumerate(zip(prompts, outs, strict=True))
        ]

    def rows(self, count: int, length: int) -> list[Datum]:
        """Rows for one update."""
        rng = np.random.default_rng(1)
        rows = []
        for _ in range(count):
            ids = rng.integers(3, 100, length + 1)
            old, ones = np.full(length, -4.0, np.float32), np.ones(length, np.float32)
            weights = np.full(length, 1e-4)
            rows.append(Datum(ids[:-1], ids[1:], weights, sampling_logprobs=old, advantages=ones))
        return rows

    def train(self, rows: list[Datum], model: str = "policy") -> None:
        """One update."""
        self.engine.forward_backward(rows, LossSpec("importance_sampling"), model=model)
        self.engine.optim_step(model, AdamParams(1e-6))


class _Lines(logging.Handler):
    """Keeps what is logged: why a fast path was not taken."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def sync() -> float:
    """The clock after the device has done all it was given."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def draw(engine: Engine, requests: list[SampleRequest], model: str = "policy") -> tuple[dict[str, Sample], float, Any]:
    """Samples by uid, tokens per second, and the sampler."""
    with engine.sampling(model) as sampler:
        start, drawn = sync(), []
        for request in requests:
            sampler.add(request)
        while sampler.unfinished():
            drawn += sampler.step()
        seconds = sync() - start
    tokens = sum(len(sample.tokens) for sample in drawn)
    return {sample.uid: sample for sample in drawn}, tokens / seconds, sampler


def gaps(engine: Engine, requests: list[SampleRequest], drawn: dict[str, Sample]) -> np.ndarray:
    """Absolute differences of log-probabilities of the drawn tokens, sampler against trainer."""
    rows = []
    for request in requests:
        ids = np.concatenate([request.tokens, drawn[request.uid].tokens])
        rows.append(Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1, np.float32)))
    scored = engine.score(rows, 1.0).logprobs
    pairs = zip(requests, scored, strict=True)
    return np.concatenate([np.abs(row[len(r.tokens) - 1 :] - drawn[r.uid].logprobs) for r, row in pairs])


def graphs_of(sampler: Any) -> int:
    """CUDA graphs that the sampler has captured."""
    return sum(graph is not None for graph in getattr(sampler._runner, "_graphs", {}).values())


@contextlib.contextmanager
def gathered_attention() -> Iterator[None]:
    """Samplers made inside decode over gathered keys, without the paged kernel and without graphs."""
    before, make.paged_kernel = make.paged_kernel, lambda *_: "off in this benchmark"
    try:
        yield
    finally:
        make.paged_kernel = before


# ---- checks: each returns figures, or raises Failed or Skipped


def paged(setup: Setup) -> dict[str, Any]:
    """The paged kernel is taken, and its log-probabilities are those of gathered attention and of the trainer."""
    requests = setup.requests(16)
    drawn, _, sampler = draw(setup.engine, requests)
    figures: dict[str, Any] = {"runner": type(sampler._runner).__name__, "log": setup.lines.seen[-8:]}
    figures["gap_mean"] = float(gaps(setup.engine, requests, drawn).mean())
    with gathered_attention():
        engine = setup.frozen()
        other, _, sampler = draw(engine, requests)
    figures["gathered_runner"] = type(sampler._runner).__name__
    figures["gathered_gap_mean"] = float(gaps(engine, requests, other).mean())
    pairs = [zip(drawn[r.uid].tokens, other[r.uid].tokens, strict=False) for r in requests]
    figures["equal_tokens"] = float(np.mean([a == b for pair in pairs for a, b in pair]))
    if max(figures["gap_mean"], figures["gathered_gap_mean"]) > GAP_LIMIT:
        raise Failed("log-probabilities differ from the trainer's", figures)
    if not GPU:
        raise Skipped("the paged kernel needs a GPU; gathered attention agrees with the trainer", figures)
    if figures["runner"] != "CudaRunner":
        raise Failed("the paged kernel was not taken: see log", figures)
    return figures


def graphs(setup: Setup) -> dict[str, Any]:
    """CUDA graphs are captured, and what they draw is what the same steps draw call by call."""
    requests = setup.requests(16)
    drawn, _, sampler = draw(setup.engine, requests)
    engine = setup.frozen("sampler.cuda_graphs=false")
    other, _, eager = draw(engine, requests)
    figures: dict[str, Any] = {"captured": graphs_of(sampler)}
    for name, found in (("gap_mean", drawn), ("eager_gap_mean", other)):
        figures[name] = float(gaps(setup.engine, requests, found).mean())
    if max(figures["gap_mean"], figures["eager_gap_mean"]) > GAP_LIMIT:
        raise Failed("what is drawn is not what the trainer says", figures)
    if not GPU:
        raise Skipped("no graphs on a CPU; twice the same", figures)
    if not figures["captured"] or graphs_of(eager):
        raise Failed("no graph was captured, or some without being asked for", figures)
    return figures


def decoding(setup: Setup) -> dict[str, Any]:
    """Tokens per second with and without CUDA graphs, against the bandwidth's limit."""
    figures: dict[str, Any] = {"limit_tokens_per_second": decode_limit(setup)}
    for name, engine in (("graphs", setup.engine), ("eager", setup.frozen("sampler.cuda_graphs=false"))):
        for turn in ("first", "second"):  # the first one compiles and captures
            _, figures[f"{name}_{turn}_tokens_per_second"], _ = draw(engine, setup.requests())
    figures["part_of_limit"] = figures["graphs_second_tokens_per_second"] / figures["limit_tokens_per_second"]
    return figures


def decode_limit(setup: Setup) -> float:
    """Tokens per second if reading weights and cache were all the work."""
    source = torch.empty(GIB if GPU else 2**26, dtype=torch.uint8, device=setup.world.device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        start = sync()
        target.copy_(source)
        best = min(best, sync() - start)
    requests, sizes = setup.requests(), setup.sizes
    prompts = np.array([len(request.tokens) for request in requests])
    outs = np.array([request.params.max_tokens for request in requests])
    weights = sizes.num_parameters * BYTES[setup.plan.dtype]
    per_token = sizes.cache_bytes_per_token(setup.plan.dtype)
    read = sum(weights + per_token * float((prompts[outs > n] + n).sum()) for n in range(int(outs.max())))
    return float(outs.sum()) / (read / (2 * source.numel() / best))


def gap(setup: Setup) -> dict[str, Any]:
    """Log-probabilities of sampler and trainer, before and after an update."""
    requests, figures = setup.requests(32), {}
    for when in ("before", "after"):
        found = gaps(setup.engine, requests, draw(setup.engine, requests)[0])
        figures |= {f"{when}_mean": float(found.mean()), f"{when}_max": float(found.max())}
        setup.train(setup.rows(4, min(512, setup.args.packed)))
    if max(figures["before_mean"], figures["after_mean"]) > GAP_LIMIT:
        raise Failed("sampler and trainer disagree", figures)
    return figures


@contextlib.contextmanager
def counted_syncs(into: dict[str, Any], name: str) -> Iterator[None]:
    """Synchronisations inside the block: all that CUDA tells of, by line; on a CPU those of reading one number."""
    with warnings.catch_warnings(record=True) as told, common.OperatorCounts() as operators:
        warnings.simplefilter("always")
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")
    told = [one for one in told if "synchronizing CUDA operation" in str(one.message)]
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told)
    into[name] = {"count": len(told) if GPU else operators.synchronisations, "places": dict(places.most_common(8))}


def synchronisations(setup: Setup) -> dict[str, Any]:
    """How often the host waits for the device in one update of one micro-batch and in 20 decode steps."""
    figures: dict[str, Any] = {}
    rows = setup.rows(1, setup.args.packed // 2)
    setup.train(rows)
    with counted_syncs(figures, "update"):
        setup.train(rows)
    with setup.engine.sampling("policy") as sampler:
        for i in range(8):
            sampler.add(SampleRequest(str(i), np.arange(3, 19), SamplingParams(64, seed=i)))
        for _ in range(8):
            sampler.step()
        with counted_syncs(figures, "decode_20_steps"):
            for _ in range(20):
                sampler.step()
        while sampler.unfinished():
            sampler.step()
    # Tokens must come to the host once a step; metrics, checks and the norm for clipping some times an update.
    if GPU and (figures["decode_20_steps"]["count"] > 40 or figures["update"]["count"] > 16):
        raise Failed("the host waits more often than it must", figures)
    return figures


def training(setup: Setup) -> dict[str, Any]:
    """Seconds and MFU of an update over four micro-batches, and of the hand-over to the first token after it."""
    args, length = setup.args, min(512, setup.args.packed)
    rows, times = setup.rows(4 * args.packed // length, length), []
    for _ in range(args.steps):
        start = sync()
        setup.train(rows)
        times.append(sync() - start)
    start = sync()
    with setup.engine.sampling("policy") as sampler:
        entered = sync() - start
        sampler.add(SampleRequest("0", np.arange(3, 19), SamplingParams(1)))
        while sampler.unfinished():
            sampler.step()
    first = sync() - start
    sizes, seconds = setup.sizes, float(np.median(times[2:] or times))
    shape = ModelShape(sizes.matmul_parameters, sizes.num_layers, sizes.num_heads * sizes.head_size)
    flops = train_flops(shape, len(rows) * length, causal_attended([length] * len(rows)))
    peak = peak_flops(setup.world.choice.name) if GPU else None
    return {
        "step_seconds": seconds,
        "tokens_per_second": len(rows) * length / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "hand_over_seconds": entered,
        "first_token_seconds": first,
    }


def memory(setup: Setup) -> dict[str, Any]:
    """Memory and cache size by phase and step, against the plan: nothing grows, and the cache stays as large."""
    figures: dict[str, Any] = {"strategy": setup.plan.strategy, "planned": describe_peak(setup.plan), "steps": []}
    rows = setup.rows(4, min(512, setup.args.packed))
    for _ in range(4):
        step: dict[str, Any] = {}
        for phase in ("generation", "training"):
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            if phase == "generation":
                _, _, sampler = draw(setup.engine, setup.requests(16))
                step["cache_blocks"] = sampler._scheduler.pool.num_blocks
                del sampler
            else:
                setup.train(rows)
            step[phase] = _memory_now()
        figures["steps"].append(step)
    if not GPU:
        raise Skipped("no allocator to ask on a CPU; four steps ran", figures)
    blocks = [step["cache_blocks"] for step in figures["steps"]]
    held = [step["training"]["allocated_gib"] for step in figures["steps"]]
    peak = max(step[phase]["peak_gib"] for step in figures["steps"] for phase in ("generation", "training"))
    figures["peak_gib"], figures["planned_gib"] = peak, setup.plan.memory.peak / GIB if setup.plan.memory else None
    if len(set(blocks)) > 1 or held[-1] > held[1] * GROWTH_LIMIT:
        raise Failed(f"cache blocks by step {blocks}, GiB after training {[round(x, 2) for x in held]}", figures)
    if figures["planned_gib"] and peak > 1.1 * figures["planned_gib"]:
        raise Failed("the peak is above the plan", figures)
    return figures


def _memory_now() -> dict[str, float]:
    if not GPU:
        return {}
    told = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    told |= {"peak": torch.cuda.max_memory_allocated(), "free": torch.cuda.mem_get_info()[0]}
    return {f"{name}_gib": value / GIB for name, value in told.items()}


def lora(setup: Setup) -> dict[str, Any]:
    """Tokens per second of an adapter against its base, and one update of it."""
    engine = setup.make_engine()
    engine.create("base", ModelSpec(trainable=False))
    engine.create("adapter", ModelSpec(lora=LoraSpec(rank=16), base="base"))
    figures: dict[str, Any] = {}
    for name in ("base", "adapter"):
        for turn in ("first", "second"):
            _, figures[f"{name}_{turn}_tokens_per_second"], sampler = draw(engine, setup.requests(64, name), "adapter")
        figures[f"{name}_graphs"] = graphs_of(sampler)
    start = sync()
    engine.forward_backward(setup.rows(4, 128), LossSpec("importance_sampling"), model="adapter")
    engine.optim_step("adapter", AdamParams(1e-4))
    figures["update_seconds"] = sync() - start
    return figures


def long_row(setup: Setup) -> dict[str, Any]:
    """One row of 8k tokens (1k on a CPU), forward and backward."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    length = min(setup.args.positions, 8192 if GPU else 1024)
    start = sync()
    setup.train(setup.rows(1, length))
    return {"tokens": length, "seconds": sync() - start, **_memory_now()}


CHECKS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    check.__name__: check
    for check in (paged, gap, graphs, synchronisations, memory, long_row, decoding, lora, training)
}
CHECKS["memory_fsdp"] = memory


# ---- checks in processes of their own, started by the parent


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """`skyrl.train` as a user starts it, with the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "skyrl.train",
            "batch.num_steps=2",
            "warmup.num_steps=2",
            f"run.dir={folder}/run",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.left(), cwd=folder)
        figures = {"first_lines": done.stdout.splitlines()[:3], "end": (done.stdout + done.stderr).splitlines()[-6:]}
        if done.returncode:
            raise Failed(f"ended with {done.returncode}", figures)
        last = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1]
        return {**figures, "last_step": json.loads(last)}


def two_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Layouts over two ranks: time, memory, bytes, and losses equal to ddp's (benchmarks/strategies.py)."""
    if GPU and torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    kinds = f"ddp,{KINDS}" if GPU else "ddp,fsdp"
    script = Path(__file__).with_name("strategies.py")
    command = [sys.executable, str(script), "--ranks", "2", "--kinds", kinds, "--steps", "3", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.left())
    figures = {"table": done.stdout.splitlines(), "end": done.stderr.splitlines()[-6:]}
    if done.returncode:
        raise Failed("a layout failed: see end", figures)
    return figures


def killed_rank(args: argparse.Namespace) -> dict[str, Any]:
    """A rank is killed in the middle of training: the job ends in one line, and the same command comes to the end that
    the run has without a kill."""
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    options = [f"strategy.device={device}", "warmup.num_steps=2", "eval.num_prompts=4", "checkpoint.every_steps=1"]
    options += ["batch.num_steps=12", "debug.deterministic=true", "checkpoint.export=false"]
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str) -> subprocess.Popen[str]:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command = [*launcher, "-m", "skyrl.train", *options, f"run.dir={folder}/{name}"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)

        def end(process: subprocess.Popen[str]) -> list[str]:
            try:
                return process.communicate(timeout=max(1.0, min(120.0, args.left())))[0].splitlines()
            finally:  # torchrun and, where that has not ended them, its ranks
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

        def metrics(name: str) -> list[dict[str, Any]]:
            lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
            return [{k: v for k, v in json.loads(line).items() if not k.startswith(NOT_COMPARED)} for line in lines]

        process, until = start("killed"), time.monotonic() + min(120.0, args.left())
        while len(list(Path(folder).glob("killed/checkpoints/0*"))) < 3 and process.poll() is None:
            if time.monotonic() > until:
                raise Failed("no third checkpoint in time", {"device": device, "end": end(process)[-12:]})
            time.sleep(0.05)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        begun = time.monotonic()
        for rank in ranks[-1:]:
            os.kill(int(rank), signal.SIGKILL)
        told = end(process)
        errors = [line for line in told if line.startswith("skyrl: error:")]
        figures = {"device": device, "seconds_to_the_end": time.monotonic() - begun, "errors": errors}
        if len(errors) != 1 or "ended without a message" not in errors[0]:
            raise Failed("the killed rank is not named in one line", {**figures, "end": told[-12:]})
        told = end(start("killed")) + end(start("quiet"))
        found, wanted = metrics("killed"), metrics("quiet")
        figures["steps"] = [len(found), len(wanted)]
        if len(found) != len(wanted):
            raise Failed("the same command did not come to the end", {**figures, "end": told[-12:]})
        pairs = [
            (key, one.get(key), value) for one, other in zip(found, wanted, strict=True) for key, value in other.items()
        ]
        figures["differ"] = [pair for pair in pairs if not _close(*pair[1:])][:8]
        if figures["differ"]:
            raise Failed("the run goes on in another way than without the kill", figures)
    return figures


def _close(a: Any, b: Any) -> bool:
    both = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return a == b or (both and abs(a - b) <= RESUME_LIMIT * max(1.0, abs(b)))


APART = {check.__name__: check for check in (recipe, two_ranks, killed_rank)}
# Right numbers first, by what they tell, then speed; those of one engine lie together.
ORDER = (
    "paged gap graphs synchronisations memory long_row killed_rank memory_fsdp two_ranks recipe decoding lora training"
).split()


def outcome(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A check's verdict and figures, whatever it raises."""
    begun = time.monotonic()
    try:
        found: dict[str, Any] = {"verdict": "ok", **action()}
    except Failed as error:
        verdict = "skipped" if isinstance(error, Skipped) else "failed"
        found = {"verdict": verdict, "reason": str(error), **error.figures}
    except subprocess.TimeoutExpired:
        found = {"verdict": "skipped", "reason": "no time left"}
    except Exception as error:
        trace = traceback.format_exc().splitlines()[-8:]
        found = {"verdict": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}", "trace": trace}
    return {**found, "seconds": round(time.monotonic() - begun, 1)}


def run_child(args: argparse.Namespace) -> None:
    """The checks of args.names on one engine; a line of JSON for the begin and the end of each in args.results."""
    names = args.names
    with open(args.results, "a") as results:

        def tell(name: str, found: dict[str, Any]) -> None:
            print(json.dumps({"check": name, **found}), file=results, flush=True)

        tell(names[0], {"begun": True})
        setup = Setup(args, "fsdp" if names == ["memory_fsdp"] else "single")
        for name in names:
            tell(name, {"begun": True})
            tell(name, outcome(lambda name=name: CHECKS[name](setup)))
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
    shutdown()


def run_apart(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Verdicts of checks of one engine, in a process of their own; again without the one in which it ended."""
    found: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in found]:
        results = Path(args.folder) / f"results-{'-'.join(left)}.jsonl"
        given = {**vars(args), "names": left, "results": str(results), "left": None}
        command = [sys.executable, __file__, "--child", json.dumps(given)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, args.left()))
            reason = f"the process ended with {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])[:600]}"
        except subprocess.TimeoutExpired:
            reason = "no time left"
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found |= {line.pop("check"): line for line in lines if "verdict" in line}
        if reason == "no time left" or not lines:
            verdict = "skipped" if reason == "no time left" else "failed"
            return found | {name: {"verdict": verdict, "reason": reason} for name in left if name not in found}
        if (last := lines[-1].get("check")) and last not in found:
            found[last] = {"verdict": "failed", "reason": reason}
    return found


def main() -> None:
    """Runs the checks in order while there is time, prints a line for each, and writes one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=common.SHAPES, default="0.6b" if GPU else "toy")
    parser.add_argument("--requests", type=int, default=256 if GPU else 16)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 1024) if GPU else (8, 40))
    parser.add_argument("--packed", type=int, default=8192 if GPU else 512, help="tokens of a micro-batch in training")
    parser.add_argument("--positions", type=int, default=8192 if GPU else 1024)
    parser.add_argument("--steps", type=int, default=8 if GPU else 3)
    parser.add_argument("--seconds", type=float, default=600.0, help="no check begins after that")
    parser.add_argument("--only", default="", help=f"of {','.join(ORDER)}")
    parser.add_argument("--out", default="", help="default: see above")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(argparse.Namespace(**json.loads(args.child)))
    names = args.only.split(",") if args.only else ORDER
    if wrong := [name for name in names if name not in ORDER]:
        parser.error(f"--only={args.only}: {wrong[0]!r} is no check; they are {','.join(ORDER)}")
    keep = GPU and not args.only
    out = Path(args.out or (common.baseline("gpu_smoke") if keep else "gpu_smoke.json"))
    until = time.monotonic() + args.seconds
    args.left = lambda: until - time.monotonic()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "gpus": torch.cuda.device_count(),
    }
    figures |= {"model": f"qwen3-{args.size} shape, random", "cuda": torch.version.cuda, "checks": {}}
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
                found = {separate: outcome(lambda check=APART[separate]: check(args))}
            else:
                found = run_apart(group, args)
            for name, one in found.items():
                print(f"{one['verdict']:<8}{name:<18}{one.get('reason', '')}", flush=True)
            figures["checks"] |= found
            out.write_text(json.dumps({**common.provenance(), **figures}, indent=1, default=str) + "\n")
    print(out)


if __name__ == "__main__":
    main()
