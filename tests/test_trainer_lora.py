"""The loop with model.lora: an adapter learns over a frozen base, on every layout, through resume, to its export."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from gloo import run_ranks
from loop import loop_config, train_here
from safetensors.torch import load_file, save_file
from small import distance, make_engine, make_rows, small_config
from transformers import AutoModelForCausalLM
from users import live_config, served, taken

from skyrl.checkpoint.folder import digest, latest
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine
from skyrl.evaluation import weight_check
from skyrl.loop import create_policy, export_checkpoint
from skyrl.run_dir import read_metrics
from skyrl.types import AdamParams, LossSpec, RunError, UserError

LORA = [
    "model.lora.rank=4",
    "optim.lr=1e-2",
    "optim.eps=1e-6",
    "warmup.num_steps=2",
    "warmup.rows_per_step=8",
    "warmup.lr=1e-2",
    "batch.num_steps=3",
    "algorithm.kl.coef=0.05",
    "checkpoint.export=true",
    "debug.check_weights_every=1",
    "debug.check_replicas_every=1",
]


def over(cfg, base):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=str(base)))


def config_over(base, folder, *overrides):
    return over(loop_config(folder, *LORA, *overrides), base)


def run_over(base, folder, *overrides):
    return train_here(config_over(base, folder, *overrides))


def engine_of(cfg):
    engine = Engine(cfg, init_distributed(cfg), dtype="float32", strategy="single", max_row_tokens=64)
    create_policy(engine)
    return engine


def adapter_of(folder):
    return load_file(folder / "export" / "adapter" / "adapter_model.safetensors")


def records_of(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss:sum" in record]


def losses_of(folder):
    return [(record["phase"], record["loss:sum"], record["grad_norm:mean"]) for record in records_of(folder)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder with larger weights than a fresh one, so that answers differ."""
    folder = tmp_path_factory.mktemp("base") / "model"
    engine = make_engine()
    with torch.no_grad():
        for parameter in engine.models["policy"].strategy.module.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    engine.export("policy", folder)
    return folder


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A whole run on one process, and its calls."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_over(base, folder)


@pytest.fixture(scope="module")
def half(base, tmp_path_factory):
    """The same run, to be gone on with after its third step."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run_over(base, folder, "batch.num_steps=1", "checkpoint.export=false")
    return folder


def copied(half, folder):
    return shutil.copytree(half, folder, ignore=shutil.ignore_patterns("lock"))


# ---- learning


def test_the_adapter_learns_in_both_phases_and_alone_is_saved(whole):
    folder, _ = whole
    assert [phase for phase, *_ in losses_of(folder)] == ["warmup"] * 2 + ["rl"] * 3
    assert all(norm > 0 for *_, norm in losses_of(folder))
    assert max(record["logprob_gap:max"] for record in records_of(folder)[2:]) < 3e-5
    info = latest(folder / "checkpoints")
    saved = dcp.FileSystemReader(info.path).read_metadata().state_dict_metadata
    assert (
        len(saved) == 3 * (len(adapter_of(folder)) + 1) + 2
    )  # the tied head stands there whole, not as A and B and all(name.startswith("policy/") for name in saved)
    assert info.state["models"] == ["policy"] and len(info.state["base"]) == 16


def test_kl_is_measured_to_the_bare_base(base, whole):
    folder, calls = whole
    rows = [row for call in calls[2:] for row in call.rows]
    engine = engine_of(over(small_config(), base))
    for row, logprobs in zip(rows, engine.score(rows, 1.0).logprobs, strict=True):
        np.testing.assert_allclose(row.reference, logprobs, atol=1e-5)
    assert abs(records_of(folder)[2]["kl/behaviour_reference:mean"]) > 1e-3, "the warm-up has moved the policy"


def train_all(configs):
    for cfg in configs:
        train_here(cfg)


@pytest.mark.ranks
def test_layouts_give_the_same_adapter_and_a_sharded_run_goes_on_from_a_whole_one(base, whole, half, tmp_path):
    folder, _ = whole
    kinds = {"ddp": "ddp", "fsdp": "fsdp", copied(half, tmp_path / "half").name: "fsdp"}
    run_ranks(2, train_all, [config_over(base, tmp_path / name, f"strategy.name={k}") for name, k in kinds.items()])
    for name in kinds:
        assert distance(adapter_of(tmp_path / name), adapter_of(folder)) < 1e-5, name
        for (phase, loss, norm), (other, other_loss, other_norm) in zip(
            losses_of(folder), losses_of(tmp_path / name), strict=True
        ):
            assert phase == other and loss == pytest.approx(other_loss, abs=1e-5)
            assert norm == pytest.approx(other_norm, rel=1e-4)


# ---- resume


def test_resume_is_bit_for_bit(base, whole, half, tmp_path):
    """Also from a release that lacked an option."""
    folder, _ = whole
    here = copied(half, tmp_path / "run")
    manifest = latest(here / "checkpoints").path / "manifest.json"
    said = json.loads(manifest.read_text())
    said["config_digest"] = "another"
    del said["state"]["config"]["model"]["lora"]["alpha"]
    said["digest"] = digest({key: value for key, value in said.items() if key != "digest"})
    manifest.write_text(json.dumps(said))
    run_over(base, here)
    want, found = adapter_of(folder), adapter_of(here)
    assert len(found) == len(want) and all(torch.equal(found[name], tensor) for name, tensor in want.items())
    assert losses_of(folder) == losses_of(here)


def test_another_base_under_a_saved_adapter_is_refused(base, half, tmp_path):
    here, weights = copied(half, tmp_path / "run"), load_file(base / "model.safetensors")
    other = copied(base, tmp_path / "other")
    next(iter(weights.values()))[0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    base.rename(base.with_name("kept"))
    other.rename(base)
    try:
        with pytest.raises(UserError, match="holds other weights than those that checkpoint .* has an adapter for"):
            run_over(base, here, "run.allow_different=[model]")
        with pytest.raises(UserError, match="holds other weights"):
            export_checkpoint(latest(here / "checkpoints").path, tmp_path / "out")
    finally:
        shutil.rmtree(base)
        base.with_name("kept").rename(base)
    with pytest.raises(UserError, match=r"model.lora.rank: 4 -> 0"):
        run_over(base, here, "model.lora.rank=0", "debug.check_replicas_every=0")


# ---- export


def logits(model):
    with torch.no_grad():
        return model(torch.arange(4, 40)[None]).logits


def test_the_export_is_what_was_trained(base, whole, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = whole
    export = folder / "export"
    merged = AutoModelForCausalLM.from_pretrained(export)
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), export / "adapter")
    assert not merged.config.tie_word_embeddings and (logits(merged) - before).abs().max() > 0.05
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-4
    said = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base) and said["lora_alpha"] == 32 and said["r"] == 4
    export_checkpoint(latest(folder / "checkpoints").path, tmp_path / "again")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes()
    engine, rows = engine_of(over(small_config(), export)), make_rows()  # and as the base of the next run
    for row, logprobs in zip(rows, engine.score(rows, 1.0).logprobs, strict=True):
        with torch.no_grad():
            theirs = merged(torch.from_numpy(row.tokens)[None]).logits[0].log_softmax(-1)
        theirs = theirs.gather(1, torch.from_numpy(row.targets)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, theirs.numpy(), atol=1e-4)


# ---- proof


def test_the_sampler_follows_the_adapter_and_the_proof_sees_when_not():
    engine = engine_of(small_config("model.lora.rank=4"))
    for step in range(3):
        with engine.sampling() as sampler:
            probe = weight_check.sample_probe(engine, sampler, step)
            assert {sample.version for sample in probe.samples} == {step}
        weight_check.check_copies(engine)
        assert weight_check.check_probe(engine, probe) < 1e-5
        engine.forward_backward(make_rows(step), LossSpec("cross_entropy"))
        engine.optim_step("policy", AdamParams(lr=0.3))
        with pytest.raises(RunError, match="the sampler does not draw from the trained weights"):
            weight_check.check_probe(engine, probe)  # drawn before the update
    with torch.no_grad():
        next(engine.models["policy"].strategy.module.parameters()).fill_(float("nan"))
    with engine.sampling() as sampler, pytest.raises(RunError, match="the adapter gives logits that are not finite"):
        weight_check.sample_probe(engine, sampler, 9)


def serve_and_learn(folder, *overrides):
    """Each rank's rows by update: (name, largest gap between what was drawn with and the weights that learn)."""
    cfg, told = live_config(folder, *overrides), []
    if os.environ["RANK"] == "0":
        calls, told = served(cfg)
    else:
        calls = train_here(cfg)
    gaps = [
        [
            (row.name, float(np.abs(row.old_logprobs - row.sampling_logprobs)[row.weights != 0].max()))
            for row in call.rows
        ]
        for call in calls
    ]
    return gaps, [code for code, _ in told]


def test_ranks_serve_the_very_weights_that_learn(tmp_path):
    layout = ["model.lora.rank=2", "strategy.name=fsdp", "batch.num_steps=2", "optim.lr=0.1"]
    (first, codes), (second, _) = run_ranks(2, serve_and_learn, tmp_path, *layout)
    rows = taken(tmp_path, (1, 2))
    for step, part in enumerate(rows):
        gaps = dict(first[step] + second[step])
        assert sorted(gaps) == sorted(f"{episode}/0/0" for episode, _ in part)
        for episode, version in part:
            assert (gaps[f"{episode}/0/0"] < 1e-4) == (version == step), (step, version, gaps)
    assert set(codes) == {200} and all(part[-1][1] == step for step, part in enumerate(rows))
