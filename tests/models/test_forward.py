"""Every verified family: packed training log-probs and gradients against transformers' own forward, row by row."""

from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, make_net

from skyrl.config.schema import ModelConfig, TinyModelConfig
from skyrl.models import compiled
from skyrl.models.forward import CausalLM, collate
from skyrl.models.packed import PackedAttention
from skyrl.planner.plan import compiler_problem
from skyrl.pretrained.load import build_model, check_against_transformers, plain_logprobs
from skyrl.text.tokenizer import load_tokenizer
from skyrl.types import Datum, UserError

LENGTHS = (5, 24, 13, 20, 1)
SMALL = TinyModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48)


def make_rows(vocab=96, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [Datum(rng.integers(0, vocab, n), rng.integers(0, vocab, n), rng.random(n)) for n in lengths]


def plain(net, rows):
    """log pi(target) of all rows by transformers, eager attention, whole logits, one row at a time."""
    whole = plain_logprobs(net, [torch.from_numpy(row.tokens) for row in rows])
    return torch.cat(
        [z.gather(1, torch.from_numpy(row.targets)[:, None])[:, 0] for z, row in zip(whole, rows, strict=True)]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_transformers(name):
    model, rows = CausalLM(make_net(name)), make_rows()
    mb = collate(rows, torch.float32, "cpu")
    with torch.no_grad():
        want = plain(model.net, rows)
        assert (model(mb).logprobs_T - want).abs().max() < 1e-5
        assert (model(mb, packing=False).logprobs_T - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name", ["qwen2", "gemma2", "qwen3_moe", "gpt_oss", "llama4_text", "gemma3n_text", "deepseek_v3"]
)
def test_gradients_equal_transformers(name):
    rows = make_rows()
    mb = collate(rows, torch.float32, "cpu")
    grads = []
    for packing in (None, True, False):
        model = CausalLM(make_net(name, std=0.1))
        logp = plain(model.net, rows) if packing is None else model(mb, packing=packing).logprobs_T
        (logp * mb.weights_T).sum().backward()
        grads.append({n: p.grad for n, p in model.net.named_parameters()})
    for ours in grads[1:]:
        for key, want in grads[0].items():
            assert (ours[key] - want).abs().max() < 1e-5 * (1 + want.abs().max()), key


def test_temperature_and_entropy_against_whole_logits():
    model, rows = CausalLM(make_net("gemma2")), make_rows()
    mb = collate(rows, torch.float32, "cpu")
    out = model(mb, temperature=0.7, entropy=True)
    z = torch.cat(
        [model.net(input_ids=mb.tokens_T[mb.row_T == s][None], skyrl_attention=_one(mb, s)).logits[0] for s in range(5)]
    )
    logp = torch.log_softmax(z / 0.7, -1)
    assert (out.logprobs_T - logp.gather(1, mb.targets_T[:, None])[:, 0]).abs().max() < 1e-5
    assert (out.entropy_T + (logp.exp() * logp).sum(-1)).abs().max() < 1e-5


def _one(mb, s):
    from skyrl.models.packed import PackedAttention

    n = int((mb.row_T == s).sum())
    return PackedAttention(torch.tensor([0, n], dtype=torch.int32), [n])


def test_float64_does_not_depend_on_the_layout():
    cfg = ModelConfig(tiny=SMALL)
    model = build_model(cfg, load_tokenizer(cfg), dtype=torch.float64)
    rows = make_rows(100)
    results = []
    for parts, packing in (([rows], True), ([rows], False), ([rows[3:], rows[:3]], True), ([[r] for r in rows], True)):
        model.zero_grad()
        for part in parts:
            mb = collate(part, torch.float64, "cpu")
            (model(mb, packing=packing).logprobs_T * mb.weights_T).sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1.0)


def test_checkpointed_layers_give_the_same_gradients():
    cfg = ModelConfig(tiny=SMALL)
    tokenizer, grads = load_tokenizer(cfg), []
    for again in (False, True):
        model = build_model(ModelConfig(tiny=SMALL, activation_checkpointing=again), tokenizer, dtype=torch.float64)
        mb = collate(make_rows(100), torch.float64, "cpu")
        (model(mb).logprobs_T * mb.weights_T).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all((grads[0][n] - grads[1][n]).abs().max() < 1e-12 for n in grads[0])


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.skipif(bool(compiler_problem("cpu")), reason="no C++ compiler")
def test_compiled_layers_give_the_same_values_and_gradients(again):
    plain_cfg, tokenizer = ModelConfig(tiny=SMALL), load_tokenizer(ModelConfig(tiny=SMALL))
    cfg = ModelConfig(tiny=SMALL, compile=True, activation_checkpointing=again)
    eager, model = build_model(plain_cfg, tokenizer), build_model(cfg, tokenizer)
    from torch._dynamo.utils import counters  # it takes a second to import

    counters.clear()
    torch._dynamo.reset()  # what an earlier test has compiled
    for rows in (make_rows(100), make_rows(100)[:2], make_rows(100, lengths=(7, 9, 11))):  # other numbers of tokens
        outs = []
        for one in (eager, model):
            one.zero_grad()
            mb = collate(rows, torch.float32, "cpu")
            out = one(mb)
            (out.logprobs_T * mb.weights_T).sum().backward()
            outs.append((out.logprobs_T.detach(), {n: p.grad.clone() for n, p in one.named_parameters()}))
        torch.testing.assert_close(outs[1][0], outs[0][0], rtol=0, atol=1e-5)
        for name, gradient in outs[0][1].items():
            torch.testing.assert_close(outs[1][1][name], gradient, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0
    tokens = torch.arange(5)
    attention = PackedAttention(torch.tensor([0, 5], dtype=torch.int32), [5])
    assert torch.equal(model.hidden(tokens, tokens, attention), eager.hidden(tokens, tokens, attention))  # as sampled


def test_every_kind_of_layer_stays_compiled(monkeypatch):
    """Layers with experts and without, trained and scored, of one token and of more, of a frozen model as well."""
    from torch._dynamo import config, reset  # it takes a second to import

    reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled._compiled.cache_clear()
    models = [CausalLM(make_net("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 2])) for _ in range(2)]
    models[1].requires_grad_(False)
    # Not monkeypatch.setattr: these values are not in the module's __dict__, so pytest's undo would take them away.
    with config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for model in models:
            model.compile_layers()
            for lengths in ((5, 9), (1,)):
                mb = collate(make_rows(96, lengths=lengths), torch.float32, "cpu")
                model(mb)
                with torch.no_grad():
                    model(mb)
    compiled._compiled.cache_clear()
    reset()


def test_critic():
    cfg = ModelConfig(tiny=SMALL)
    model = build_model(cfg, load_tokenizer(cfg), head="value")
    mb = collate(make_rows(100), torch.float32, "cpu")
    out = model(mb)
    hidden = model.hidden(mb.tokens_T, mb.positions_T, _pack(mb))
    want = hidden @ model.value_head.weight[0] + model.value_head.bias
    assert (out.values_T - want).abs().max() < 1e-6 and out.values_T.shape == mb.tokens_T.shape
    assert (out.logprobs_T == 0).all()
    out.values_T.sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and model.value_head.bias.grad == sum(LENGTHS)
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def _pack(mb):
    from skyrl.models.packed import PackedAttention

    return PackedAttention(mb.starts_S1, mb.lengths)


def test_no_dropout_in_training():
    net = make_net("mixtral")
    net.config.attention_dropout, net.config.router_jitter_noise = 0.5, 0.5
    for module in net.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.5
    model = CausalLM(net).train()
    mb = collate(make_rows(), torch.float32, "cpu")
    assert not model.net.training and torch.equal(model(mb).logprobs_T, model(mb).logprobs_T)


def test_a_row_beyond_the_models_positions_is_refused():
    model = CausalLM(make_net("qwen3"))
    with pytest.raises(UserError, match="row of 129 tokens.*128 positions.*batch.max_row_tokens"):
        model(collate(make_rows(lengths=[129]), torch.float32, "cpu"))


def test_casting_keeps_buffers_and_ties():
    cfg = ModelConfig(tiny=SMALL)
    model = build_model(cfg, load_tokenizer(cfg))
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.to(torch.bfloat16)
    assert model.tied and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(before[n], b) and before[n].dtype == b.dtype for n, b in model.named_buffers())
    assert len(model.layers()) == 2 and model.vocab_size == 100 and model.max_positions == 4096


def test_longrope_goes_by_the_row_and_in_a_run_by_its_longest_row():
    model, (long, short) = CausalLM(make_net("phi3_long")), make_rows(lengths=(24, 13))
    run = lambda rows: model(collate(rows, torch.float32, "cpu")).logprobs_T.detach()  # noqa: E731
    alone = run([short])
    assert (run([long, short])[24:] - alone).abs().max() < 1e-5
    model.rope.limit = 40  # what a run sets whose rows may grow to 40 tokens: a row is drawn before its length is known
    beyond = run([short])
    assert (beyond - alone).abs().max() > 1e-2 and (run([long, short])[24:] - beyond).abs().max() < 1e-5
    check_against_transformers(model)
    assert model.rope.limit == 40
    model.rope.limit = 16
    assert torch.equal(run([short]), alone)
    model = CausalLM(model.net)  # a second time over the same net
    assert (run([long, short])[24:] - alone).abs().max() < 1e-5
