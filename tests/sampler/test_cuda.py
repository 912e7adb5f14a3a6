"""The CUDA runner: its indices, paddings and borders on a CPU against a slow stand-in written from the contract of
torch.nn.attention.varlen (which has no CPU kernel), hidden synchronisations on fake tensors of cuda:0; the real
kernels and graphs where there is a GPU. What FlashAttention 2 takes and refuses is asked of it in tests/cuda_build."""

import copy
import dataclasses
import logging
import threading

import numpy as np
import pytest
import torch

from skyrl.algorithms.losses import compute_loss
from skyrl.models.attention_calls import layer_calls
from skyrl.models.decode_plan import make_decode_plan
from skyrl.models.forward import CausalLM
from skyrl.models.lora import Adapter, install
from skyrl.models.packed import collate
from skyrl.planner.device import VARLEN_RELEASE, torch_release
from skyrl.sampler import make
from skyrl.sampler.runners import cuda, sampling
from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, Sequence
from skyrl.sampler.runners.fused import FusedRunner
from skyrl.sampler.runners.paged import ModuleRunner
from skyrl.tracking import advisories
from skyrl.types import Datum, LoraSpec, LossSpec, SamplingParams
from tests.families import make_net
from tests.sampler.tools import adapter, merged, prompts, qwen3, reference_logprobs, requests, run, sampler


def flash(version=2, page=8, window=0, top_left=False, strange_heads=False, in_order=False, whole=False, scaled=True):
    """varlen_attn as FlashAttention 2 or 3 does it: pages of each sequence by block_table, queries aligned at the end
    of the keys. The other arguments are ways to do it wrong."""

    def attend(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
    ):
        if version == 2 and cu_seq_k is None:
            raise RuntimeError("cu_seqlens_q and cu_seqlens_k must be both set or both not set")
        if version == 3 and cu_seq_k is not None:
            raise RuntimeError("If cu_seqlens_k is passed in, then page table is not supported")
        if key.shape[1] % page:
            raise RuntimeError(f"Paged KV cache block size must be divisible by {page}")
        assert cu_seq_k is None or (cu_seq_k.dtype == torch.int32 and cu_seq_k.shape == cu_seq_q.shape)
        assert key.dim() == 4 and block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == torch.int32
        assert window_size == ((-1, -1) if max_q == 1 and window_size[0] < 0 else (window_size[0], 0))
        out = torch.empty_like(query)
        group = query.shape[1] // key.shape[2]
        assert enable_gqa or group == 1
        for s in range(len(seqused_k)):
            rows, count = slice(cu_seq_q[s], cu_seq_q[s + 1]), int(seqused_k[s])
            length = rows.stop - rows.start
            assert length <= max_q and count <= max_k
            table = torch.arange(len(block_table[s])) if in_order else block_table[s].long()
            count = len(table) * key.shape[1] if whole else count
            k, v = (x[table].flatten(0, 1)[:count] for x in (key, value))
            k, v = (x.repeat(1, group, 1) if strange_heads else x.repeat_interleave(group, 1) for x in (k, v))
            k, v, q = (x.double() if x.dtype == torch.float32 else x.float() for x in (k, v, query[rows]))
            scores = torch.einsum("qhc,khc->hqk", q, k) * (scale if scaled else q.shape[-1] ** -0.5)
            at = torch.arange(length)[:, None] + (0 if top_left else count - length)
            seen = torch.arange(count)[None] <= at
            if window_size[0] >= 0:
                seen &= torch.arange(count)[None] >= at - window_size[0] - window
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype).to(v.dtype)
            out[rows] = torch.einsum("hqk,khc->qhc", weights, v).to(out.dtype)
        return out

    return attend


def wanted_form(monkeypatch, model, **how):
    monkeypatch.setattr(cuda, "varlen", lambda: (flash(**how), {"block_table"}))
    cuda.kernel_refusal.cache_clear()
    return cuda.working_form(16, layer_calls(model), torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("how", "form"),
    [
        (dict(version=2, page=256), cuda.PagedKernel(256, key_borders=True)),
        (dict(version=3, page=1), cuda.PagedKernel(16, key_borders=False)),
        (dict(version=2, page=16), cuda.PagedKernel(16, key_borders=True)),
        (dict(version=3, page=256), cuda.PagedKernel(256, key_borders=False)),
    ],
)
def test_the_form_that_the_kernel_takes_is_found(monkeypatch, how, form):
    """FlashAttention 2 wants cu_seq_k and pages of 256, version 3 neither."""
    assert wanted_form(monkeypatch, qwen3(), **how) == form
    assert wanted_form(monkeypatch, CausalLM(make_net("mistral")), **how) == form


@pytest.mark.parametrize(
    "wrong",
    [dict(window=1), dict(window=-1), dict(top_left=True), dict(strange_heads=True), dict(in_order=True),
     dict(whole=True), dict(scaled=False)],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_a_kernel_that_is_wrong_is_refused(monkeypatch, wrong):
    """A window off by one, queries aligned at the start, other heads, pages out of order, keys that are not valid."""
    refusal = wanted_form(monkeypatch, CausalLM(make_net("gemma3")), page=1, **wrong)
    assert "is off by" in refusal and "pages of 16 tokens with cu_seq_k" in refusal and "pages of 256" in refusal


needs_varlen = pytest.mark.skipif(
    torch_release() < VARLEN_RELEASE, reason=f"torch {torch.__version__} has no variable-length attention"
)


@pytest.mark.parametrize(
    ("family", "dtype", "reason"),
    [
        pytest.param("gemma2", torch.bfloat16, "caps its attention", marks=needs_varlen),
        ("qwen3", torch.float32, "float32"),
    ],
)
def test_why_there_is_no_paged_attention(family, dtype, reason):
    calls = layer_calls(CausalLM(make_net(family)))
    assert reason in cuda.paged_kernel(16, calls, dtype, torch.device("cuda"))


def check(drawn, asked, models):
    """What was drawn has the log-probabilities of a plain float64 forward."""
    exact = {name: CausalLM(copy.deepcopy(model.net).double()) for name, model in models.items()}
    for request in asked:
        expected = reference_logprobs(exact[request.model], request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


@pytest.fixture
def stand_in(monkeypatch):
    """Samplers of this test run over a CudaRunner with pages of 8 tokens."""

    monkeypatch.setattr(cuda, "varlen", lambda: (flash(), {"block_table"}))
    monkeypatch.setattr(make, "paged_kernel", lambda wanted, *rest: cuda.PagedKernel(8, key_borders=True))
    monkeypatch.setattr(make, "_DISAGREEMENTS", {})
    monkeypatch.setattr(make, "unsupported_reason", lambda plan, cache: "off in this test")


@pytest.mark.parametrize("backend", ["module", "fused"])
def test_padded_batches_and_pages(stand_in, backend):
    model = qwen3()
    asked = requests(prompts(6), samples=3, max_tokens=15)  # 18 sequences: padded to 24, then fewer
    engine = sampler(model, backend=backend, kv_cache_gib=50 * 3 * 2 * 2 * 16 * 4 * 8 / 2**30)
    assert isinstance(engine._runner, cuda.CudaRunner) and engine.backend == backend
    engine._scheduler.max_prefill_tokens = 11
    drawn = run(engine, asked)
    assert engine.metrics()["sampler/preemptions:sum"] > 0 and len(engine._runner._buffers) > 1
    check(drawn, asked, {"": model})


@pytest.mark.parametrize("backend", ["module", "fused"])
def test_adapters_beside_padding(stand_in, backend):
    model = qwen3()
    adapters = {name: adapter(model, name) for name in "ab"}
    models = {"": model} | {name: merged(model, each) for name, each in adapters.items()}
    asked = [r for name in models for r in requests(prompts(3), samples=2, model=name, max_tokens=12)]
    engine = sampler(model, backend=backend, adapters=adapters)
    assert isinstance(engine._runner, cuda.CudaRunner)
    drawn = run(engine, asked)
    engine.forget_adapter("a")
    check(drawn, asked, models)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows(stand_in, family):
    model = CausalLM(make_net(family))
    asked = requests([np.arange(2, 30), np.arange(5, 9)], samples=2)
    check(run(sampler(model, backend="module"), asked), asked, {"": model})


def test_second_update_is_seen_in_place(stand_in):
    model = qwen3()
    engine = sampler(model, backend="fused")
    asked = requests(prompts(2))
    addresses = {tensor.data_ptr() for tensor in engine._runner._inner._qk_scale}
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        engine.refresh(version)
        check(run(engine, asked), asked, {"": model})
    assert addresses == {tensor.data_ptr() for tensor in engine._runner._inner._qk_scale}


class Recorded:
    """Stands in for a CUDA graph: `replay` does again what was done, over whatever lies at the same places now."""

    def __init__(self, step, pool):
        self.replay, self.pool = step, lambda: pool
        step()


@pytest.fixture
def recorded(stand_in, monkeypatch):
    """Decode steps are recorded, with `Recorded` for graphs. Returns the batch sizes at which recording breaks."""
    broken: set[int] = set()

    def on_side_stream(compute):
        out = compute()
        if len(out) in broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return out

    monkeypatch.setattr(cuda, "capture", Recorded)
    monkeypatch.setattr(cuda, "on_side_stream", on_side_stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    advisories.warn_fallback.cache_clear()
    return broken


def with_graphs(model, **changes):
    engine = sampler(model, **changes)
    engine._runner._use_graphs = True
    return engine


def fewer_and_fewer():
    """Sequences of several lengths: batches of several padded sizes."""
    each = zip(prompts(10), (3, 3, 3, 3, 3, 6, 6, 6, 6, 9), strict=True)
    return [
        dataclasses.replace(requests([tokens], max_tokens=length)[0], uid=str(i))
        for i, (tokens, length) in enumerate(each)
    ]


def warnings(caplog):
    """What was said of CUDA graphs."""
    assert all(record.levelno >= logging.WARNING for record in caplog.records)
    return [record.message for record in caplog.records if "CUDA graph" in record.message]


def test_all_graphs_write_one_buffer_of_logits(recorded, caplog):
    model = qwen3()
    engine = with_graphs(model, backend="fused", max_running=24)
    asked = fewer_and_fewer()
    check(run(engine, asked), asked, {"": model})
    runner = engine._runner
    assert len(runner._graphs) > 1 and all(runner._graphs.values())
    assert runner._logits_BV.shape == (24, model.vocab_size) and warnings(caplog) == []
    batch = DecodeInputs(np.array([3]), np.array([0]), np.array([[1]], dtype=np.int32))
    with torch.no_grad():
        assert runner.decode(batch).data_ptr() == runner._logits_BV.data_ptr()


def test_a_recording_that_breaks_costs_its_own_shape_only(recorded, caplog):
    model = qwen3()
    engine = with_graphs(model, backend="module", max_running=24)
    recorded.add(8)
    asked = fewer_and_fewer()
    check(run(engine, asked), asked, {"": model})
    graphs = engine._runner._graphs
    assert {size for (size, _), graph in graphs.items() if graph is None} == {8}
    assert any(graphs.values())
    (line,) = warnings(caplog)
    assert line.endswith("for batches of 8: operation not permitted when stream is capturing")


@pytest.mark.parametrize("backend", ["module", "fused"])
def test_one_adapter_is_recorded_and_filled_again_in_place(recorded, backend, caplog):
    """A trained adapter that changes in place, a frozen one that replaces it, one of another rank: the graphs read
    the same places, and are recorded anew for the other rank alone."""
    model, first, second = qwen3(), *(adapter(qwen3(), name) for name in "ab")
    other = adapter(model, "c", rank=2, alpha=4.0)
    adapters = {"a": first, "b": second, "c": other}
    engine = with_graphs(model, backend=backend, adapters=adapters)
    runner = engine._runner

    def sampled(name):
        asked = requests(prompts(2), model=name, max_tokens=5)
        check(run(engine, asked), asked, {name: merged(model, adapters[name])})
        return len(runner._graphs)

    count = sampled("a")
    (copy,) = (each.adapter for each in runner._copies.values())
    places = [tensor.data_ptr() for tensor in copy.weights().values()]
    if backend == "fused":
        places += [
            t.data_ptr()
            for linear in runner._inner._linears()
            for _, *kept in linear._pairs[id(copy)]
            for t in kept
            if torch.is_tensor(t)
        ]
    with torch.no_grad():
        for _, up in first.pairs.values():
            up.mul_(-1.5)
    engine.forget_adapter("a")  # as an engine does whose adapter was trained further
    assert sampled("a") == sampled("b") == sampled("a") == count and warnings(caplog) == []
    assert places == [tensor.data_ptr() for tensor in copy.weights().values()]
    assert sampled("c") > count and len(runner._copies) == 2
    asked = [r for name in ("", "a", "b") for r in requests(prompts(1), model=name, max_tokens=4)]
    check(run(engine, asked), asked, {"": model, "a": merged(model, first), "b": merged(model, second)})
    (line,) = warnings(caplog)
    assert "several adapters" in line


@pytest.mark.parametrize("backend", ["module", "fused"])
def test_copies_and_graphs_of_adapters_are_bounded(recorded, backend, caplog):
    """Tenants with adapters of many shapes: the least recently used shape goes, with its graphs and what was joined."""
    model = qwen3()
    adapters = {f"r{rank}": adapter(model, f"r{rank}", rank=rank) for rank in range(1, cuda.MAX_COPIES + 3)}
    engine = with_graphs(model, backend=backend, adapters=adapters)
    runner = engine._runner

    def sampled(name):
        asked = requests(prompts(2), model=name, max_tokens=4)
        check(run(engine, asked), asked, {name: merged(model, adapters[name]) if name else model})

    sampled("")
    base, kept = dict(runner._graphs), []
    for name in [*adapters, "r3", "r1", "r6", "r4", "r3"]:
        sampled(name)
        kept = [*(each for each in kept if each != name), name][-cuda.MAX_COPIES :]
        assert [copy.source for copy in runner._copies.values()] == [adapters[each] for each in kept]
    ids = {id(copy.adapter) for copy in runner._copies.values()}
    assert {key[1] for key in runner._graphs} == ids | {0} and base.items() <= runner._graphs.items()
    for name in list(adapters):
        engine.forget_adapter(name)
    if backend == "fused":
        assert set(runner._inner._adapters) == ids
        assert all(set(linear._pairs) <= ids for linear in runner._inner._linears())
    (line,) = warnings(caplog)
    assert line.endswith("others are recorded again")


def test_a_pool_whose_graphs_are_gone_is_not_used_again(recorded, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_COPIES", 1)
    model = qwen3()
    adapters = {f"r{rank}": adapter(model, f"r{rank}", rank=rank) for rank in (1, 2)}
    engine, pools = with_graphs(model, adapters=adapters), []
    for name in ("r1", "r2", "", "r1"):
        run(engine, requests(prompts(2), model=name, max_tokens=4))
        pools.append(engine._runner._pool)
    assert pools[0] is not pools[1] is pools[2] is pools[3]


def test_a_torch_without_block_tables_is_told(monkeypatch):
    """On 2.13 the paged arguments are there; where they are not, that is the reason."""
    assert torch_release() < (2, 13) or "block_table" in cuda.varlen()[1]
    monkeypatch.setattr(cuda, "varlen", lambda: (flash(), {"scale"}))
    refusal = cuda.paged_kernel(16, layer_calls(qwen3()), torch.bfloat16, torch.device("cuda"))
    assert "takes no block table" in refusal


@pytest.fixture
def meta_is_cuda(monkeypatch):
    """Tensors on the meta device say that they are CUDA's, so that the branches of a GPU are taken. To read a number
    of theirs (_local_scalar_dense), which would wait for the device, is an error."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type in ("cuda", "meta")))


FAMILIES = ["qwen3", "qwen2", "llama3", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "granite", "cohere", "gpt2",
            "gpt_bigcode", "opt", "qwen3_moe", "mixtral"]  # fmt: skip


def on_meta(family):
    model = CausalLM(make_net(family)).to(torch.bfloat16)
    calls = layer_calls(model)
    model._apply(lambda tensor: tensor.to("meta"))
    model.net.tie_weights()
    return model, calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_never_waits_for_the_device(family, meta_is_cuda):
    if family in ("qwen3_moe", "mixtral") and not hasattr(torch, "_grouped_mm"):
        pytest.skip(
            f"torch {torch.__version__} has no grouped product: transformers reads how many tokens experts have"
        )
    model, _ = on_meta(family)
    rows = [Datum(np.arange(n), np.arange(n), np.ones(n, np.float32), advantages=np.ones(n), name=str(n),
                  old_logprobs=-np.ones(n)) for n in (9, 17, 30)]  # fmt: skip
    batch = collate(rows, torch.float32, "meta")
    out = model(batch, temperature=1.0, entropy=True)
    loss_T, _ = compute_loss(out, batch, LossSpec("ppo"))
    (loss_T * batch.weights_T).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@needs_varlen
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_never_waits_for_the_device(family, with_adapter, meta_is_cuda):
    """Prefill, decode and draw."""
    model, calls = on_meta(family)
    paged = calls[0].softcap is None  # else it attends with gathered keys
    device, params = torch.device("meta"), [SamplingParams(1, temperature=t, top_k=k) for t, k in ((1, 0), (0.5, 3))]
    cache = KVCache([call.shape for call in calls], 8, 256, torch.bfloat16, device, tokens_first=paged)
    plan, one = make_decode_plan(model, calls, 128), None
    if with_adapter:
        install(model)
        one = Adapter(
            model,
            LoraSpec(rank=4, mlp="moe" not in family and family != "mixtral"),
            name="a",
            dtype=torch.bfloat16,
            device=device,
        )
    for inner in (ModuleRunner(model, cache), *([] if isinstance(plan, str) else [FusedRunner(plan, cache)])):
        form = cuda.PagedKernel(256, key_borders=True)
        runner = inner
        if paged:
            runner = cuda.CudaRunner(inner, form, cache, max_length=128, max_running=8, graphs=False)
        each = [Sequence(i, "", p, np.arange(9), 8, 8, np.zeros(1), adapter=one if i else None, blocks=[i + 1])
                for i, p in enumerate(params)]  # fmt: skip
        segments = [(0, 1, None), (1, 2, one)] if one else None
        batch = DecodeInputs(np.array([1, 2]), np.array([8, 8]), np.array([[1], [2]], dtype=np.int32), segments)
        rules = sampling.BatchSamplingParams.of(params, model.vocab_size, device)
        with torch.no_grad():
            for logits in (runner.prefill([PrefillChunk(s, 0, 8) for s in each]), runner.decode(batch)):
                tokens, logprobs = runner.sample(logits, rules, torch.zeros(2, dtype=torch.float64, device=device))
                assert logits.shape == (2, model.vocab_size) and tokens.shape == logprobs.shape == (2,)


def for_a_gpu(dtype=torch.bfloat16, **changes):
    return qwen3(dtype=dtype, hidden_size=256, head_dim=64, **changes)


def gap(drawn, asked, models):
    """Root of the mean square of log-probabilities less those of a float32 model."""
    gaps = [drawn[r.uid].logprobs - reference_logprobs(models[r.model], r.tokens, drawn[r.uid].tokens) for r in asked]
    return np.sqrt(np.mean(np.concatenate(gaps) ** 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["module", "fused"])
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(backend, graphs, caplog):
    """Paged attention and graphs are what runs, and nothing is said of a fallback. The second time other threads use
    the device while graphs are recorded."""
    exact = for_a_gpu().to(torch.float32)
    engine = sampler(for_a_gpu().cuda(), backend=backend, cuda_graphs=graphs)
    assert isinstance(engine._runner, cuda.CudaRunner) and engine.backend == backend
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            torch.ones(1 << 16, device="cuda").sum().item()

    for samples in (3, 5):
        asked = requests(prompts(9), samples=samples)
        assert gap(run(engine, asked), asked, {"": exact}) < 0.2
        if samples == 3:
            thread = threading.Thread(target=busy)
            thread.start()
    stop.set()
    thread.join()
    recorded = engine._runner._graphs
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in recorded.values())
    assert len(recorded) > 2 if graphs else not recorded
    assert [r.message for r in caplog.records if r.name.startswith("skyrl")] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["module", "fused"])
def test_adapters_on_a_gpu(backend):
    """One adapter at a time is replayed, also after it has changed; several together run call by call."""
    exact, model = for_a_gpu().to(torch.float32), for_a_gpu().cuda()
    plain = {name: adapter(exact, name, size=0.02) for name in "ab"}
    adapters = {name: Adapter(model, each.spec, name=name, dtype=torch.bfloat16, device="cuda",
                              weights=each.weights()) for name, each in plain.items()}  # fmt: skip
    engine = sampler(model, backend=backend, adapters=adapters)
    models = {name: merged(exact, each) for name, each in plain.items()}
    for name in "aba":
        asked = requests(prompts(4), model=name)
        assert gap(run(engine, asked), asked, models) < 0.2
    graphs = dict(engine._runner._graphs)
    assert graphs and all(isinstance(graph, torch.cuda.CUDAGraph) for graph in graphs.values())
    with torch.no_grad():
        for each in (plain["a"], adapters["a"]):
            for _, up in each.pairs.values():
                up.mul_(-1)
    engine.forget_adapter("a")
    asked = requests(prompts(4), model="a")
    assert gap(run(engine, asked), asked, {"a": merged(exact, plain["a"])}) < 0.2
    assert engine._runner._graphs == graphs
    asked = [r for name in "ab" for r in requests(prompts(4), model=name)]
    assert gap(run(engine, asked), asked, {"a": merged(exact, plain["a"]), "b": models["b"]}) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_windows_on_a_gpu():
    """The kernel itself passes the probe for windows; gathered attention in float32 agrees."""
    calls = layer_calls(CausalLM(make_net("gemma3")))
    assert isinstance(cuda.paged_kernel(16, calls, torch.bfloat16, torch.device("cuda", 0)), cuda.PagedKernel)
    model = CausalLM(make_net("mistral", std=0.1)).cuda()
    asked = requests([np.arange(2, 30), np.arange(5, 9)], samples=2)
    drawn = run(sampler(model, backend="module"), asked)
    assert gap(drawn, asked, {"": CausalLM(make_net("mistral", std=0.1))}) < 1e-3
