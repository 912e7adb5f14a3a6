"""Linear attention in the sampler: every sequence goes on from its own state, whatever the scheduler does with it."""

import numpy as np
import pytest
import torch

from skyrl.config.schema import ModelConfig, RunConfig
from skyrl.models.attention_calls import layer_calls
from skyrl.models.forward import CausalLM, collate
from skyrl.planner import memory
from skyrl.planner.memory import model_sizes
from skyrl.pretrained.support import check_module
from skyrl.sampler.runners.base import KVCache
from skyrl.types import Datum
from tests.families import make_net, needs_newer
from tests.sampler.tools import adapter, merged, reference_logprobs, run, sampler
from tests.sampler.tools import requests as asked_for

CONTEXTS = [np.arange(2, 2 + n) % 90 for n in (1, 8, 23)]


@pytest.fixture(scope="module")
def model():
    return CausalLM(make_net("qwen3_5"))


def requests(*args, **kw):
    return asked_for(*args, **{"max_tokens": 9, **kw})


def held(model, engine, asked, tolerance=2e-5):
    """Draws what is asked; every log-probability is that of a plain forward."""
    drawn = run(engine, asked)
    for request in asked:
        exact = model if isinstance(model, CausalLM) else model[request.model]
        expected = reference_logprobs(exact, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=tolerance, rtol=0)
    assert sorted(engine._scheduler._free_states) == list(range(1, engine._scheduler.max_running + 1))
    return {uid: sample.tokens.tolist() for uid, sample in drawn.items()}


@pytest.mark.parametrize(("prefill", "prefix_cache"), [(2048, True), (3, True), (3, False)])
def test_forks_chunks_and_states_left_by_others(model, prefill, prefix_cache):
    """Samples of one prompt, prompts in pieces and whole, more requests than states; what was left in a state by the
    sequence before, not finite even, is not seen. Again with the same prompts: nothing wrong is found."""
    asked = requests(CONTEXTS, samples=2)
    engine = sampler(model, block_tokens=4, max_running=3, prefix_cache=prefix_cache)
    engine._scheduler.max_prefill_tokens = prefill
    for inputs, matrices in filter(None, engine._cache.states):
        inputs.fill_(float("nan"))
        matrices.fill_(float("inf"))
    first = held(model, engine, asked)
    assert first == held(model, engine, asked)
    held(model, engine, requests([np.concatenate([CONTEXTS[2], first["2/0"], [5, 6]])], samples=2))


def test_a_preempted_sequence_computes_its_state_again(model):
    """Fewer blocks than the sequences need: the youngest begin again, with what they have drawn."""
    asked = requests(CONTEXTS, samples=3)
    whole = held(model, sampler(model, block_tokens=4), asked)
    each = 4 * 2 * 2 * 8 * 4  # bytes of a block: one layer of two heads of 8 channels
    engine = sampler(model, block_tokens=4, kv_cache_gib=12 * each / 2**30)
    assert held(model, engine, asked) == whole and engine.metrics()["sampler/preemptions:sum"] > 0


def test_a_cancelled_leader_leaves_its_state_to_its_twin(model):
    engine = sampler(model, block_tokens=4)
    engine._scheduler.max_prefill_tokens = 8
    leader, *others = requests([CONTEXTS[2]], samples=3)
    engine.add(leader)
    for other in others:
        engine.add(other)
    engine.step()
    assert engine.cancel(leader.uid)
    done = {}
    while engine.unfinished():
        done.update({sample.uid: sample for sample in engine.step()})
    assert engine.metrics()["sampler/prefill_tokens:sum"] == 23
    for other in others:
        expected = reference_logprobs(model, other.tokens, done[other.uid].tokens)
        np.testing.assert_allclose(done[other.uid].logprobs, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_a_hybrid_family_with_layers_of_one_kind(kind):
    """Layers that all keep a state and nothing of a token, whose blocks have no bytes; or none that keeps a state."""
    net = make_net("qwen3_5", layer_types=[kind] * 2)
    model = CausalLM(net)
    check_module(net)
    held(model, sampler(model, block_tokens=4, max_running=3, kv_cache_gib=0.01), requests(CONTEXTS, samples=2))


def test_adapters_have_states_of_their_own(model):
    made = {name: adapter(model, name, size=0.2) for name in "ab"}
    asked = [r for name in ("", "a", "b") for r in requests(CONTEXTS[1:], samples=2, model=name)]
    exact = {"": model, **{name: merged(model, one) for name, one in made.items()}}
    held(exact, sampler(model, adapters=made, block_tokens=4, max_running=7), asked)


def test_the_plan_counts_what_the_sampler_keeps(model, tmp_path):
    model.net.save_pretrained(tmp_path)
    cfg = RunConfig(model=ModelConfig(path=str(tmp_path)))
    sizes, cache = model_sizes(cfg), sampler(model, max_running=5)._cache
    kept = [tensor for states in cache.states if states for tensor in states]
    assert sum(tensor.nbytes for tensor in kept) == 6 * sizes.state_bytes("float32", "cpu")
    assert sizes.cache_bytes_per_token("float32") == KVCache.block_bytes(cache.shapes, 1, torch.float32)


def test_large_states_lower_the_number_of_sequences_by_themselves(model, tmp_path, monkeypatch, caplog):
    """What is asked for stays; plan and sampler say the same."""
    model.net.save_pretrained(tmp_path)
    each = model_sizes(RunConfig(model=ModelConfig(path=str(tmp_path)))).state_bytes("float32", "cpu")
    monkeypatch.setattr(memory, "STATES_LIMIT", (5 * each, 0))
    engine = sampler(model, block_tokens=4)
    assert engine._scheduler.max_running == 4 == memory.running_limit(0, "cpu", each)
    assert "at most 4 sequences are drawn at once" in caplog.text
    assert all(len(tensor) == 5 for states in engine._cache.states if states for tensor in states)
    assert sampler(model, max_running=9)._scheduler.max_running == 9
    assert memory.running_limit(0, "cpu", 100 * each) == 1 and memory.running_limit(0, "cpu", 0) == 128


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(one, marks=needs_newer) for one in ("deepseek_v3", "gemma4_text")),
        "gemma3n_text",
        "gpt_bigcode",
        "gpt_oss",
    ],
)
def test_the_plan_counts_keys_and_values_as_layers_keep_them(name, tmp_path):
    """Compressed, shared with earlier layers, of other sizes in some layers, of one head."""
    net = make_net(name)
    net.config.save_pretrained(tmp_path)
    shapes = [call.shape for call in layer_calls(CausalLM(net))]
    sizes = model_sizes(RunConfig(model=ModelConfig(path=str(tmp_path))))
    assert sizes.cache_bytes_per_token("float32") == KVCache.block_bytes(shapes, 1, torch.float32)


def test_training_says_what_the_sampler_said(model):
    """In float32 on a CPU, apart by rounding alone: 5e-7 was measured."""
    asked = requests([np.arange(1, 60), np.arange(5, 12)], samples=2, max_tokens=60)
    drawn = run(sampler(model), asked)
    whole = [np.concatenate([r.tokens, drawn[r.uid].tokens]) for r in asked]
    with torch.no_grad():
        rows = [Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1)) for ids in whole]
        ours = model(collate(rows, torch.float32, "cpu")).logprobs_T.split([len(row.tokens) for row in rows])
    gaps = [own[len(r.tokens) - 1 :].numpy() - drawn[r.uid].logprobs for r, own in zip(asked, ours, strict=True)]
    gap = np.abs(np.concatenate(gaps)).max()
    assert gap < 3e-6
