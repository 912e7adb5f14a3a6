"""Adapters in every verified family against merged weights in float64; routing of tokens; what starts equal."""

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, make_net
from torch import nn
from transformers.pytorch_utils import Conv1D

from skyrl.config.schema import ModelConfig, TinyModelConfig
from skyrl.models.forward import CausalLM, collate, precise
from skyrl.models.lora import Adapter, Experts, adapted, install, routed
from skyrl.pretrained.load import build_model
from skyrl.pretrained.peft import merge_adapter, read_adapter, write_adapter
from skyrl.text.tokenizer import load_tokenizer
from skyrl.types import Datum, LoraSpec, UserError

LENGTHS = (5, 24, 13, 20)
EXPERTS = ("qwen3_moe", "gpt_oss", "deepseek_v3")  # alone, transposed with biases, and beside shared and dense ones


def make_rows(vocab=96, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [Datum(rng.integers(0, vocab, n), rng.integers(0, vocab, n), rng.normal(size=n)) for n in lengths]


def make_model(name, dtype=torch.float64, chunk=0):
    net = make_net(name, std=0.15).to(dtype)
    if dtype == torch.float64:
        net.set_experts_implementation("eager")
    model = CausalLM(net, chunk_tokens=chunk)
    model.requires_grad_(False)
    return model


def trained(model, spec, seed=1, name="a", dtype=torch.float64):
    """An adapter that has learned something: B is not 0."""
    adapter = Adapter(model, spec, name=name, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a, b in adapter.pairs.values():
            a.add_(0.1 * torch.randn(a.shape, generator=generator))
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return adapter


def merged_net(model, adapter):
    """A copy of the net with W + scale * B A as trainable weights; a tied output gets a weight of its own."""
    net, products = copy.deepcopy(model.net), adapted(model, adapter.spec)
    for path, (a, b) in adapter.pairs.items():
        if isinstance(products[path], Experts):
            net.get_parameter(path).data += adapter.scale * products[path].delta(a, b).detach()
            continue
        linear = net.get_submodule(path)
        delta = adapter.scale * (b @ a).detach()
        linear.weight = nn.Parameter(linear.weight.detach() + (delta.t() if isinstance(linear, Conv1D) else delta))
        linear._forward_hooks.clear()
    return net.requires_grad_(True)


def plain(net, row):
    with precise(next(net.parameters()).dtype):
        net.set_attn_implementation("eager")
        logits = net(input_ids=torch.from_numpy(row.tokens)[None], use_cache=False).logits[0]
    return torch.log_softmax(logits, -1).gather(1, torch.from_numpy(row.targets)[:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_and_gradients_are_those_of_merged_weights(name):
    rows = make_rows()
    model = make_model(name, chunk=1)
    spec = LoraSpec(3, alpha=6.0, mlp=name != "llama4_text")
    adapter, products = trained(model, spec), adapted(model, spec)
    mb = collate(rows, torch.float64, "cpu")
    net = merged_net(model, adapter)
    want = torch.cat([plain(net, row) for row in rows])
    (want * mb.weights_T).sum().backward()
    for packing in (True, False):
        adapter.zero_grad()
        with routed(model, [(0, 62, adapter)]):
            got = model(mb, packing=packing)
            (got.logprobs_T * mb.weights_T).sum().backward()
        assert (got.logprobs_T - want).abs().max() < 1e-10
        for path, (a, b) in adapter.pairs.items():
            product = products[path]
            if isinstance(product, Experts):
                dense, pair = net.get_parameter(path).grad, [x.detach().requires_grad_() for x in (a, b)]
                wanted = torch.autograd.grad(adapter.scale * product.delta(*pair), pair, dense)
            else:
                linear = net.get_submodule(path)
                dense = (linear.weight.grad.t() if isinstance(linear, Conv1D) else linear.weight.grad) * adapter.scale
                wanted = b.T @ dense, dense @ a.T
            for ours, theirs in zip((a.grad, b.grad), wanted, strict=True):
                assert (ours - theirs).abs().max() < 1e-9 * (1 + theirs.abs().max()), path
    assert all(p.grad is None for p in model.parameters())
    assert (model(mb).logprobs_T - want).abs().max() > 1e-2  # it does say something else than the base


def test_what_is_adapted():
    names = {k: {path.rpartition(".")[2] for path in adapted(make_model(k), LoraSpec(2))} for k in ("qwen2", "phi3")}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert names["qwen2"] == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"} | mlp
    assert names["phi3"] == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    model = make_model("llama3")
    only = lambda **kinds: {p.rpartition(".")[2] for p in adapted(model, LoraSpec(2, **kinds))}  # noqa: E731
    assert only(mlp=False, unembed=False) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert only(attn=False, unembed=False) == mlp and only(attn=False, mlp=False) == {"lm_head"}
    assert len(adapted(model, LoraSpec(2))) == 15


def test_experts_beside_the_interface_are_refused_by_name():
    with pytest.raises(UserError, match=r"lora.mlp: model type 'llama4_text'.*Llama4TextExperts.*layer 0.*mlp"):
        Adapter(make_model("llama4_text"), LoraSpec(2), name="a", dtype=torch.float64)


def test_tokens_of_several_adapters_go_through_the_same_experts():
    model = make_model("qwen3_moe")
    rows, made = make_rows(), [trained(model, LoraSpec(2), seed=seed, name=str(seed)) for seed in (1, 2)]
    nets = {None: model.net, **{one: merged_net(model, one) for one in made}}
    owners, at, segments, want = [made[0], None, made[1], made[0]], 0, [], []
    for row, owner in zip(rows, owners, strict=True):
        segments.append((at, at := at + len(row.tokens), owner))
        want.append((owner, row))
    with routed(model, segments):
        got = model(collate(rows, torch.float64, "cpu")).logprobs_T
    gap = got - torch.cat([plain(copy.deepcopy(nets[owner]), row) for owner, row in want])
    assert gap.abs().max() < 1e-10


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0.0}, {"mlp": False, "attn": False, "unembed": False}])
def test_a_spec_without_sense_is_refused(changes):
    with pytest.raises(UserError, match="lora"):
        LoraSpec(**{"rank": 2, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_and_no_adapter_are_the_base_bit_for_bit(dtype):
    model = make_model("gemma2", dtype)
    mb = collate(make_rows(), torch.float32, "cpu")
    before = model(mb, entropy=True)
    adapter = Adapter(model, LoraSpec(4), name="a", dtype=dtype)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    install(model)
    for segments in ([], [(0, 62, None)], [(0, 62, adapter)]):
        with routed(model, segments):
            now = model(mb, entropy=True)
        assert torch.equal(now.logprobs_T, before.logprobs_T) and torch.equal(now.entropy_T, before.entropy_T)
    assert torch.equal(model(mb).logprobs_T, before.logprobs_T)


def test_start_values_are_those_of_peft_and_keyed_by_seed_and_path():
    model = make_model("qwen3")
    one, same, other = (Adapter(model, LoraSpec(8, seed=s), name="a", dtype=torch.float32) for s in (0, 0, 1))
    for path, (a, b) in one.pairs.items():
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound and abs(float(a.detach().mean())) < 0.2 * bound and not b.any()
        assert torch.equal(a, same.pairs[path][0]) and not torch.equal(a, other.pairs[path][0])
        assert torch.equal(a, one.get_parameter(f"{path}.A"))
    twins = [one.pairs[f"model.layers.{i}.self_attn.q_proj"][0] for i in (0, 1)]
    assert not torch.equal(*twins) and one.scale == 4.0
    few = Adapter(model, LoraSpec(8, mlp=False), name="a", dtype=torch.float32)
    assert torch.equal(few.pairs["lm_head"][0], one.pairs["lm_head"][0])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_each_token_goes_through_its_own_adapter(packing, again):
    """Four rows: adapter a, the base, b (no unembedding), a again; with checkpointed layers too."""
    cfg = ModelConfig(
        tiny=TinyModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48),
        activation_checkpointing=again,
    )
    model = build_model(cfg, load_tokenizer(cfg), dtype=torch.float64).requires_grad_(False)
    rows = make_rows()
    a, b = trained(model, LoraSpec(2)), trained(model, LoraSpec(5, unembed=False), seed=2, name="b")
    owners, want, grads = (a, None, b, a), [], {}
    for row, owner in zip(rows, owners, strict=True):
        mb = collate([row], torch.float64, "cpu")
        with routed(model, [(0, len(row.tokens), owner)]):
            out = model(mb, entropy=True)
            want.append(out)
            if owner is not None:
                (out.logprobs_T * mb.weights_T + 0.1 * out.entropy_T).sum().backward()
    for owner in (a, b):
        grads[owner.name] = [p.grad.clone() for p in owner.parameters()]
        owner.zero_grad()
    mb = collate(rows, torch.float64, "cpu")
    starts = mb.starts_S1.tolist()
    with routed(model, list(zip(starts, starts[1:], owners, strict=False)), connect=True):
        out = model(mb, entropy=True, packing=packing)
        (out.logprobs_T * mb.weights_T + 0.1 * out.entropy_T).sum().backward()
    assert (out.logprobs_T - torch.cat([x.logprobs_T for x in want])).abs().max() < 1e-12
    assert (out.entropy_T - torch.cat([x.entropy_T for x in want])).abs().max() < 1e-12
    for owner in (a, b):
        for p, one in zip(owner.parameters(), grads[owner.name], strict=True):
            assert (p.grad - one).abs().max() < 1e-12 * (1 + one.abs().max())


def test_segments_must_fit_the_tokens():
    model = make_model("qwen3")
    adapter = trained(model, LoraSpec(2))
    mb = collate(make_rows(), torch.float64, "cpu")
    with routed(model, [(0, 61, adapter)]), pytest.raises(RuntimeError, match="sees 62 tokens, the adapters' .* 61"):
        model(mb)
    with routed(model, [(0, 4, adapter), (4, 62, None)]), pytest.raises(KeyError):
        model(mb, packing=False)
    with routed(model, [(0, 62, adapter)]), pytest.raises(RuntimeError, match="inside"), routed(model, []):
        pass
    assert model.router.segments == [] and not model.router.connect


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *itertools.product(
            ["llama3", "qwen2", "gemma2", "phi3", "gpt2", "opt"],
            [{}, {"unembed": False}, {"attn": False, "mlp": False}],
        ),
        *((name, {}) for name in EXPERTS),
    ],
)
def test_what_peft_makes_of_an_adapter_is_what_we_make_of_it(name, kinds, tmp_path):
    """Loaded, merged and taken off again, on tied models too; and the merged weights that we export."""
    peft = pytest.importorskip("peft")
    model = make_model(name, torch.float32)
    spec = LoraSpec(4, alpha=10.0, **kinds)
    adapter = trained(model, spec, dtype=torch.float32)
    rows = make_rows()
    mb = collate(rows, torch.float32, "cpu")
    with torch.no_grad():
        base = model(mb).logprobs_T
        with routed(model, [(0, 62, adapter)]):
            ours = model(mb).logprobs_T
    state = {key: p.detach().clone() for key, p in model.named_parameters()}
    config, written, heads = merge_adapter(state, adapter.weights(), spec, model)
    write_adapter(tmp_path, written, spec, "base", heads)
    if not heads:
        back = read_adapter(tmp_path)
        assert back.keys() == written.keys() and all(torch.equal(back[key], value) for key, value in written.items())

    def said_by(net):
        with torch.no_grad():
            return torch.cat([plain(net, row) for row in rows])

    def loaded():
        return peft.PeftModel.from_pretrained(make_model(name, torch.float32).net, tmp_path)

    assert (ours - base).abs().max() > 1e-2
    assert (said_by(loaded().base_model.model) - ours).abs().max() < 5e-5
    merged = loaded().merge_and_unload()
    assert (said_by(merged) - ours).abs().max() < 5e-5
    assert merged.config.tie_word_embeddings == config.tie_word_embeddings
    if not heads:  # peft's unload leaves whole modules in place: docs/models.md
        assert (said_by(loaded().unload()) - base).abs().max() < 5e-5
    exported = tf.AutoModelForCausalLM.from_config(config)
    exported.load_state_dict({key.removeprefix("net."): value for key, value in state.items()}, strict=False)
    assert (said_by(exported.eval()) - ours).abs().max() < 5e-5


def test_a_tied_head_with_a_bias_over_layers_that_cannot_be_adapted(tmp_path):
    """peft wants all of a module that is stored whole, and one pair at least."""
    peft = pytest.importorskip("peft")

    def made():
        model = make_model("qwen2", torch.float32)
        model.net.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 96))
        for layer in model.layers():
            del layer.self_attn.is_causal  # as modules of classes that LoRA does not know
        return model

    model, spec = made(), LoraSpec(4, alpha=10.0, attn=False, mlp=False)
    adapter = trained(model, spec, dtype=torch.float32)
    state = {key: p.detach().clone() for key, p in model.named_parameters()}
    _, written, heads = merge_adapter(state, adapter.weights(), spec, model)
    write_adapter(tmp_path, written, spec, "base", heads)
    row = make_rows()[0]
    mb = collate([row], torch.float32, "cpu")
    with torch.no_grad(), routed(model, [(0, len(row.tokens), adapter)]):
        ours = model(mb).logprobs_T
        merged = peft.PeftModel.from_pretrained(made().net, tmp_path).merge_and_unload()
        assert (plain(merged, row) - ours).abs().max() < 5e-5


def test_adapters_that_peft_wrote_are_taken_over_or_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    paths = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]

    def written(**more):
        options = {"r": 4, "lora_alpha": 10, "target_modules": paths, "init_lora_weights": False, **more}
        wrapped = peft.get_peft_model(make_model("llama3", torch.float32).net, peft.LoraConfig(**options))
        wrapped.save_pretrained(tmp_path)
        return wrapped

    wrapped = written()
    got = read_adapter(tmp_path)
    assert got.keys() == {f"{path}.{side}" for path in paths for side in "AB"}
    layer = wrapped.base_model.model.get_submodule(paths[0])
    assert torch.equal(got[f"{paths[0]}.B"], layer.lora_B["default"].weight)
    for named, more in {
        "use_dora": {"use_dora": True},
        "use_rslora": {"use_rslora": True},
        "bias": {"bias": "lora_only"},
        "rank_pattern": {"rank_pattern": {paths[0]: 2}},
        "alpha_pattern": {"alpha_pattern": {paths[0]: 2}},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "embed_tokens.lora_embedding_A": {"target_modules": ["embed_tokens"]},
    }.items():
        written(**more)
        with pytest.raises(UserError, match=f"{named}.*cannot be taken over"):
            read_adapter(tmp_path)


def test_what_was_asked_for_is_adapted_or_refused_by_name():
    model = make_model("gpt2")
    names = {path.partition("h.0.")[2] for path in adapted(model, LoraSpec(2)) if ".0." in path}
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    with pytest.raises(UserError, match=r"lora.mlp: model type 'gpt2'.*Own mlp.c_fc of layer 1.*train_mlp"):
        model.layers()[1].mlp.c_fc = type("Own", (nn.Linear,), {})(32, 128)
        adapted(model, LoraSpec(2))
    adapted(model, LoraSpec(2, mlp=False))
    model = make_model("qwen3")
    for layer in model.layers():
        del layer.self_attn.is_causal
    with pytest.raises(UserError, match="lora.attn.*nothing of the kind"):
        adapted(model, LoraSpec(2))
