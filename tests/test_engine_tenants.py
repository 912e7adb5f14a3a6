"""LoRA tenants in the engine: each alone, together, published, parked, saved; on one rank and on several."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from gloo import run_ranks
from small import ADAM, SPEC, distance, make_rows, small_config

from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, RunError, UserError

A, B = LoraSpec(4, seed=1), LoraSpec(2, alpha=8.0, seed=2, mlp=False)
HEAD = LoraSpec(3, seed=3, mlp=False, attn=False)
CE = LossSpec("cross_entropy")
PLAIN = AdamParams(lr=1e-2)


def make_server(dtype="float64", *overrides, strategy="auto", tenants=(("a", A), ("b", B))):
    """An engine with a frozen base and tenants on it."""
    cfg = small_config(f"strategy.name={strategy}", f"model.dtype={dtype}", *overrides)
    world = init_distributed(cfg)
    if strategy == "auto":
        strategy = "single" if world.size == 1 else "ddp"
    engine = Engine(cfg, world, dtype=dtype, strategy=strategy, max_row_tokens=64)
    engine.create("base", ModelSpec(trainable=False))
    for name, lora in tenants:
        engine.create(name, ModelSpec(lora=lora, base="base"))
    return engine


def named(model, seed, count=6):
    rows = make_rows(seed, count)
    for row in rows:
        row.model = model
    return rows


def train(engine, model, seeds, **how):
    """A step for each seed; the state afterwards."""
    for seed in seeds:
        engine.forward_backward(named(model, seed), SPEC, model=model, **how)
        engine.optim_step(model, PLAIN)
    return engine.model_state(model)


def flat(state):
    return {f"{key}.{name}": t for key in ("weights", "exp_avg", "exp_avg_sq") for name, t in state[key].items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(flat(one)[k], t) for k, t in flat(other).items())


def gradient(engine, model):
    return engine.models[model].strategy._grad.clone()


# ---- learning


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_fresh_tenant_is_the_base_bit_for_bit_and_then_learns(dtype):
    engine = make_server(dtype)
    rows = make_rows()
    base, fresh = (engine.score(rows, 0.9, model=name).logprobs for name in ("base", "a"))
    assert all(np.array_equal(x, y) for x, y in zip(base, fresh, strict=True))
    before = [p.clone() for p in engine.models["base"].strategy.module.parameters()]
    nll = []
    for _ in range(6):
        nll.append(engine.forward_backward(rows, CE, model="a").metrics["loss:sum"])
        engine.optim_step("a", PLAIN)
    assert nll[-1] < 0.8 * nll[0]
    assert engine.version("a") == 6 and engine.version("b") == 0
    after = list(engine.models["base"].strategy.module.parameters())
    assert all(torch.equal(x, y) and y.grad is None for x, y in zip(before, after, strict=True))
    now = engine.score(rows, 0.9, model="base").logprobs
    assert all(np.array_equal(x, y) for x, y in zip(base, now, strict=True))


def test_tenants_in_turn_or_in_one_call_are_each_alone_bit_for_bit():
    want = {name: train(make_server("float32"), name, seeds) for name, seeds in (("a", (0, 1)), ("b", (5, 6)))}
    engine = make_server("float32")
    for seeds in ((0, 5), (1, 6)):
        for name, seed in zip("ab", seeds, strict=True):
            engine.forward_backward(named(name, seed), SPEC, model=name)
        for name in "ba":
            engine.optim_step(name, PLAIN)
    together = make_server("float32", tenants=(("b", B), ("c", HEAD), ("a", A)))
    for seeds in ((0, 5), (1, 6)):
        mine, others = named("a", seeds[0]), named("b", seeds[1])
        rows = [row for pair in zip(others, mine, strict=True) for row in pair]
        out = together.forward_backward(rows + named("c", 9), SPEC, model=None)
        alone = make_server("float32") if seeds[0] == 0 else None
        if alone is not None:
            one = alone.forward_backward(mine, SPEC, model="a")
            assert out.losses[1:12:2] == one.losses
            assert all(np.array_equal(x, y) for x, y in zip(out.logprobs[1:12:2], one.logprobs, strict=True))
        for name in "acb":
            together.optim_step(name, PLAIN)
    for name in "ab":
        assert same(want[name], engine.model_state(name)) and same(want[name], together.model_state(name))


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-12), ("float32", 1e-6)])
def test_tenants_in_one_microbatch_differ_by_rounding_only(dtype, limit):
    apart, mixed = make_server(dtype), make_server(dtype)
    for engine in (apart, mixed):  # B is not 0 any more
        for name, seed in (("a", 3), ("b", 4)):
            engine.forward_backward(named(name, seed), CE, model=name)
            engine.optim_step(name, PLAIN)
    rows = [row for pair in zip(named("a", 0), named("b", 1), strict=True) for row in pair]
    one = apart.forward_backward(rows, SPEC, model=None)
    other = mixed.forward_backward(rows, SPEC, model=None, mix=True)
    assert other.metrics["microbatches:max"] == 1 < one.metrics["microbatches:max"]
    np.testing.assert_allclose(one.losses, other.losses, rtol=0, atol=limit)
    for x, y in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(x, y, rtol=10 * limit)
    for name in "ab":
        x, y = gradient(apart, name), gradient(mixed, name)
        assert (x - y).norm() < limit * x.norm() and x.norm() > 0
        a, b = engine_weights(apart, name), engine_weights(mixed, name)
        assert distance(a, b) < limit


def engine_weights(engine, model):
    return engine.model_state(model, optimizer=False)["weights"]


def test_padded_rows_give_the_same_numbers():
    packed, padded = make_server(), make_server("float64", "batch.packing=false")
    for engine in (packed, padded):
        train(engine, "a", (0,))
        for mix in (False, True):
            engine.forward_backward(named("a", 1) + named("b", 2), SPEC, model=None, mix=mix)
    for name in "ab":
        x, y = gradient(packed, name), gradient(padded, name)
        assert (x - y).norm() < 1e-11 * x.norm()


def test_checkpointed_layers_give_the_same_gradients():
    plain, again = make_server(), make_server("float64", "model.activation_checkpointing=true")
    for engine in (plain, again):
        train(engine, "a", (0,))
        engine.forward_backward(named("a", 1) + named("b", 2), SPEC, model=None, mix=True)
    for name in "ab":
        assert (gradient(plain, name) - gradient(again, name)).norm() < 1e-12 * gradient(plain, name).norm()


# ---- losses of rows, targets, what is not finite


def test_losses_are_the_weighted_sums_of_each_row_in_any_microbatch():
    engine, many = make_server("float32"), make_server("float32", "batch.max_tokens_per_microbatch=1")
    rows = make_rows()
    one = engine.forward(rows, CE, model="a")
    want = [-float((p.astype(np.float64) * row.weights.astype(np.float32)).sum()) for p, row in
            zip(one.logprobs, rows, strict=True)]  # fmt: skip
    np.testing.assert_allclose(one.losses, want, rtol=1e-12)
    assert sum(one.losses) == pytest.approx(one.metrics["loss:sum"], rel=1e-6)
    np.testing.assert_allclose(many.forward(rows, CE, model="a").losses, one.losses, rtol=1e-6)
    assert engine.score(rows, 1.0, model="a").losses == []


def test_many_targets_equal_single_ones_summed():
    engine, other = make_server(), make_server()
    rng = np.random.default_rng(0)
    lengths, width = (7, 12, 3), (4, 1, 0)
    rows, singles = [], []
    for i, (n, k) in enumerate(zip(lengths, width, strict=True)):
        tokens = rng.integers(4, 90, n)
        targets, weights = rng.integers(4, 90, (n, k or 1)), rng.normal(size=(n, k or 1))
        rows.append(Datum(tokens, *((targets, weights) if k else (targets[:, 0], weights[:, 0])), name=f"row{i}"))
        singles += [Datum(tokens, targets[:, j].copy(), weights[:, j].copy()) for j in range(k or 1)]
    out, one = engine.forward_backward(rows, CE, model="a"), other.forward_backward(singles, CE, model="a")
    assert [x.shape for x in out.logprobs] == [(7, 4), (12, 1), (3,)]
    np.testing.assert_allclose(out.logprobs[0], np.stack(one.logprobs[:4], 1), rtol=1e-12)
    np.testing.assert_allclose(out.losses, [sum(one.losses[:4]), *one.losses[4:]], rtol=1e-11)
    assert (gradient(engine, "a") - gradient(other, "a")).norm() < 1e-12 * gradient(other, "a").norm()
    with pytest.raises(UserError, match=r"loss ppo: the rows have targets \[L, 4\]"):
        engine.forward_backward(rows, LossSpec("ppo"), model="a")


@pytest.mark.parametrize("mix", [False, True])
def test_what_is_not_finite_stays_with_its_tenant(mix):
    engine, clean = make_server("float32"), make_server("float32")
    good, bad = named("a", 0), named("b", 1)
    clean.forward_backward(good + bad, SPEC, model=None, mix=mix)
    bad[2].advantages[:] = np.nan
    bad[2].weights[:] = 1.0
    with pytest.raises(RunError, match="not finite"):
        make_server("float32").forward_backward(good + bad, SPEC, model=None)
    out = engine.forward_backward(good + bad, SPEC, model=None, mix=mix, strict=False)
    assert [np.isfinite(x) for x in out.losses] == [True] * 8 + [False] + [True] * 3
    assert torch.equal(gradient(engine, "a"), gradient(clean, "a")) and gradient(engine, "a").any()
    start = engine.model_state("b")
    with pytest.raises(RunError, match="gradient is not finite"):
        engine.optim_step("b", ADAM)
    engine.clear_gradient("b")
    assert same(start, engine.model_state("b")) and not gradient(engine, "b").any()
    assert engine.optim_step("b", PLAIN)["grad_norm:mean"] == 0.0
    assert engine.optim_step("a", PLAIN)["grad_norm:mean"] > 0.0


# ---- published, saved, parked, dropped


def test_a_published_adapter_does_not_change():
    engine = make_server("float32")
    train(engine, "a", (0,))
    engine.freeze_adapter("a@1", "a")
    rows = make_rows(7)
    then = engine.score(rows, 1.0, model="a@1").logprobs
    assert all(np.array_equal(x, y) for x, y in zip(then, engine.score(rows, 1.0, model="a").logprobs, strict=True))
    kept = copy.deepcopy(engine.adapters["a@1"].weights())
    train(engine, "a", (1, 2))
    engine.offload("a")
    engine.delete("a")
    assert all(torch.equal(t, kept[name]) for name, t in engine.adapters["a@1"].weights().items())
    assert engine.adapters["a@1"].name == "a@1" and engine.adapters["a@1"].spec == A
    now = engine.forward(rows, CE, model="a@1").logprobs
    assert all(np.array_equal(x, y) for x, y in zip(then, now, strict=True))
    engine.load_adapter("again", A, "base", kept)
    pairs = {path: tuple(t.detach() for t in pair) for path, pair in engine.adapters["a@1"].pairs.items()}
    engine.load_adapter("pairs", A, "base", pairs)
    for name in ("again", "pairs"):
        other = engine.score(rows, 1.0, model=name).logprobs
        assert all(np.array_equal(x, y) for x, y in zip(then, other, strict=True))
        assert not any(p.requires_grad for p in engine.adapters[name].parameters())
    with pytest.raises(UserError, match="model 'a@1' is frozen"):
        engine.forward_backward(rows, CE, model="a@1")
    with pytest.raises(UserError, match="'a@1' exists already"):
        engine.freeze_adapter("a@1", "b")
    engine.delete_adapter("a@1")
    with pytest.raises(UserError, match="no published adapter called 'a@1'; there are: again, pairs"):
        engine.delete_adapter("a@1")


def test_rows_of_tenants_adapters_and_the_base_are_scored_in_one_call():
    engine = make_server()
    train(engine, "a", (0,))
    engine.freeze_adapter("old", "a")
    train(engine, "a", (1,))
    rows = [row for name in ("old", "base", "a") for row in named(name, 3, 2)]
    for mix in (False, True):
        out = engine.forward(rows, CE, model=None, mix=mix).logprobs
        for i, name in enumerate(("old", "base", "a")):
            want = engine.score(rows[2 * i : 2 * i + 2], 1.0, model=name).logprobs
            for x, y in zip(out[2 * i : 2 * i + 2], want, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-12)
    assert np.abs(out[0] - out[4]).max() > 1e-3 < np.abs(out[0] - out[2]).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_tenant_goes_on_bit_for_bit(dtype):
    engine = make_server(dtype)
    kept = train(engine, "a", (0, 1))
    assert {t.dtype for t in kept["weights"].values()} == {torch.float32} and float(kept["step"]) == 2
    want = train(engine, "a", (2,))
    assert not same(kept, want)  # kept is a copy
    other = make_server(dtype, tenants=(("x", A), ("fresh", A)))
    other.forward_backward(make_rows(9), SPEC, model="x")  # dropped by the load
    other.load_model_state("x", kept)
    assert same(train(other, "x", (2,)), want)
    other.load_model_state("fresh", engine.model_state("a", optimizer=False), optimizer=False)
    got = other.model_state("fresh")
    assert float(got["step"]) == 0 and not any(t.any() for t in got["exp_avg"].values())
    assert all(torch.equal(t, want["weights"][name]) for name, t in got["weights"].items())
    other.load_model_state("x", kept, optimizer=False)  # moments of other weights are gone too
    assert not any(t.any() for t in other.model_state("x")["exp_avg_sq"].values())


def test_a_state_that_does_not_fit_is_refused():
    engine = make_server()
    state = engine.model_state("a")
    with pytest.raises(UserError, match=r"model 'b': weights .* is \[2, 32\] here and \[4, 32\]"):
        engine.load_model_state(
            "b", {**state, "weights": {k: state["weights"][k] for k in engine_weights(engine, "b")}}
        )
    with pytest.raises(UserError, match=r"lm_head.A is \[2, 32\] here and \[4, 32\] in the saved"):
        engine.load_model_state("b", state)
    more = {**state["weights"], "mlp.A": torch.zeros(1)}
    with pytest.raises(UserError, match=r"mlp.A is nothing here and \[1\]"):
        engine.load_model_state("a", {**state, "weights": more})
    with pytest.raises(UserError, match="has no exp_avg; load it without the optimizer"):
        engine.load_model_state("a", {"weights": state["weights"]})
    some = dict(list(state["weights"].items())[1:])
    with pytest.raises(UserError, match="adapter 'x': lacks .*q_proj.A"):
        engine.load_adapter("x", A, "base", some)
    with pytest.raises(UserError, match=r"adapter 'x': .* has shape \[4, 32\], must be \[5, 32\]"):
        engine.load_adapter("x", LoraSpec(5), "base", state["weights"])
    assert not engine.adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_parked_tenant_comes_back_bit_for_bit(dtype):
    plain, engine = make_server(dtype), make_server(dtype)
    for one in (plain, engine):
        train(one, "a", (0,))
        one.forward_backward(named("a", 1), SPEC, model="a")
    strategy = engine.models["a"].strategy
    where = {p.data_ptr() for p in strategy.module.parameters()}
    for use in (
        lambda e: e.forward_backward(named("a", 2), SPEC, model="a"),
        lambda e: e.optim_step("a", PLAIN),
        lambda e: e.score(make_rows(), 1.0, model="a"),
        lambda e: e.model_state("a"),
        lambda e: e.freeze_adapter("old", "a"),
        lambda e: e.state(),
        lambda e: train(e, "a", (3,)),
    ):
        engine.offload("a")
        away = {p.data_ptr() for p in strategy.module.parameters()}
        engine.offload("a")  # a second time moves nothing
        assert strategy.offloaded and not where & away
        assert away == {p.data_ptr() for p in strategy.module.parameters()}
        engine.forward_backward(named("b", 5), SPEC, model="b")  # another tenant's call does not wake it
        assert strategy.offloaded and engine.version("a") >= 1
        engine.clear_gradient("b")
        use(plain), use(engine)
        assert not strategy.offloaded
        where = {p.data_ptr() for p in strategy.module.parameters()}
        assert torch.equal(gradient(plain, "a"), gradient(engine, "a"))
        assert same(plain.model_state("a"), engine.model_state("a"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deleting_frees_a_tenant_at_once(dtype):
    engine = make_server(dtype)
    train(engine, "a", (0,))
    engine.freeze_adapter("old", "a")
    gone = [weakref.ref(x) for x in (engine.models["a"].strategy.flat, engine.models["a"].strategy._grad)]
    gone.append(weakref.ref(engine.adapters["old"].pairs["lm_head"][1]))
    gc.collect()
    gc.disable()
    try:
        engine.delete("a")
        engine.delete_adapter("old")
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_a_whole_model_is_saved_and_taken_back_too():
    engine = make_server("bfloat16", tenants=())
    engine.create("full", ModelSpec())
    kept = train(engine, "full", (0,))
    want = train(engine, "full", (1,))
    engine.forward_backward(make_rows(5), SPEC, model="full")
    engine.load_model_state("full", kept)
    assert not same(kept, want) and same(train(engine, "full", (1,)), want)


# ---- refusals


def test_what_makes_no_sense_is_refused():
    engine = make_server(tenants=(("a", A),))
    engine.create("full", ModelSpec())
    rows = make_rows()
    for match, call in (
        (
            "no model called 'none'; there are: a, base, full",
            lambda: engine.create("x", ModelSpec(lora=A, base="none")),
        ),
        ("'full' cannot be a base", lambda: engine.create("x", ModelSpec(lora=A, base="full"))),
        ("'a' cannot be a base", lambda: engine.create("x", ModelSpec(lora=A, base="a"))),
        ("copies no other", lambda: engine.create("x", ModelSpec(lora=A, base="base", copy_of="a"))),
        ("'a' exists already", lambda: engine.create("a", ModelSpec(lora=A, base="base"))),
        ("'base' is the base of a;", lambda: engine.delete("base")),
        ("model 'base' is frozen", lambda: engine.forward_backward(rows, SPEC, model="base")),
        ("model 'base' is frozen", lambda: engine.forward_backward(named("base", 0), SPEC, model=None)),
        ("several base models .base, full.", lambda: engine.forward(named("a", 0) + named("full", 0), CE, model=None)),
        ("no model called 'policy'", lambda: engine.forward(rows, CE, model=None)),
        ("'full' is no LoRA adapter", lambda: engine.freeze_adapter("x", "full")),
        ("'full' is no LoRA adapter", lambda: engine.offload("full")),
    ):
        with pytest.raises(UserError, match=match):
            call()
    assert engine.models.keys() == {"base", "a", "full"} and not engine.adapters
    engine.delete("a")
    engine.open_sampler("base")
    with pytest.raises(UserError, match="'base' is open for sampling"):
        engine.delete("base")


# ---- ranks


def base_parameters(engine):
    return list(engine.models["base"].strategy.module.named_parameters())


def _on_ranks(strategy, dtype):
    """Two tenants of different kinds over uneven ranks: rank 1 has rows of one tenant only, then none at all."""
    engine = make_server(
        dtype, "batch.max_tokens_per_microbatch=70", strategy=strategy, tenants=(("a", A), ("b", HEAD))
    )
    world = engine.world
    for seeds in ((0, 5), (1, 6)):
        mine, others = named("a", seeds[0]), named("b", seeds[1])
        if world.size == 1:
            part = mine + others
        else:
            part = [mine + others[:4], others[4:]][world.rank]
        out = engine.forward_backward(part, SPEC, model=None)
        engine.forward_backward(part, SPEC, model=None, mix=True)
        engine.forward_backward(mine if world.rank == 0 else [], SPEC, model="a")
        assert len(out.losses) == len(part)
        for name in "ab":
            engine.optim_step(name, PLAIN)
    engine.offload("a")
    engine.freeze_adapter("old", "b")
    engine.check_replicas("a")
    engine.create("full", ModelSpec())
    whole, first = engine.model_state("full")["weights"], engine.models["full"].strategy.full_state_dict(torch.float32)
    assert not first or all(torch.equal(t.float(), first[name]) for name, t in whole.items())
    assert {name: t.shape for name, t in whole.items()} == {n: p.shape for n, p in base_parameters(engine)}
    scores = engine.score(named("old", 2, 3) if world.rank == 0 else [], 1.0, model=None).logprobs
    names = [] if world.rank else ["nobody"]
    try:
        engine.forward([row for name in names for row in named(name, 0)], CE, model=None)
        raise AssertionError("not refused")
    except UserError as error:
        assert "no model called 'nobody'" in str(error)
    assert all(p.grad is None for _, p in base_parameters(engine))
    return {"a": engine.model_state("a"), "b": engine.model_state("b"), "scores": scores, "loss": out.metrics}


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_layouts_agree(strategy):
    (one,) = run_ranks(1, _on_ranks, "auto", "float64")
    ranks = run_ranks(2, _on_ranks, strategy, "float64")
    for name in "ab":
        assert same(ranks[0][name], ranks[1][name])
        assert distance(flat(ranks[0][name]), flat(one[name])) < 1e-12
    assert ranks[0]["loss"] == ranks[1]["loss"]
    assert ranks[0]["loss"]["loss:sum"] == pytest.approx(one["loss"]["loss:sum"], rel=1e-11)
    for x, y in zip(ranks[0]["scores"], one["scores"], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11)


@pytest.mark.ranks
def test_a_bfloat16_base_in_shards_is_the_whole_one():
    """Compute is bfloat16 in both, masters of the base are float32 shards: the same tokens through the same numbers."""
    whole, shards = (run_ranks(2, _on_ranks, name, "bfloat16") for name in ("ddp", "fsdp"))
    for name in "ab":
        assert distance(flat(shards[0][name]), flat(whole[0][name])) < 1e-6
        assert {t.dtype for t in shards[0][name]["weights"].values()} == {torch.float32}
