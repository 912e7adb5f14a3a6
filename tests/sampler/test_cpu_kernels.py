"""The compiled kernels and the torch plan against the module path, in both number formats; building them."""

import dataclasses
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from skyrl import kernels
from skyrl.models.attention_calls import layer_calls
from skyrl.models.decode_plan import make_decode_plan
from skyrl.models.forward import CausalLM
from skyrl.planner.device import torch_release
from skyrl.sampler.make import disagreement, rounding
from skyrl.sampler.runners import cpu_kernels
from skyrl.sampler.runners.base import KVCache
from skyrl.sampler.runners.fused import FusedRunner
from skyrl.sampler.runners.paged import ModuleRunner
from skyrl.types import UserError
from tests.sampler.tools import prompts, qwen3, reference_logprobs, requests, run, sampler

BASE_KEY = Path(__file__).resolve().parents[2]
SIZES = dict(
    vocab_size=101, hidden_size=144, intermediate_size=112, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
KINDS = {
    "qwen2 biases": lambda: tf.Qwen2Config(**SIZES),
    "qwen3 80 channels": lambda: tf.Qwen3Config(**{**SIZES, "head_dim": 80}),
    "llama all biases": lambda: tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama one head each": lambda: tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 6, "head_dim": 16}),
    "mistral no window": lambda: tf.MistralConfig(**SIZES, sliding_window=None),
    "qwen3 one key head": lambda: tf.Qwen3Config(**{**SIZES, "num_key_value_heads": 1}),
}

needs_kernels = pytest.mark.skipif(bool(cpu_kernels.library()[1]), reason=cpu_kernels.library()[1])


def build(kind: str, dtype=torch.float32) -> CausalLM:
    torch.manual_seed(0)
    net = tf.AutoModelForCausalLM.from_config(KINDS[kind]()).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    return CausalLM(net).to(dtype)


@pytest.fixture(params=["fused", pytest.param("kernels", marks=needs_kernels)])
def path(request, monkeypatch):
    if request.param == "fused":
        monkeypatch.setattr("skyrl.sampler.make.unsupported_reason", lambda plan, cache: "off in this test")
    return request.param


@pytest.mark.parametrize("block_tokens", [16, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_plan_equals_module_in_float32(kind, path, block_tokens):
    model = build(kind)
    engine = sampler(model, backend="fused", block_tokens=block_tokens)
    assert engine.backend == path
    asked = requests(prompts(3), samples=2, max_tokens=12)
    drawn = run(engine, asked)
    module = run(sampler(model, backend="module"), asked)
    for request in asked:
        sample = drawn[request.uid]
        assert sample.tokens.tolist() == module[request.uid].tokens.tolist()
        expected = reference_logprobs(model, request.tokens, sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2 biases", "qwen3 80 channels"])
def test_bfloat16_is_as_close_to_float32_as_the_module(kind, path):
    """Scored against the float32 model of the same (rounded) weights, on the tokens each path drew."""
    model = build(kind, torch.bfloat16)
    exact = build(kind, torch.bfloat16).to(torch.float32)
    asked = requests(prompts(8), samples=4, max_tokens=16)

    def error(backend):
        engine = sampler(model, backend=backend)
        assert engine.backend == ("module" if backend == "module" else path)
        drawn = run(engine, asked)
        gaps = [drawn[r.uid].logprobs - reference_logprobs(exact, r.tokens, drawn[r.uid].tokens) for r in asked]
        return np.sqrt(np.mean(np.concatenate(gaps) ** 2))

    ours, theirs = error("fused"), error("module")
    assert theirs > 1e-3  # bfloat16 really rounds here
    assert ours < 1.25 * theirs


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_same_bits_in_any_batch_and_with_any_threads(dtype):
    model = build("qwen2 biases", dtype)
    asked = requests(prompts(5), samples=3)
    base = run(sampler(model, backend="fused"), asked)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        others = [
            run(sampler(model, backend="fused"), asked),
            run(sampler(model, backend="fused", max_running=2, block_tokens=7), asked),
            run(sampler(model, backend="fused", prefix_cache=False), asked[::-1]),
        ]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        for uid, sample in base.items():
            assert sample.tokens.tobytes() == other[uid].tokens.tobytes()
            assert sample.logprobs.tobytes() == other[uid].logprobs.tobytes()


@needs_kernels
def test_long_prefills_go_through_the_module(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LONGEST_PREFILL", 20)
    model = qwen3()
    asked = requests(prompts(6, low=10, high=40), samples=2)
    drawn = run(sampler(model, backend="fused"), asked)
    for request in asked:
        expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


@needs_kernels
def test_channels_that_do_not_fit_take_the_torch_plan():
    assert sampler(qwen3(head_dim=8), backend="fused").backend == "fused"


def test_float64_takes_the_module():
    model = qwen3(dtype=torch.float64)
    engine = sampler(model, backend="auto")
    assert engine.backend == "module"
    asked = requests(prompts(2), samples=2)
    drawn = run(engine, asked)
    for request in asked:
        tokens = drawn[request.uid].tokens
        logprobs = reference_logprobs(model, request.tokens, tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, logprobs, atol=1e-5, rtol=0)


def test_fused_is_refused_with_its_reason():
    config = tf.MistralConfig(**SIZES, sliding_window=4)
    model = CausalLM(tf.AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="sampler.backend=fused: .*window"):
        sampler(model, backend="fused")
    assert sampler(model, backend="auto").backend == "module"


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_a_plan_that_disagrees_with_the_module_is_not_used(backend, path, monkeypatch):
    """A family whose module does something the plan does not know of."""
    monkeypatch.setattr("skyrl.sampler.make._DISAGREEMENTS", {})
    model = qwen3()
    for layer in model.layers():
        layer.mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
    if backend == "auto":
        assert sampler(model, backend="auto").backend == "module"
    else:
        with pytest.raises(UserError, match="differ by"):
            sampler(model, backend="fused")


def _python(code: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1", **env}, cwd=BASE_KEY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


ASK = "from skyrl.sampler.runners.cpu_kernels import library; print(library())"


@needs_kernels
def test_two_ranks_build_once(tmp_path):
    ranks = [_python(ASK, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0 and "CDLL" in out, err
    assert len(list((tmp_path / "skyrl" / "kernels").glob("decode-*"))) == 1  # and no part of one


def test_a_file_system_without_locks_or_without_programs(tmp_path, monkeypatch):
    """NFS of some sites, a home without exec: kernels are compiled all the same, and found again."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { while [ "$1" != -o ]; do shift; done; echo so >"$2"; }\n')
    compiler.chmod(0o755)

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    built = kernels._build(str(compiler), tmp_path / "cache")
    assert built.read_text() == "so\n" and kernels._build(str(compiler), tmp_path / "cache") == built
    (built.parent / "lock").unlink()
    (built.parent / "lock").mkdir()  # a folder in which nothing can be written any more
    assert kernels._build(str(compiler), tmp_path / "cache") == built
    tried = []
    monkeypatch.setattr(kernels, "_build", lambda compiler, folder: tried.append(folder) or folder / "no.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.library.__wrapped__()[0] is None  # neither can be loaded here
    assert tried[0] == tmp_path / "skyrl" / "kernels" and "skyrl-kernels-" in str(tried[1])
    assert not tried[1].exists()

    def no_home():
        raise RuntimeError("Could not determine home directory.")  # a container's user without a name

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert "no.so" in kernels.library.__wrapped__()[1] and "skyrl-kernels-" in str(tried[2])


def test_without_compiler_or_when_switched_off(tmp_path):
    off, no = (_python(ASK, SKYRL_CPU_KERNELS=word) for word in ("0", "False"))
    none = _python(ASK, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), CXX="")
    fake = tmp_path / "bad" / "c++"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    fake.chmod(0o755)
    failing = _python(ASK, PATH=f"{fake.parent}:/bin:/usr/bin", CXX=str(fake), XDG_CACHE_HOME=str(tmp_path))
    reasons = "SKYRL_CPU_KERNELS=0", "SKYRL_CPU_KERNELS=False", "no C++ compiler", "no such flag"
    for process, reason in zip((off, no, none, failing), reasons, strict=True):
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0 and "None" in out and reason in out, out + err


@pytest.mark.slow
def test_narrower_vectors(tmp_path):
    """The kernels as a processor without AVX-512 has them: all tests of theirs."""
    if not any("avx2" in line and "fma" in line for line in Path("/proc/cpuinfo").read_text().splitlines()):
        pytest.skip("no AVX2 here")
    code = """
import sys, pytest, torch
from skyrl import kernels
kernels.FLAGS[kernels.FLAGS.index("-march=native")] = "-march=haswell"
assert kernels.library()[0].skyrl_lanes() == 8, kernels.library()[1]
here = ["tests/sampler/test_cpu_kernels.py", "tests/sampler/test_same_bits.py", "tests/sampler/test_adapters.py",
        "tests/kernels/test_exact_ops.py"]
sys.exit(pytest.main(["-q", "-m", "not slow", "-p", "no:cacheprovider", *here]))
"""
    process = _python(code, XDG_CACHE_HOME=str(tmp_path))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out[-2000:] + err[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plan_that_is_a_little_wrong_is_refused(dtype):
    """What rounding of the dtype gives is allowed, what a mistake gives is not."""
    model = qwen3(dtype=dtype, initializer_range=0.1)
    calls = layer_calls(model)
    cache = KVCache([call.shape for call in calls], 5, 16, dtype, torch.device("cpu"))
    right = make_decode_plan(model, calls, 128)
    plans = {
        "": right,
        "no norm": dataclasses.replace(
            right, layers=[dataclasses.replace(layer, qk_norms=None) for layer in right.layers]
        ),
        "one position on": dataclasses.replace(right, cos_LC=right.cos_LC.roll(1, 0), sin_LC=right.sin_LC.roll(1, 0)),
        "backwards": dataclasses.replace(right, sin_LC=-right.sin_LC),
        "scale": dataclasses.replace(right, scale=1.25 * right.scale),
        "layers": dataclasses.replace(right, layers=[right.layers[i] for i in (0, 2, 1)]),
    }
    allowed = rounding(dtype, len(calls), 48)
    with torch.no_grad():
        found = {
            name: disagreement(FusedRunner(plan, cache), ModuleRunner(model, cache), cache, 128, allowed)
            for name, plan in plans.items()
        }
    assert found.pop("") == "" and all("differ by" in reason for reason in found.values())


def test_a_float32_head_takes_the_rounding_of_logits_away(path):
    """The gap to the trainer in bfloat16 is smaller, and no logit of sampler or module is rounded to bfloat16."""
    gaps = []
    for float_head in (False, True):
        model = build("qwen2 biases", torch.bfloat16)
        model.float_head = float_head
        engine = sampler(model, backend="fused")
        asked = requests(prompts(3), samples=2, max_tokens=12)
        seen, decode = [], engine._runner.decode

        def looked_at(batch, decode=decode, seen=seen):
            logits = decode(batch)
            seen.append(logits.bfloat16().float().equal(logits))
            return logits

        engine._runner.decode = looked_at
        drawn = run(engine, asked)
        assert seen and all(rounded != float_head for rounded in seen)
        gaps.append(
            np.mean(
                [
                    np.abs(
                        drawn[one.uid].logprobs - reference_logprobs(model, one.tokens, drawn[one.uid].tokens)
                    ).mean()
                    for one in asked
                ]
            )
        )
    assert gaps[1] < gaps[0] or torch_release() < (2, 8)  # with 2.7: 0.016 against 0.015
