"""Sampler and trainer on a CPU in float32 say the same about the same tokens, to the bit."""

import json

import numpy as np
import pytest
import torch
from launcher import python

from skyrl.config.load import load_config
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.kernels.exact_ops import has_packed_product
from skyrl.sampler.runners.cpu_kernels import library
from skyrl.types import Datum, SampleRequest, SamplingParams


@pytest.mark.skipif(library()[0] is None and not has_packed_product(torch.float32), reason="torch without oneDNN")
def test_a_model_with_large_weights():
    """Weights four times those of a fresh model amplify rounding as training does."""
    cfg = load_config(["run.threads=1"])
    engine = Engine(cfg, init_distributed(cfg), dtype="float32", strategy="single", max_row_tokens=64)
    engine.create("policy", ModelSpec())
    with torch.no_grad():
        for parameter in engine.models["policy"].strategy.module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(4, 90, 6) for _ in range(64)]
    with engine.sampling() as sampler:
        for seed, context in enumerate(contexts):
            sampler.add(SampleRequest(str(seed), context, SamplingParams(16, seed=seed)))
        drawn = {}
        while sampler.unfinished():
            drawn |= {sample.uid: sample for sample in sampler.step()}
    rows, said = [], []
    for seed, context in enumerate(contexts):
        sample = drawn[str(seed)]
        ids = np.concatenate([context, sample.tokens])
        rows.append(Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1)))
        said.append(sample.logprobs)
    scored = engine.score(rows, 1.0).logprobs
    gap = np.concatenate([ours[-len(theirs) :] - theirs for ours, theirs in zip(scored, said, strict=True)])
    assert len(gap) == 64 * 16 and np.abs(gap).max() <= (0 if library()[0] is not None else 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_recipe(tmp_path):
    """The whole default run, one process: the gap of the tokens it trains on, in every step."""
    done = python("run.dir=run", "tracking.console=off", cwd=tmp_path, timeout=1700)
    assert done.code == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [record["logprob_gap:max"] for record in records if "logprob_gap:max" in record]
    assert len(gaps) == 180 and max(gaps) == 0.0
