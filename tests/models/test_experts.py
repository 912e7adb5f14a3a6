"""A mixture's choices: recorded while sampling, replayed in training, and evened out by a loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from families import OLD, make_net, needs_newer
from gloo import run_ranks
from small import dealt, distance, make_engine, weights_of

from benchmarks.survey import KINDS, sizes, small
from skyrl.config.load import load_config
from skyrl.config.validation import check
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.models.attention_calls import layer_calls
from skyrl.models.experts import recording, replaying, routing_of
from skyrl.models.forward import CausalLM
from skyrl.models.packed import PackedAttention, collate
from skyrl.planner.memory import GIB
from skyrl.run_dir import read_metrics
from skyrl.sampler.runners.base import KVCache
from skyrl.sweep import play
from skyrl.tracking.base import without_wall_clock
from skyrl.types import AdamParams, Datum, LossSpec, UserError
from tests.sampler.tools import requests, run, sampler

MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "kimi_linear")
MIXTURES = tuple(family for family in MIXTURES if not (OLD and family == "deepseek_v3"))  # has other routers there


def datum(tokens, experts=None, weights=None):
    tokens = np.asarray(tokens)
    weights = np.ones(len(tokens) - 1) if weights is None else weights
    return Datum(tokens[:-1], tokens[1:], weights, experts=experts)


@torch.no_grad()
def choices_of(model, tokens):
    """What the routers choose for a row alone: [L, layers, k]."""
    ids = torch.as_tensor(np.asarray(tokens))
    attention = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), (len(ids),))
    with recording(model) as chosen:
        model.hidden(ids, torch.arange(len(ids)), attention)
    return torch.stack([chosen[layer] for layer in sorted(chosen)], 1).numpy()


def logprobs(model, rows):
    batch = collate(rows, torch.float32, "cpu")
    with torch.no_grad(), replaying(model, batch, balance=False):
        return model(batch).logprobs_T.numpy()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_row_goes_where_it_is_sent(family):
    model = CausalLM(make_net(family))
    rng = np.random.default_rng(0)
    tokens = [rng.integers(2, 96, n) for n in (17, 6, 23)]
    own = [choices_of(model, row[:-1]) for row in tokens]
    plain = logprobs(model, [datum(row) for row in tokens])
    same = logprobs(model, [datum(row, chosen) for row, chosen in zip(tokens, own, strict=True)])
    np.testing.assert_allclose(same, plain, atol=1e-6, rtol=0)  # its own choices, in rows apart
    free = logprobs(model, [datum(row, np.full_like(chosen, -1)) for row, chosen in zip(tokens, own, strict=True)])
    assert np.array_equal(free, plain)
    other = [np.where(np.arange(len(c))[:, None, None] > 4, (c + 1) % 4, -1) for c in own]
    sent = logprobs(model, [datum(tokens[0], other[0]), datum(tokens[1]), datum(tokens[2], other[2])])
    assert np.array_equal(sent[16:21], plain[16:21])  # a row without choices is free beside others that have some
    assert np.abs(sent[5:16] - plain[5:16]).max() > 0.01
    np.testing.assert_allclose(sent[:5], plain[:5], atol=1e-6, rtol=0)


def test_replayed_weights_are_those_of_the_chosen_experts():
    """Against transformers' own forward with a router that is told what to choose."""
    model = CausalLM(make_net("qwen3_moe"))
    tokens = np.random.default_rng(1).integers(2, 96, 19)
    given = (choices_of(model, tokens[:-1]) + 1) % 4
    got = logprobs(model, [datum(tokens, given)])
    net = make_net("qwen3_moe")
    for layer, chosen in zip(net.model.layers, torch.from_numpy(given).unbind(1), strict=True):

        def gate(hidden, weight=layer.mlp.gate.weight, chosen=chosen):
            scores = F.softmax(hidden.reshape(-1, 32) @ weight.T, -1).gather(1, chosen)
            return None, scores / scores.sum(-1, keepdim=True), chosen

        layer.mlp.gate.forward = gate
    with torch.no_grad():
        logits = net(input_ids=torch.from_numpy(tokens[None, :-1]), use_cache=False).logits[0]
    want = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(tokens[1:, None]))[:, 0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_sampler_records_what_the_routers_chose(family):
    """Also for samples of one prompt, beginnings that are found again, and sequences that had to make room."""
    model = CausalLM(make_net(family))
    rng = np.random.default_rng(0)
    routing, shapes = routing_of(model), [call.shape for call in layer_calls(model)]
    each = KVCache.block_bytes(shapes, 4, torch.float32) + 2 * 4 * routing.layers * routing.k
    engine = sampler(model, block_tokens=4, record_experts=True, kv_cache_gib=28.5 * each / GIB)
    asked = requests([rng.integers(2, 96, n) for n in (30, 3, 11)], samples=3, temperature=1.0)
    first = run(engine, asked)
    assert engine.metrics()["sampler/preemptions:sum"] > 0
    longer = [np.concatenate([r.tokens, first[r.uid].tokens, rng.integers(2, 96, 5)]) for r in asked[:3]]
    later = requests(longer, temperature=1.0)
    second = run(engine, later)
    for request, sample in [(r, drawn[r.uid]) for some, drawn in ((asked, first), (later, second)) for r in some]:
        whole = np.concatenate([request.tokens, sample.tokens])
        assert sample.experts.dtype == np.int16
        assert np.array_equal(np.sort(sample.experts), np.sort(choices_of(model, whole[:-1])))


def test_choices_are_those_of_the_first_drawing():
    """A sequence that had to make room is computed again, and its routers may choose otherwise (here always: their
    weights are turned around); what is replayed are the choices that its tokens were drawn from."""
    model = CausalLM(make_net("qwen3_moe"))
    routing, shapes = routing_of(model), [call.shape for call in layer_calls(model)]
    each = KVCache.block_bytes(shapes, 4, torch.float32) + 2 * 4 * routing.layers * routing.k
    engine = sampler(model, block_tokens=4, record_experts=True, kv_cache_gib=12.5 * each / GIB)
    first: dict[str, np.ndarray] = {}
    for request in requests([np.arange(2, 12), np.arange(20, 29)], samples=2, temperature=1.0):
        engine.add(request)
    samples, preempted = [], 0
    while engine.unfinished():
        for sequence in engine._scheduler.running:
            seen, now = first.get(sequence.uid), engine._cache.experts_of(sequence)
            first[sequence.uid] = now if seen is None else np.concatenate([seen, now[len(seen) :]])
        samples += engine.step()
        if engine._scheduler.counts.preemptions > preempted:
            preempted = engine._scheduler.counts.preemptions
            for layer in model.net.model.layers:
                layer.mlp.gate.weight.data.neg_()
    assert preempted > 0
    for sample in samples:
        known = first[sample.uid]
        assert np.array_equal(sample.experts[: len(known)], known)


# Routers that are written otherwise: what makes scores of their logits.
OTHERS = {
    "hy_v3": torch.sigmoid,  # is given the bias of its experts beside the tokens
    "afmoe": torch.sigmoid,  # has its weight in a module of its own
    "flint": torch.sigmoid,  # without a bias
    "ernie4_5_moe": lambda logits: logits.softmax(-1),  # with one
    "kolibri1": torch.sigmoid,  # of the chosen logits alone
}


@pytest.mark.parametrize("kind", OTHERS)
def test_routers_of_other_families(kind):
    """They are replayed, and their balance is that of their own scores."""
    if kind not in KINDS or OLD:
        pytest.skip(f"transformers {tf.__version__} has no {kind}, or other routers for it")
    net = small(kind)
    model = CausalLM(net)
    tokens = np.random.default_rng(0).integers(3, 96, 17)
    own = choices_of(model, tokens[:-1])
    plain = logprobs(model, [datum(tokens)])
    np.testing.assert_allclose(logprobs(model, [datum(tokens, own)]), plain, atol=1e-6, rtol=0)
    assert np.abs(logprobs(model, [datum(tokens, (own + 1) % 4)]) - plain).max() > 0.01
    seen, batch = [], collate([datum(tokens)], torch.float32, "cpu")
    for router in (m for m in net.modules() if hasattr(m, "skyrl_routing")):
        router.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad(), replaying(model, batch, balance=True) as routing:
        model(batch)
        got = float(routing.balance_D())
    want = []
    for logits, chosen in zip(seen, torch.from_numpy(own).unbind(1), strict=True):
        probs = OTHERS[kind](logits)
        probs = probs / probs.sum(-1, keepdim=True)
        want.append((torch.bincount(chosen.flatten().long(), minlength=4) / 16 * 2 * probs.mean(0)).sum())
    assert got == pytest.approx(float(sum(want)) / len(want), abs=1e-5)


@needs_newer
def test_experts_of_a_group_that_is_not_chosen_keep_their_weight():
    """DeepSeek V2 multiplies by scores that are 0 outside of the groups that it chooses itself."""
    groups = dict(n_group=2, topk_group=1, topk_method="group_limited_greedy")
    net = tf.AutoModelForCausalLM.from_config(tf.DeepseekV2Config(**sizes("deepseek_v2") | groups))
    model = CausalLM(net.float().eval())
    tokens = np.random.default_rng(0).integers(3, 96, 17)
    given = (choices_of(model, tokens[:-1]) + 2) % 4  # two experts in each group
    outs, seen = [m for m in net.modules() if hasattr(m, "skyrl_routing")], []
    for router in outs:
        router.register_forward_hook(lambda module, args, out: seen.append(out))
    logprobs(model, [datum(tokens, given)])
    for (logits, weights, chosen), to, router in zip(seen, torch.from_numpy(given).unbind(1), outs, strict=True):
        assert torch.equal(chosen, to.long())
        want = logits.softmax(-1).gather(1, to.long()) * router.routed_scaling_factor
        assert (weights - want).abs().max() < 1e-6 and weights.min() > 0


# ---- in the engine


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a small Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("mixture")
    make_net("qwen3_moe", std=0.2).save_pretrained(folder)
    return folder


def engine_of(folder, *options, strategy="single", dtype="float64"):
    """As small.make_engine, of a model in a folder."""
    cfg = load_config(
        [f"model.path={folder}", "model.tokenizer=tiny", f"model.dtype={dtype}", "run.threads=1", *options]
    )
    world = init_distributed(cfg)
    engine = Engine(cfg, world, dtype=dtype, strategy=strategy, max_row_tokens=64)
    engine.create("policy", ModelSpec())
    return engine


def sent_rows(count=8):
    """Samples of two prompts with choices of their own for the answers, weights and advantages."""
    rng = np.random.default_rng(3)
    starts, rows = [rng.integers(4, 90, 9) for _ in range(2)], []
    for number in range(count):
        tokens = np.concatenate([starts[number // 4], rng.integers(4, 90, 3 + number)])
        experts = np.stack([rng.permutation(4)[:2] for _ in range(2 * (len(tokens) - 1))]).reshape(-1, 2, 2)
        experts[: 8 + number // 3] = (0, 3)  # of those that share tokens some share choices
        mask = np.arange(len(tokens) - 1) >= 8
        row = datum(tokens, experts, mask * rng.random(len(mask)))
        rows.append(replace(row, advantages=rng.normal() * mask, sampling_logprobs=-4.0 - rng.random(len(mask))))
    return rows


SPEC = LossSpec("ppo", {"clip_low": 0.2, "clip_high": 0.2}, router_aux_coef=0.5)


def learned(engine, rows, spec=SPEC):
    """Loss metrics, and the weights after one step on this rank's share of the rows."""
    metrics = engine.forward_backward(dealt(rows, engine), spec).metrics
    engine.optim_step("policy", AdamParams(lr=1e-3, eps=1e-3))
    return metrics, weights_of(engine)


def test_layouts_of_a_batch_change_nothing(mixture):
    metrics, weights = learned(engine_of(mixture), sent_rows())
    assert 0 < metrics["router_balance:mean"] < 2
    for options in (
        ["batch.share_prefixes=false"],
        ["batch.max_tokens_per_microbatch=24"],
        ["model.activation_checkpointing=true"],
    ):
        other, found = learned(engine_of(mixture, *options), sent_rows())
        assert distance(found, weights) < 1e-12, options
        assert other["router_balance:mean"] == pytest.approx(metrics["router_balance:mean"], abs=1e-6)
    for spec in (replace(SPEC, router_aux_coef=0.0), replace(SPEC, router_aux_coef=0.6)):
        assert distance(learned(engine_of(mixture), sent_rows(), spec)[1], weights) > 1e-6
    free = [replace(row, experts=None) for row in sent_rows()]
    assert distance(learned(engine_of(mixture), free)[1], weights) > 1e-6


def test_the_balance_loss_is_that_of_the_paper(mixture):
    """Loss and gradient against eq. 17 to 20 of arXiv 2412.19437, written out, over transformers' own model."""
    rows = [replace(row, experts=None) for row in sent_rows()]
    engine = engine_of(mixture, "batch.max_tokens_per_microbatch=24")
    spec = LossSpec("cross_entropy", router_aux_coef=0.5)
    engine.forward_backward(rows, replace(spec, router_aux_coef=0.0))
    before = gradient_of(engine)
    engine.clear_gradient("policy")
    engine.forward_backward(rows, spec)
    got = {name: one - before[name] for name, one in gradient_of(engine).items()}
    net = make_net("qwen3_moe", std=0.2).double()
    net.set_experts_implementation("eager")  # the grouped product has no float64
    total = 0.0
    for row in rows:
        out = net(input_ids=torch.from_numpy(row.tokens[None]), use_cache=False, output_router_logits=True)
        for logits in out.router_logits:
            probs = torch.softmax(logits, -1)
            chosen = torch.zeros_like(probs).scatter_(1, probs.topk(2).indices, 1.0)
            total = total + row.weights.sum() * 0.5 * (4 / 2 * chosen.mean(0) * probs.mean(0)).sum() / 2
    total.backward()
    want = {f"net.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() < 1e-6 * scale, name  # the balance is float32


def gradient_of(engine):
    module = engine.models["policy"].strategy.module
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_under_deepspeed_it_is_the_same(mixture, strategy):
    """Which wraps the model, and takes the shapes of its weights away."""
    pytest.importorskip("deepspeed")
    metrics, weights = learned(engine_of(mixture, dtype="float32"), sent_rows())
    other, found = run_ranks(1, under_deepspeed, mixture, strategy)[0]
    assert distance(found, weights) < 1e-7
    assert other["router_balance:mean"] == pytest.approx(metrics["router_balance:mean"], abs=1e-6)


def under_deepspeed(folder, strategy):
    return learned(engine_of(folder, strategy=strategy, dtype="float32"), sent_rows())


def on_ranks(folder, strategy, dtype, options):
    engine = engine_of(folder, "model.activation_checkpointing=true", *options, strategy=strategy, dtype=dtype)
    found = learned(engine, sent_rows())
    return found if engine.world.rank == 0 else None


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "ranks", "dtype", "options"),
    [
        ("fsdp", 2, "float64", []),
        pytest.param("hsdp", 4, "float64", ["strategy.shard_size=2"], marks=pytest.mark.slow),
        pytest.param("zero2", 2, "float32", [], marks=pytest.mark.slow),
        pytest.param("zero3", 2, "float32", [], marks=pytest.mark.slow),
    ],
)
def test_sharded_over_ranks_it_is_the_same(mixture, strategy, ranks, dtype, options):
    metrics, weights = learned(engine_of(mixture, dtype=dtype), sent_rows())
    other, found = run_ranks(ranks, on_ranks, mixture, strategy, dtype, options)[0]
    assert distance(found, weights) < 1e-7
    assert other["router_balance:mean"] == pytest.approx(metrics["router_balance:mean"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["sampler.block_tokens=4", "sampler.kv_cache_gib=5e-5"]])
def test_a_run_of_several_turns_goes_on_bit_for_bit(mixture, tmp_path, more):
    """Choices of all turns are replayed, so in float32 the gap is that of rounding; of a run that was ended half way
    the second half is that of one that was not. Once with sequences that had to make room for others."""
    given = [f"model.path={mixture}", "model.tokenizer=tiny", "model.dtype=float32", "run.threads=1", "optim.lr=1e-2"]
    given += ["batch.prompts_per_step=4", "batch.samples_per_prompt=4", "eval.every_steps=0", "eval.num_prompts=1"]
    given += ["warmup.num_steps=0", "checkpoint.every_steps=2", "checkpoint.async_save=false", "tracking.console=off"]
    given += ["algorithm.router.replay=true", "sampler.max_new_tokens=4", "checkpoint.export=false", *more]
    given += ["algorithm.loss.entropy_coef=0.1", "algorithm.filters.zero_variance=false"]  # nothing is guessed
    kept = {}
    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        own = [f"run.dir={tmp_path / name}", f"batch.num_steps={steps}"]
        play(load_config(["experiment=guess_number", "model=hub", *given, *own]), "train", sweep=False)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        kept[name] = [without_wall_clock(one) for one in records if one["step"]]
    for whole, parts in zip(kept["whole"], kept["parts"], strict=True):
        assert {k: (v, parts.get(k)) for k, v in whole.items() if v != parts.get(k)} == {}
    assert all(one["turns:mean"] > 1 and one["logprob_gap:max"] < 1e-5 for one in kept["whole"])
    assert bool(more) == any(one.get("sampler/preemptions:sum", 0) > 0 for one in kept["whole"])


def test_what_cannot_be_is_refused(mixture, tmp_path):
    with pytest.raises(UserError, match="algorithm.router: model type 'qwen3' has no experts"):
        make_engine("auto", "float32", "algorithm.router.aux_coef=0.1")
    engine = engine_of(mixture)
    rows = [replace(row, experts=row.experts[:, :1]) for row in sent_rows()]
    with pytest.raises(UserError, match="rows name 1x2 experts a token, the model has 2x2"):
        engine.forward_backward(rows, SPEC)
    if "phimoe" in KINDS and not OLD:
        small("phimoe").save_pretrained(tmp_path)
        with pytest.raises(UserError, match="PhimoeTopKRouter does not choose by one top-k"):  # before any step
            engine_of(tmp_path, "algorithm.router.replay=true", dtype="float32")
    for option in ("batch.packing=false", "model.compile=true"):
        with pytest.raises(UserError, match=f"algorithm.router.replay=true: cannot be had with {option}"):
            check(load_config(["algorithm.router.replay=true", option]))
