"""What nobody has seen on a GPU yet, in ten minutes and one file: run it, and send gpu_smoke.json.

    python benchmarks/gpu_smoke.py                     # every GPU of this machine is used; --size 4b for a larger model
    python benchmarks/gpu_smoke.py --only paged,graphs --out x.json
    python benchmarks/gpu_smoke.py                     # on a CPU: a toy model, and what was skipped

Checks come in the order of what they tell. Each has a verdict (ok, failed, skipped), its reason and its figures. They
run in processes of their own, so that a kernel that fails takes one check with it and not the rest. Weights are random,
in the shape of a real model: nothing is downloaded. Decoding is held against what the memory's bandwidth allows: a step
reads all weights once and the keys and values of every running sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
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
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import common  # noqa: E402

from skyrl.config.load import load_config  # noqa: E402
from skyrl.distributed.init import World, init_distributed, shutdown  # noqa: E402
from skyrl.engine import Engine, ModelSpec  # noqa: E402
from skyrl.planner.memory import ModelSizes  # noqa: E402
from skyrl.planner.plan import Plan, describe_peak, make_plan, model_sizes  # noqa: E402
from skyrl.sampler import make  # noqa: E402
from skyrl.text.tokenizer import tiny_tokenizer  # noqa: E402
from skyrl.tracking.flops import ModelShape, causal_attended, peak_flops, train_flops  # noqa: E402
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Sample, SampleRequest, SamplingParams  # noqa: E402

GPU = torch.cuda.is_available()
GIB = 2**30
# layers, hidden, heads, kv heads, head size, ffn, vocabulary
SHAPES = {
    "0.6b": (28, 1024, 16, 8, 128, 3072, 151936),
    "4b": (36, 2560, 32, 8, 128, 9728, 151936),
    "toy": (2, 64, 4, 2, 16, 128, 512),
}
KINDS = "fsdp,fsdp+all,hsdp/2,zero3,zero3+all"
GAP_LIMIT = 0.05  # mean absolute difference of log-probabilities, sampler against trainer, in bfloat16
GROWTH_LIMIT = 1.02  # of what is allocated after a step against the step before
SYNC_OPERATOR = "aten._local_scalar_dense.default"


class Failed(Exception):
    """A check that ran to its end and found something wrong; `figures` are kept."""

    def __init__(self, reason: str, figures: dict[str, Any]) -> None:
        super().__init__(reason)
        self.figures = figures


class Skipped(Exception):
    """A check that says nothing on this machine, with the reason."""


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
        raise Skipped("the paged kernel needs a GPU; gathered attention agrees with the trainer")
    if figures["runner"] != "CudaRunner":
        raise Failed("the paged kernel was not taken: see log", figures)
    return figures


def graphs(setup: Setup) -> dict[str, Any]:
    """Tokens per second with and without CUDA graphs, against the bandwidth's limit."""
    figures: dict[str, Any] = {"limit_tokens_per_second": decode_limit(setup)}
    for name, engine in (("graphs", setup.engine), ("eager", setup.frozen("sampler.cuda_graphs=false"))):
        for turn in ("first", "second"):  # the first one compiles and captures
            _, speed, sampler = draw(engine, setup.requests())
            figures[f"{name}_{turn}_tokens_per_second"] = speed
        figures[f"{name}_captured"] = graphs_of(sampler)
    figures["part_of_limit"] = figures["graphs_second_tokens_per_second"] / figures["limit_tokens_per_second"]
    if not GPU:
        return {**figures, "note": "no graphs on a CPU: twice the same"}
    if not figures["graphs_captured"] or figures["eager_captured"]:
        raise Failed("no graph was captured, or some without being asked for", figures)
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
    weights, per_token = sizes.num_parameters * 2, sizes.cache_bytes_per_token(setup.plan.dtype)
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


class _Syncs(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) == SYNC_OPERATOR
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_syncs(into: dict[str, Any], name: str) -> Iterator[None]:
    """Synchronisations inside the block: all that CUDA tells of, by line; on a CPU those of reading one number."""
    with warnings.catch_warnings(record=True) as told, contextlib.nullcontext() if GPU else _Syncs() as mode:
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
    into[name] = {"count": len(told) if GPU else mode.count, "places": dict(places.most_common(8))}


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
        raise Skipped("no allocator to ask on a CPU; four steps ran")
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
    check.__name__: check for check in (paged, graphs, gap, synchronisations, memory, training, lora, long_row)
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
    """A rank is killed in the middle of training: the job ends in one line, and the same command goes on."""
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        options = [f"strategy.device={device}", "warmup.num_steps=0", "eval.num_prompts=4", "checkpoint.every_steps=1"]
        command = [*launcher, "-m", "skyrl.train", *options, f"run.dir={folder}/run", "batch.num_steps=200"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        assert process.stdout is not None
        for line in process.stdout:
            if "saved checkpoint" in line:
                break
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        start = time.monotonic()
        if ranks:
            os.kill(int(ranks[-1]), signal.SIGKILL)
        try:
            told = process.communicate(timeout=min(90.0, args.left()))[0]
        finally:
            process.kill()
        errors = [line for line in told.splitlines() if line.startswith("skyrl: error:")]
        figures = {"device": device, "seconds_to_the_end": time.monotonic() - start, "errors": errors}
        if len(errors) != 1 or "ended without a message" not in errors[0]:
            raise Failed("the killed rank is not named in one line", {**figures, "end": told.splitlines()[-12:]})
    return figures


APART = {check.__name__: check for check in (recipe, two_ranks, killed_rank)}
# By what they tell; those of one engine lie together where that costs nothing.
ORDER = (
    "paged graphs gap memory synchronisations lora long_row training recipe memory_fsdp two_ranks killed_rank".split()
)


def outcome(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A check's verdict and figures, whatever it raises."""
    begun = time.monotonic()
    try:
        found: dict[str, Any] = {"verdict": "ok", **action()}
    except Skipped as reason:
        found = {"verdict": "skipped", "reason": str(reason)}
    except Failed as error:
        found = {"verdict": "failed", "reason": str(error), **error.figures}
    except subprocess.TimeoutExpired:
        found = {"verdict": "skipped", "reason": "no time left"}
    except Exception as error:
        trace = traceback.format_exc().splitlines()[-8:]
        found = {"verdict": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}", "trace": trace}
    return {**found, "seconds": round(time.monotonic() - begun, 1)}


def run_child(args: argparse.Namespace) -> None:
    """The checks of `args.child` on one engine; a line of JSON for the begin and the end of each in args.results."""
    names = args.child.split(",")
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
        shared = [
            f"--{name}={getattr(args, name)}" for name in ("size", "folder", "requests", "packed", "positions", "steps")
        ]
        command = [sys.executable, __file__, f"--child={','.join(left)}", f"--results={results}", *shared]
        command += ["--lengths", *map(str, args.lengths)]
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


def write_model(folder: Path, size: str, positions: int) -> None:
    """A model folder with random weights in the shape of `size`, and the project's small tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    layers, hidden, heads, kv_heads, head, ffn, vocab = SHAPES[size]
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def main() -> None:
    """Runs the checks in order while there is time, prints a line for each, and writes one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.6b" if GPU else "toy")
    parser.add_argument("--requests", type=int, default=256 if GPU else 16)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 1024) if GPU else (8, 40))
    parser.add_argument("--packed", type=int, default=8192 if GPU else 512, help="tokens of a micro-batch in training")
    parser.add_argument("--positions", type=int, default=8192 if GPU else 1024)
    parser.add_argument("--steps", type=int, default=8 if GPU else 3)
    parser.add_argument("--seconds", type=float, default=600.0, help="no check begins after that")
    parser.add_argument("--only", default="", help=f"of {','.join(ORDER)}")
    parser.add_argument("--out", default="gpu_smoke.json")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--results", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    args.left = lambda: until - time.monotonic()
    if args.child:
        run_child(args)
        return
    names = [name for name in ORDER if not args.only or name in args.only.split(",")]
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "gpus": torch.cuda.device_count(),
    }
    figures |= {"model": f"qwen3-{args.size} shape, random", "cuda": torch.version.cuda, "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        if args.left() > 0:
            write_model(Path(folder), args.size, args.positions)
        while names:
            alone = names[0] in APART or names[0] == "memory_fsdp"
            end = next((i for i, name in enumerate(names) if name in APART or name == "memory_fsdp"), len(names))
            group = names[: 1 if alone else end]
            names = names[len(group) :]
            if args.left() <= 0:
                found = {name: {"verdict": "skipped", "reason": "no time left"} for name in group}
            elif group[0] in APART:
                found = {group[0]: outcome(lambda check=APART[group[0]]: check(args))}
            else:
                found = run_apart(group, args)
            for name, one in found.items():
                print(f"{one['verdict']:<8}{name:<18}{one.get('reason', '')}", flush=True)
            figures["checks"] |= found
            Path(args.out).write_text(json.dumps({**common.provenance(), **figures}, indent=1, default=str) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
