"""What a family has in float32 in a bfloat16 model is that in training, sampling and exports."""

import numpy as np
import pytest
import torch
import transformers as tf
from families import make_net
from gloo import run_ranks
from safetensors.torch import load_file
from small import dealt, weights_of

from benchmarks.survey import small
from skyrl.engine import ModelSpec
from skyrl.evaluation.weight_check import check_copies
from skyrl.types import AdamParams, LossSpec
from tests.models.test_experts import engine_of
from tests.models.test_sharded import rows

BIASES = {"gate.weight", "moe_statics.e_score_correction_bias"}


@pytest.fixture(scope="module")
def ernie(tmp_path_factory):
    """A folder with a small ERNIE 4.5 mixture, whose routers are float32."""
    folder = tmp_path_factory.mktemp("ernie")
    net = small("ernie4_5_moe")
    if isinstance(net, str):
        pytest.skip(net)
    net.save_pretrained(folder)
    return folder


def step(engine, experts=False, **adam):
    given = rows(0, 6, 96)
    if experts:  # rounding then sends no token elsewhere
        rng = np.random.default_rng(0)
        for row in given:
            row.experts = np.stack([[rng.permutation(4)[:2] for _ in range(3)] for _ in row.tokens])
    engine.forward_backward(dealt(given, engine), LossSpec("cross_entropy"))
    engine.optim_step("policy", AdamParams(**{"lr": 1e-3, "eps": 1e-3, **adam}))


PLAIN = dict(experts=True, lr=1e-2, eps=1.0)  # a step that is nearly the gradient itself


def wide(module):
    return {name: p.detach() for name, p in module.named_parameters() if p.dtype == torch.float32}


def test_as_transformers_has_it(ernie, tmp_path):
    engine = engine_of(ernie, dtype="bfloat16")
    module = engine.models["policy"].strategy.module
    theirs = dict(tf.AutoModelForCausalLM.from_pretrained(ernie, dtype=torch.bfloat16).named_parameters())
    ours = dict(module.net.named_parameters())
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype] == []
    before = {name: p.clone() for name, p in wide(module).items()}
    assert {".".join(name.rsplit(".", 2)[1:]) for name in before} == BIASES
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))  # without masters
    step(engine)
    masters = weights_of(engine)
    for name, p in wide(module).items():
        assert torch.equal(p, masters[name])  # no rounding lies between
        assert name.endswith("bias") or not torch.equal(p, p.bfloat16().float())
        assert name.endswith("bias") or not torch.equal(p, before[name])
    reference = wide(engine.models["reference"].strategy.module)
    assert all(torch.equal(reference[name], p) for name, p in before.items()) and len(reference) == len(before)
    engine.export("policy", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    kept = {f"net.{name}": t for name, t in written.items() if t.dtype == torch.float32}
    assert len(kept) == len(before) and all(torch.equal(kept[n], masters[n]) for n in kept if n in masters)


def on_ranks(folder):
    engine = engine_of(folder, strategy="fsdp", dtype="bfloat16")
    step(engine, **PLAIN)
    check_copies(engine)  # the sampler's weights are those that training computes with
    strategy = engine.models["policy"].strategy
    whole, masters = strategy.gathered(), weights_of(engine)
    if engine.world.rank > 0:
        return None
    assert all(torch.equal(p, masters[name]) for name, p in wide(whole).items()) and wide(whole)
    return masters


@pytest.mark.slow
@pytest.mark.ranks
def test_in_shards(ernie):
    """A unit of FSDP2 of its own, in float32; the sampler's copy has the same bits."""
    single = engine_of(ernie, dtype="bfloat16")
    before = weights_of(single)
    step(single, **PLAIN)
    one, two = weights_of(single), run_ranks(2, on_ranks, ernie)[0]
    for name in wide(single.models["policy"].strategy.module):
        if not name.endswith("bias"):
            assert (one[name] - two[name]).norm() < 0.2 * (one[name] - before[name]).norm() > 0, name


def rounded(folder):
    engine = engine_of(folder, strategy="fsdp", dtype="bfloat16")
    step(engine)
    check_copies(engine)
    whole = engine.models["policy"].strategy.gathered()
    return {name: p.dtype for name, p in whole.named_parameters() if name.endswith("A_log")}


@pytest.mark.ranks
def test_beside_others_in_one_module_it_is_rounded(tmp_path):
    """FSDP2 gathers a module's weights in one dtype: the sampler's copy has what training has."""
    make_net("olmo_hybrid").save_pretrained(tmp_path)
    found = run_ranks(1, rounded, tmp_path)[0]
    assert found and set(found.values()) == {torch.bfloat16}
