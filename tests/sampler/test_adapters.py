"""Sampling with LoRA adapters: against merged weights, many at once, bit for bit; prefixes, names, forgetting."""

import numpy as np
import pytest
import torch
import transformers as tf

from skyrl.models.forward import CausalLM
from skyrl.sampler.runners import cpu_kernels
from skyrl.sampler.runners.cpu_kernels import library
from skyrl.types import SampleRequest, SamplingParams, UserError
from tests.families import make_net
from tests.sampler.tools import adapter, check_pool, merged, prompts, qwen3, reference_logprobs, requests, run, sampler

needs_kernels = pytest.mark.skipif(bool(library()[1]), reason=library()[1])
SIZES = dict(
    vocab_size=101, hidden_size=144, intermediate_size=112, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
PARTS = {"all": {}, "attn": dict(mlp=False, unembed=False), "mlp": dict(attn=False, unembed=False),
         "unembed": dict(attn=False, mlp=False)}  # fmt: skip


def llama(dtype=torch.float32, **changes) -> CausalLM:
    """Biases everywhere, a head of its own, channels that do not fill panels."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **changes)
    net = tf.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    return CausalLM(net).to(dtype)


MODELS = {"qwen3": qwen3, "llama": llama}


@pytest.fixture(params=["module", "fused", pytest.param("kernels", marks=needs_kernels)])
def backend(request, monkeypatch):
    """Name of the backend to ask for; each of the three paths runs."""
    if request.param == "fused":
        monkeypatch.setattr("skyrl.sampler.make.unsupported_reason", lambda plan, cache: "off in this test")
    name = "module" if request.param == "module" else "fused"
    assert sampler(qwen3(), backend=name, adapters={}).backend == request.param
    return name


def several(model: CausalLM, names="abcd", **spec) -> dict:
    """Adapters of different ranks and parts."""
    ranks = [4, 1, 16, 33]
    return {
        name: adapter(model, name, rank=ranks[i % 4], alpha=2.0 * ranks[i % 4], **(list(PARTS.values())[i % 4] | spec))
        for i, name in enumerate(names)
    }


def mixed(names, count=4, samples=2, **params) -> list[SampleRequest]:
    """The same prompts for every name, in turns."""
    each = [requests(prompts(count, low=10), samples, model=name, **params) for name in names]
    return [request for together in zip(*each, strict=True) for request in together]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("parts", PARTS)
def test_equals_a_model_with_merged_weights(backend, kind, parts):
    model = MODELS[kind]()
    adapters = {"one": adapter(model, "one", **PARTS[parts])}
    exact = merged(model, adapters["one"])
    asked = requests(prompts(3), model="one", temperature=0.0)
    asked += [SampleRequest(f"t{r.uid}", r.tokens, SamplingParams(15, 0.8, seed=5), "one") for r in asked]
    drawn = run(sampler(model, backend=backend, adapters=adapters), asked)
    plain = [SampleRequest(r.uid, r.tokens, r.params) for r in asked]
    theirs = run(sampler(exact, backend="module"), plain)
    base = run(sampler(model, backend=backend, adapters=adapters), plain)
    for request in asked:
        sample, heat = drawn[request.uid], request.params.temperature or 1.0
        assert sample.tokens.tolist() == theirs[request.uid].tokens.tolist()
        expected = reference_logprobs(exact, request.tokens, sample.tokens, heat)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, rtol=0)
        other = reference_logprobs(model, request.tokens, sample.tokens, heat)
        assert np.abs(sample.logprobs - other).max() > 1e-2  # it does something, and leaves the base alone
        expected = reference_logprobs(model, request.tokens, base[request.uid].tokens, heat)
        np.testing.assert_allclose(base[request.uid].logprobs, expected, atol=1e-5, rtol=0)


def test_some_products_of_a_group_only(backend):
    """Of queries, keys and values the values alone; of gate and up the up alone."""
    model = llama()
    made = adapter(model, "one", rank=5)
    for path in list(made.pairs):
        if not path.endswith(("v_proj", "up_proj")):
            del made.pairs[path]
    made.head, exact = None, merged(model, made)
    assert len(made.pairs) == 4
    asked = requests(prompts(3), model="one")
    drawn = run(sampler(model, backend=backend, adapters={"one": made}), asked)
    for request in asked:
        expected = reference_logprobs(exact, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


def test_an_adapter_of_something_else_is_an_error():
    model = qwen3()
    made = adapter(model, "one")
    made.pairs["model.somewhere"] = made.pairs["lm_head"]
    engine = sampler(model, backend="fused", adapters={"one": made})
    engine.add(requests(prompts(1), model="one")[0])
    with pytest.raises(RuntimeError, match="adapter 'one' changes model.somewhere"):
        engine.step()


def test_several_adapters_in_one_batch(backend):
    """Arrivals one after the other, so that every step holds a mixture; a cache that is too small."""
    model = llama()
    adapters = several(model)
    models = {"": model} | {name: merged(model, each) for name, each in adapters.items()}
    asked = mixed(models, count=2)
    block = 2 * 2 * 2 * 32 * 4 * 16 / 2**30
    engine = sampler(model, backend=backend, adapters=adapters, kv_cache_gib=14 * block)
    engine._scheduler.max_prefill_tokens = 50
    drawn = run(engine, asked)
    assert engine.metrics()["sampler/preemptions:sum"] > 0
    for request in asked:
        expected = reference_logprobs(models[request.model], request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_of_tenants_equals_each_alone_bit_for_bit(kind, dtype, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LONGEST_PREFILL", 20)  # must not matter here
    model = MODELS[kind](dtype=dtype)
    adapters = several(model)
    names = ["", *adapters]
    cuts = {"a": dict(top_p=0.9), "c": dict(top_k=20, temperature=0.7)}
    asked = [
        SampleRequest(r.uid, r.tokens, SamplingParams(12, seed=r.params.seed, **cuts.get(r.model, {})), r.model)
        for r in mixed(names, count=3)
    ]
    alone = {}
    for name in names:
        some = [r for r in asked if r.model == name]
        alone |= run(sampler(model, backend="fused", adapters=adapters if name else {}), some)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        others = [
            run(sampler(model, backend="fused", adapters=adapters), asked),
            run(sampler(model, backend="fused", adapters=adapters, prefix_cache=False, max_running=7), asked[::-1]),
            run(sampler(model, backend="fused", adapters=adapters, block_tokens=5, kv_cache_gib=1e-3), asked),
        ]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        for uid, sample in alone.items():
            assert sample.tokens.tobytes() == other[uid].tokens.tobytes(), uid
            assert sample.logprobs.tobytes() == other[uid].logprobs.tobytes(), uid


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_fresh_adapter_is_the_base_bit_for_bit(kind, dtype):
    model = MODELS[kind](dtype=dtype)
    adapters = {"new": adapter(model, "new", size=0.0, rank=7), "other": adapter(model, "other")}
    drawn = run(sampler(model, backend="fused", adapters=adapters), mixed(["", "new", "other"]))
    plain = run(sampler(model, backend="fused"), mixed([""]))
    for uid, sample in plain.items():
        for name in ("", "new:"):
            assert sample.tokens.tobytes() == drawn[name + uid].tokens.tobytes()
            assert sample.logprobs.tobytes() == drawn[name + uid].logprobs.tobytes()
        assert sample.logprobs.tobytes() != drawn["other:" + uid].logprobs.tobytes()


def test_in_bfloat16_as_close_to_float32_as_the_module(backend):
    model = llama(torch.bfloat16)
    adapters = several(model)
    exact = {name: merged(CausalLM(llama(torch.bfloat16).net.float()), each.float()) for name, each in
             several(llama(torch.bfloat16)).items()}  # fmt: skip
    asked = mixed(adapters)

    def error(name):
        drawn = run(sampler(model, backend=name, adapters=adapters), asked)
        gaps = [
            drawn[r.uid].logprobs - reference_logprobs(exact[r.model], r.tokens, drawn[r.uid].tokens) for r in asked
        ]
        return np.sqrt(np.mean(np.concatenate(gaps) ** 2))

    theirs = error("module")
    assert theirs > 1e-3 and error(backend) < 1.25 * theirs


@pytest.mark.parametrize("family", ["gemma2", "mistral", "granite", "qwen3_moe", "qwen3_5"])
def test_families_without_a_plan(family):
    """Windows, soft caps, scaled logits, experts: the module path."""
    model = CausalLM(make_net(family))
    made = adapter(model, "one", size=0.2, mlp=family != "qwen3_moe")
    exact = merged(model, made)
    asked = requests([np.arange(2, 30), np.arange(5, 9)], samples=2, model="one") + requests([np.arange(2, 30)])
    drawn = run(sampler(model, adapters={"one": made}), asked)
    for request in asked:
        reference = exact if request.model else model
        expected = reference_logprobs(reference, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=2e-5, rtol=0)


def test_prefixes_are_shared_within_an_adapter_only(backend):
    model = qwen3()
    adapters = several(model, "ab")
    engine = sampler(model, backend=backend, adapters=adapters)
    context = np.arange(1, 38)
    run(engine, [r for name in ("", "a", "b") for r in requests([context], model=name, max_tokens=4)])
    metrics = engine.metrics()
    assert metrics["sampler/prefill_tokens:sum"] == 3 * 37 and metrics["sampler/reused_tokens:sum"] == 0
    for name in ("", "a", "b"):  # and each finds its own again, siblings too
        drawn = run(engine, requests([context], samples=2, model=name, max_tokens=4))
        assert engine.metrics()["sampler/reused_tokens:sum"] == 32 + 37
        exact = merged(model, adapters[name]) if name else model
        for sample in drawn.values():
            expected = reference_logprobs(exact, context, sample.tokens)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, rtol=0)


def test_a_name_published_again_is_another_adapter(backend):
    model = qwen3()
    adapters = {"now": adapter(model, "first")}
    engine = sampler(model, backend=backend, adapters=adapters)
    asked = requests(prompts(2, low=20), model="now")
    run(engine, asked)
    adapters["now"] = adapter(model, "second")
    engine.metrics()
    drawn = run(engine, asked)
    assert engine.metrics()["sampler/reused_tokens:sum"] == 0
    exact = merged(model, adapters["now"])
    for request in asked:
        expected = reference_logprobs(exact, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


def test_forgotten_adapters_leave_nothing(backend):
    """Changed in place between: only a sampler that kept nothing gives the new values."""
    model = qwen3()
    adapters = several(model, "ab")
    engine = sampler(model, backend=backend, adapters=adapters)
    asked = requests(prompts(2, low=20), model="a")
    run(engine, asked + requests(prompts(2, low=20), model="b"))
    with torch.no_grad():
        for _, up in adapters["a"].pairs.values():
            up.mul_(-1.5)
    engine.forget_adapter("a")
    engine.forget_adapter("never used")
    engine.metrics()
    drawn = run(engine, asked)
    assert engine.metrics()["sampler/reused_tokens:sum"] == 0
    exact = merged(model, adapters["a"])
    for request in asked:
        expected = reference_logprobs(exact, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)
    run(engine, requests(prompts(2, low=20), model="b"))
    assert engine.metrics()["sampler/reused_tokens:sum"] > 0  # the other kept its own
    engine.forget_adapter("a")
    engine.forget_adapter("b")
    pool = engine._scheduler.pool
    check_pool(pool)
    assert not pool._content and len(pool._free) == pool.num_blocks


def test_not_forgotten_while_used():
    model = qwen3()
    engine = sampler(model, adapters=several(model, "ab"))
    engine.add(requests(prompts(1), model="a")[0])
    with pytest.raises(RuntimeError, match="adapter 'a' has 1 unfinished requests"):
        engine.forget_adapter("a")
    engine.forget_adapter("b")
    assert engine.cancel("a:0/0")
    engine.forget_adapter("a")


def test_unknown_names_are_refused():
    model = qwen3()
    engine = sampler(model, adapters=several(model, "ab"))
    with pytest.raises(UserError, match=r"request c:0/0: model='c' is not known; .*'policy'.*now: a, b"):
        engine.add(requests(prompts(1), model="c")[0])
    with pytest.raises(UserError, match="now: none"):
        sampler(model).add(requests(prompts(1), model="c")[0])
    engine.add(requests(prompts(1), model="policy")[0])
    assert engine.unfinished() == 1


def test_refresh_also_drops_what_adapters_cached(backend):
    model = qwen3(seed=4)
    adapters = several(model, "a")
    engine = sampler(model, backend=backend, adapters=adapters)
    asked = requests(prompts(2, low=20), model="a")
    run(engine, asked)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.03)
    engine.refresh(1)
    drawn = run(engine, asked)
    exact = merged(model, adapters["a"])
    for request in asked:
        expected = reference_logprobs(exact, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


def test_an_adapter_that_is_not_finite_ends_its_own_requests_only(backend):
    """Its blocks are used again at once by the others: a cache that is hardly enough, and a window of neighbours."""
    model = qwen3()
    adapters = several(model, "ab")
    with torch.no_grad():
        adapters["a"].pairs["model.layers.1.self_attn.v_proj"][1][3] = float("nan")
    asked = mixed(["", "a", "b"], count=6)
    block = 3 * 2 * 2 * 16 * 4 * 16 / 2**30
    engine = sampler(model, backend=backend, adapters=adapters, kv_cache_gib=13 * block)
    engine._scheduler.max_prefill_tokens = 30
    drawn = run(engine, asked)
    models = {"": model, "b": merged(model, adapters["b"])}
    for request in asked:
        sample = drawn[request.uid]
        if request.model == "a":
            assert sample.stop == "aborted" and len(sample.tokens) == len(sample.logprobs) == 0
        else:
            expected = reference_logprobs(models[request.model], request.tokens, sample.tokens)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, rtol=0)
    caches = [*engine._cache.keys, *engine._cache.values]
    assert all(torch.isfinite(cache).all() for cache in caches)
