"""The checks of gpu_smoke.py that one process makes on one engine: right numbers, memory, speed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import GIB, GPU

from skyrl.config.load import load_config
from skyrl.distributed.init import World, init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.models.attention import AttentionOptions
from skyrl.models.packed import PackedAttention
from skyrl.planner.memory import BYTES, ModelSizes
from skyrl.planner.plan import Plan, describe_peak, make_plan, model_sizes
from skyrl.sampler import make
from skyrl.tracking.flops import ModelShape, causal_attended, peak_flops, train_flops
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Sample, SampleRequest, SamplingParams

GAP_LIMIT = 0.05  # mean absolute difference of log-probabilities, sampler against trainer, in bfloat16
GAP_RATIO = 2.0  # of that of paged attention to that of gathered attention, which rounds alike
GRADIENT_LIMIT = 0.02  # of attention in bfloat16 against float32: norm of the difference over the norm
GROWTH_LIMIT = 1.02  # of what is allocated after a step against the step before
PLAN_LIMIT = 1.1  # of the peak of memory against the plan's
# Each waits once for the tokens of a step; an update for its outputs, losses, metrics, their finiteness and the norm.
MOST_WAITS = {"decode_20_steps": 24, "update": 8}


class Failed(Exception):
    """A check that ran to its end and found something wrong; `figures` are kept."""

    def __init__(self, reason: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.figures = figures or {}


class Skipped(Failed):
    """A check that says nothing on this machine, or not all, with the reason."""


class Setup:
    """A model in an engine, made once for all checks of one process."""

    def __init__(self, args: Namespace, strategy: str = "single") -> None:
        self.args, self.lines = args, _Lines()
        logging.getLogger("skyrl").addHandler(self.lines)
        self.options = [
            "env.options={}",
            f"model.path={args.folder}",
            f"model.activation_checkpointing={str(args.checkpointing).lower()}",
            f"strategy.name={strategy}",
            f"batch.max_tokens_per_microbatch={args.packed}",
            f"batch.max_row_tokens={args.positions}",
            f"sampler.max_running={args.requests}",
            f"sampler.max_new_tokens={args.lengths[1]}",  # so that the plan's cache holds all requests at once
        ]
        self.cfg = load_config(self.options)
        self.world: World = init_distributed(self.cfg)
        self.sizes: ModelSizes = model_sizes(self.cfg)
        self.plan: Plan = make_plan(self.cfg, self.world.size, model_sizes=self.sizes, device=self.world.choice)
        self.engine = self._make_engine()
        self.engine.create("policy", ModelSpec())

    @property
    def is_fast(self) -> bool:
        """Whether this device computes in bfloat16, and so by FlashAttention, paged attention and graphs."""
        return GPU and self.plan.dtype == "bfloat16"

    def _make_engine(self, *overrides: str) -> Engine:
        cfg = load_config([*self.options, *overrides])
        return Engine(
            cfg,
            self.world,
            max_row_tokens=self.args.positions,
            dtype=self.plan.dtype,
            strategy=self.plan.strategy,
            memory=self.plan.memory,
        )

    def another(self, *overrides: str) -> Engine:
        """An engine without models, from the same options and these; it finds the memory of the first one's cache."""
        self.engine.models["policy"].free_sampling()
        return self._make_engine(*overrides)

    def frozen(self, *overrides: str) -> Engine:
        """Another engine with the same weights, to sample from and to score with."""
        engine = self.another(*overrides)
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

    def microbatches(self, count: int) -> list[Datum]:
        """Rows that fill so many micro-batches."""
        length = min(512, self.args.packed)
        return self.rows(count * self.args.packed // length, length)

    def train(self, rows: list[Datum]) -> None:
        """One update."""
        self.engine.forward_backward(rows, LossSpec("importance_sampling"), model="policy")
        self.engine.optim_step("policy", AdamParams(1e-6))


class _Lines(logging.Handler):
    """Keeps warnings: why a fast path was not taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
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


def gap_of(engine: Engine, requests: list[SampleRequest], drawn: dict[str, Sample], model: str = "policy") -> float:
    """Mean absolute difference of the log-probabilities of the drawn tokens, sampler against trainer."""
    rows = []
    for request in requests:
        ids = np.concatenate([request.tokens, drawn[request.uid].tokens])
        rows.append(Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1, np.float32)))
    scored = engine.score(rows, 1.0, model=model).logprobs
    pairs = zip(requests, scored, strict=True)
    return float(np.concatenate([np.abs(row[len(r.tokens) - 1 :] - drawn[r.uid].logprobs) for r, row in pairs]).mean())


def equal_part(one: dict[str, Sample], other: dict[str, Sample]) -> float:
    """The part of tokens that two draws of the same requests have in common, place by place."""
    pairs = [zip(one[uid].tokens, other[uid].tokens, strict=False) for uid in one]
    return float(np.mean([a == b for pair in pairs for a, b in pair]))


def graphs_of(sampler: Any) -> dict[str, int]:
    """CUDA graphs that the sampler has captured, and shapes of which it could not."""
    graphs = list(getattr(sampler._runner, "_graphs", {}).values())
    return {"captured": len(graphs) - graphs.count(None), "refused": graphs.count(None)}


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
    figures: dict[str, Any] = {"runner": type(sampler._runner).__name__, "warnings": setup.lines.seen[-8:]}
    figures["gap_mean"] = gap_of(setup.engine, requests, drawn)
    del sampler  # and its cache
    with gathered_attention():
        engine = setup.frozen()
        other, _, sampler = draw(engine, requests)
    figures["gathered_runner"] = type(sampler._runner).__name__
    figures["gathered_gap_mean"] = gap_of(engine, requests, other)
    figures["equal_tokens"] = equal_part(drawn, other)
    limit = min(GAP_LIMIT, GAP_RATIO * figures["gathered_gap_mean"] + 1e-3)
    if figures["gathered_gap_mean"] > GAP_LIMIT or figures["gap_mean"] > limit:
        raise Failed("log-probabilities differ from the trainer's", figures)
    if not setup.is_fast:
        where = f"a GPU that computes in {setup.plan.dtype}" if GPU else "a CPU"
        raise Skipped(f"no paged attention on {where}; gathered attention agrees with the trainer", figures)
    if figures["runner"] != "CudaRunner":
        raise Failed(f"the paged kernel was not taken: {' | '.join(figures['warnings'])}", figures)
    return figures


def graphs(setup: Setup) -> dict[str, Any]:
    """CUDA graphs are captured, and what they draw is what the same steps draw call by call."""
    requests = setup.requests(16)
    drawn, _, sampler = draw(setup.engine, requests)
    figures: dict[str, Any] = graphs_of(sampler)
    del sampler
    engine = setup.frozen("sampler.cuda_graphs=false")
    other, _, eager = draw(engine, requests)
    for name, found in (("gap_mean", drawn), ("eager_gap_mean", other)):
        figures[name] = gap_of(setup.engine, requests, found)
    figures["equal_tokens"] = equal_part(drawn, other)
    if max(figures["gap_mean"], figures["eager_gap_mean"]) > GAP_LIMIT:
        raise Failed("what is drawn is not what the trainer says", figures)
    if not setup.is_fast:
        raise Skipped("graphs come with paged attention; twice the same without", figures)
    if not figures["captured"] or figures["refused"] or graphs_of(eager)["captured"]:
        raise Failed(f"not one graph for each shape: {' | '.join(setup.lines.seen[-4:])}", figures)
    return figures


def gap(setup: Setup) -> dict[str, Any]:
    """Log-probabilities of sampler and trainer, before and after an update."""
    requests, figures = setup.requests(32), {}
    for when in ("before", "after"):
        figures[when] = gap_of(setup.engine, requests, draw(setup.engine, requests)[0])
        setup.train(setup.microbatches(1))
    if max(figures.values()) > GAP_LIMIT:
        raise Failed("sampler and trainer disagree", figures)
    return figures


def gradients(setup: Setup) -> dict[str, Any]:
    """Attention of training with its gradients: in bfloat16 by the fast kernel, in float32 by matrix products."""
    lengths, device, figures = [700, 300, 64, 1], setup.world.device, {}
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    drawn = [torch.randn(heads, sum(lengths), 128).bfloat16() for heads in (16, 8, 8, 16)]
    for window in (None, 100):
        found = []
        for dtype in (torch.bfloat16, torch.float32):
            query, key, value, up = (one.to(device, dtype) for one in drawn)
            leaves = [leaf.requires_grad_() for leaf in (query, key, value)]
            out = PackedAttention(starts, lengths).attend(0, query, key, value, AttentionOptions(0.09, window))
            found.append([x.float() for x in (out, *torch.autograd.grad((out * up.transpose(0, 1)).sum(), leaves))])
        names = ("out", "query", "key", "value")
        for name, one, exact in zip(names, *found, strict=True):
            figures[f"{name}, window {window}"] = ((one - exact).norm() / exact.norm()).item()
    if max(figures.values()) > GRADIENT_LIMIT:
        raise Failed("attention in bfloat16 is not that in float32", figures)
    if not setup.is_fast:
        raise Skipped("no FlashAttention here; bfloat16 agrees with float32", figures)
    return figures


@contextlib.contextmanager
def counted_waits(into: dict[str, Any], name: str) -> Iterator[None]:
    """Synchronisations inside the block: all that CUDA tells of, by line; on a CPU those of reading one number."""
    operators = common.OperatorCounts()
    with warnings.catch_warnings(record=True) as told, contextlib.nullcontext() if GPU else operators:
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
    with counted_waits(figures, "update"):
        setup.train(rows)
    with setup.engine.sampling("policy") as sampler:
        for i in range(8):
            sampler.add(SampleRequest(str(i), np.arange(3, 19), SamplingParams(64, seed=i)))
        for _ in range(8):
            sampler.step()
        with counted_waits(figures, "decode_20_steps"):
            for _ in range(20):
                sampler.step()
        while sampler.unfinished():
            sampler.step()
    if wrong := [name for name, most in MOST_WAITS.items() if figures[name]["count"] > most]:
        raise Failed(f"the host waits more often than it must in {' and '.join(wrong)}", figures)
    return figures


def memory(setup: Setup) -> dict[str, Any]:
    """Memory and cache size by phase and step, against the plan: nothing grows, and a cache that is made anew after
    training is as large as the first one."""
    plan = setup.plan.memory
    assert plan is not None
    figures: dict[str, Any] = {"strategy": setup.plan.strategy, "ranks": setup.world.size, "steps": []}
    figures["planned"], rows = describe_peak(setup.plan), setup.microbatches(1)
    setup.engine.models["policy"].free_sampling()
    for number in range(4):
        step: dict[str, Any] = {}
        for phase in ("generation", "training"):
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            if phase == "generation":
                _, _, sampler = draw(setup.engine, setup.requests(16))
                step["cache_blocks"] = sampler._scheduler.pool.num_blocks
                cache = sum(tensor.nbytes for tensor in sampler._cache._own)
                del sampler
            else:
                setup.train(rows)
            step[phase] = _memory_now()
        if number == 1:
            setup.engine.models["policy"].free_sampling()
        figures["steps"].append(step)
    if not GPU:
        raise Skipped("no allocator to ask on a CPU; four steps ran", figures)
    blocks = [step["cache_blocks"] for step in figures["steps"]]
    held = [step["training"]["allocated_gib"] for step in figures["steps"]]
    peak = max(step[phase]["peak_gib"] for step in figures["steps"] for phase in ("generation", "training"))
    planned = max(plan.training, plan.beside_cache + cache) / GIB
    figures |= {"cache_gib": cache / GIB, "peak_gib": peak, "planned_gib": planned}
    if min(blocks) < 0.95 * max(blocks) or held[3] > held[2] * GROWTH_LIMIT or held[1] > held[0] * GROWTH_LIMIT:
        raise Failed(f"cache blocks by step {blocks}, GiB after training {[round(x, 2) for x in held]}", figures)
    if peak > PLAN_LIMIT * planned:
        raise Failed(f"the peak of {peak:.2f} GiB is above the plan's {planned:.2f}", figures)
    return figures


def _memory_now() -> dict[str, float]:
    if not GPU:
        return {}
    told = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    told |= {"peak": torch.cuda.max_memory_allocated(), "free": torch.cuda.mem_get_info()[0]}
    return {f"{name}_gib": value / GIB for name, value in told.items()}


def long_row(setup: Setup) -> dict[str, Any]:
    """One row of 8k tokens (1k on a CPU), forward and backward; the second time is timed."""
    rows = setup.rows(1, min(setup.args.positions, 8192 if GPU else 1024))
    for _ in range(2):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        start = sync()
        setup.train(rows)
        seconds = sync() - start
    return {"tokens": len(rows[0].tokens), "seconds": seconds, **_memory_now()}


def decoding(setup: Setup) -> dict[str, Any]:
    """Tokens per second with and without CUDA graphs, against the bandwidth's limit."""
    figures: dict[str, Any] = {"limit_tokens_per_second": decode_limit(setup)}
    for name in ("graphs", "eager"):
        engine = setup.engine if name == "graphs" else setup.frozen("sampler.cuda_graphs=false")
        for turn in ("first", "second"):  # the first one captures
            _, figures[f"{name}_{turn}_tokens_per_second"], sampler = draw(engine, setup.requests())
        figures |= {f"{name}_preemptions": sampler.metrics()["sampler/preemptions:sum"], name: graphs_of(sampler)}
        del sampler
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


def lora(setup: Setup) -> dict[str, Any]:
    """An adapter after an update: its log-probabilities, its graphs, its tokens per second against its base's."""
    engine, figures = setup.another(), dict[str, Any]()
    engine.create("base", ModelSpec(trainable=False))
    engine.create("adapter", ModelSpec(lora=LoraSpec(rank=16), base="base"))
    for _ in range(2):
        start = sync()
        engine.forward_backward(setup.rows(4, 128), LossSpec("importance_sampling"), model="adapter")
        engine.optim_step("adapter", AdamParams(1e-3))
        figures["update_seconds"] = sync() - start
    for name in ("base", "adapter"):
        requests = setup.requests(64, name)
        for turn in ("first", "second"):
            drawn, figures[f"{name}_{turn}_tokens_per_second"], sampler = draw(engine, requests, "adapter")
        figures[f"{name}_gap_mean"] = gap_of(engine, requests, drawn, name)
        figures[f"{name}_graphs"] = graphs_of(sampler)
    if max(figures["base_gap_mean"], figures["adapter_gap_mean"]) > GAP_LIMIT:
        raise Failed("what is drawn is not what the trainer says", figures)
    found = figures["adapter_graphs"]  # of both: the base's, and as many of the adapter's own
    if setup.is_fast and (found["refused"] or found["captured"] <= figures["base_graphs"]["captured"]):
        raise Failed(f"the adapter decodes without graphs: {' | '.join(setup.lines.seen[-4:])}", figures)
    return figures


def training(setup: Setup) -> dict[str, Any]:
    """Seconds and MFU of an update over four micro-batches, and of the hand-over to the first token after it."""
    rows, times = setup.microbatches(4), []
    for _ in range(setup.args.steps):
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
    sizes, seconds, length = setup.sizes, float(np.median(times[2:] or times)), len(rows[0].tokens)
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


OF_ONE_ENGINE = (paged, gap, graphs, gradients, synchronisations, memory, long_row, decoding, lora, training)
CHECKS: dict[str, Callable[[Setup], dict[str, Any]]] = {check.__name__: check for check in OF_ONE_ENGINE}
CHECKS["memory_fsdp"] = memory
