"""Whole runs of trainer=dpo and trainer=reward_model on a tiny model, and the gradients of their steps against autograd
through the model, in float64."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo import run_ranks
from small import SMALL, distance, weights_of

from skyrl.config.load import load_config
from skyrl.loop import open_run
from skyrl.models.forward import collate
from skyrl.run_dir import read_metrics
from skyrl.sweep import play
from skyrl.trainers import dpo, reward_model
from skyrl.types import LossSpec, UserError

QUIET = [
    "eval.num_prompts=8", "eval.every_steps=0", "checkpoint.every_steps=0", "checkpoint.async_save=false",
    "checkpoint.export=false", "tracking.console=off", "optim.warmup_steps=0", "batch.prompts_per_step=6",
    "model.dtype=float64", "optim.grad_clip_norm=0",
]  # fmt: skip
ROWS = [
    {"prompt": "3+4=", "chosen": "7", "rejected": "8"},
    {"prompt": [{"role": "user", "content": "12+30="}], "chosen": "42", "rejected": "a much longer answer"},
    {
        "chosen": [{"role": "user", "content": "5+5="}, {"role": "assistant", "content": "10"}],
        "rejected": [{"role": "user", "content": "5+5="}, {"role": "assistant", "content": "11, or so"}],
    },
    {"prompt": "8+8=", "chosen": "16", "rejected": "1"},
    {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    {"prompt": "9+9=", "chosen": "18", "rejected": "8"},
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["rejected" if number % 3 else "chosen"], "label": number % 3 == 0}
    for number, row in enumerate([r for r in ROWS if "prompt" in r])
]


def config(folder, trainer, rows=ROWS, *more):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = [f"experiment={trainer}", *SMALL, *QUIET, f"data.path={file}", f"data.eval_path={file}"]
    warmup = [] if trainer == "reward_model" else ["warmup.num_steps=0"]
    return load_config([*base, *warmup, f"run.dir={folder / 'run'}", *more])


@contextmanager
def opened(cfg):
    """A run before its first step, whose policy is no copy of its reference."""
    with open_run(cfg) as run:
        run.create_models()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            for p in run.engine.models["policy"].strategy.module.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        yield run


def gradient(run):
    """What is pending, by name, as copies; it is cleared."""
    module = run.engine.models["policy"].strategy.module
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    run.engine.clear_gradient("policy")
    return found


def sums_of(run, rows, masks, model="policy"):
    """Sums of log-probabilities at the masked targets, each row in a forward pass of its own, with a graph."""
    module = run.engine.models[model].strategy.module
    return [
        (module(collate([row], torch.float64, "cpu")).logprobs_T * torch.tensor(mask)).sum()
        for row, mask in zip(rows, masks, strict=True)
    ]


def formula(cfg, policy, reference, lengths):
    """The mean loss of pairs that lie one after the other."""
    c, r, n_c, n_r = policy[0::2], policy[1::2], lengths[0::2], lengths[1::2]
    h = (c - reference[0::2]) - (r - reference[1::2])
    beta, name = cfg.beta, cfg.loss
    if name == "dpo":
        e = cfg.label_smoothing
        return (-(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)).mean()
    if name == "ipo":
        means = (c - reference[0::2]) / n_c - (r - reference[1::2]) / n_r
        return ((means - 1 / (2 * beta)) ** 2).mean()
    c, r = c / n_c, r / n_r
    if name == "simpo":
        return -F.logsigmoid(beta * (c - r) - cfg.gamma).mean()
    odds = c - r - (torch.log1p(-c.exp()) - torch.log1p(-r.exp()))
    return (-c - beta * F.logsigmoid(odds)).mean()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "simpo")]  # their formulas are held elsewhere


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto", *SLOW])
def test_the_gradient_is_autograds_whatever_the_micro_batches(tmp_path, loss):
    more = ["preference.label_smoothing=0.1"] if loss == "dpo" else []
    cfg = config(tmp_path, "dpo", JUDGED if loss == "kto" else ROWS, f"preference.loss={loss}", *more)
    with opened(cfg) as run:
        prompts = list(run.stream.prompts)
        rows, liked = dpo.answer_rows(run, prompts, pairs=loss != "kto")
        masks = [row.weights.copy() for row in rows]
        policy = torch.stack(sums_of(run, rows, masks))
        with torch.no_grad():
            reference = torch.stack(sums_of(run, rows, masks, "reference" if run.plan.needs_reference else "policy"))
        if loss == "kto":
            kl = dpo.mismatched_kl(run, prompts)
            ratio = policy - reference
            sign = torch.where(torch.tensor(liked), 1.0, -1.0).double()
            wanted = (1 - torch.sigmoid(sign * cfg.preference.beta * (ratio - kl))).mean()
        else:
            lengths = torch.tensor([mask.sum() for mask in masks])
            wanted = formula(cfg.preference, policy, reference, lengths)
        wanted.backward()
        expected = gradient(run)
        found = []
        for tokens, packing in ((8192, True), (12, True), (64, False)):
            object.__setattr__(run.engine.cfg.batch, "max_tokens_per_microbatch", tokens)
            object.__setattr__(run.engine.cfg.batch, "packing", packing)
            weighed, metrics = dpo.measure(run, prompts)
            assert metrics["loss:mean"] == pytest.approx(wanted.item(), rel=1e-12)
            run.engine.forward_backward(weighed, LossSpec("cross_entropy"))
            found.append(gradient(run))
    for one in found:
        assert distance(one, expected) < 1e-10
    assert float(expected["net.model.norm.weight"].abs().max()) > 1e-5


def test_a_reward_models_gradient_is_autograds(tmp_path):
    rows = [{**row, "margin": 0.25 * number} for number, row in enumerate(ROWS)]
    cfg = config(tmp_path, "reward_model", rows, "reward_model.center_coef=0.05")
    with opened(cfg) as run:
        prompts = list(run.stream.prompts)
        data, metrics = reward_model.measure(run, prompts)
        run.engine.forward_backward(data, LossSpec("value", {"clip": 0.0}))
        found = gradient(run)
        module = run.engine.models["policy"].strategy.module
        rewards = torch.stack([module(collate([row], torch.float64, "cpu")).values_T[-1] for row in data])
        c, r = rewards[0::2], rewards[1::2]
        loss = (-F.logsigmoid(c - r - 0.25 * torch.arange(6)) + 0.05 * (c + r) ** 2).mean()
        loss.backward()
        assert distance(found, gradient(run)) < 1e-10 and "value_head.bias" not in found
        assert metrics["loss:mean"] == pytest.approx(loss.item(), rel=1e-12)
        assert metrics["max_reward:max"] == pytest.approx(rewards.max().item(), rel=1e-12)


def trained(cfg):
    """A whole run on this rank: its weights."""
    kept, module = [], {"dpo": dpo, "reward_model": reward_model}[cfg.trainer]
    name = f"train_{cfg.trainer}"
    real = getattr(module, name)
    setattr(module, name, lambda run: (real(run), kept.append(weights_of(run.engine))))
    try:
        play(cfg, "train", sweep=False)
    finally:
        setattr(module, name, real)
    return kept[0]


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "more"), [("dpo", ["preference.loss=kto"]), ("reward_model", [])])
def test_two_ranks_learn_what_one_does(tmp_path, trainer, more):
    steps = ["batch.num_steps=2", *more]
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one = trained(config(folders[0], trainer, ROWS, *steps))
    two = run_ranks(2, trained, config(folders[1], trainer, ROWS, *steps))[0]
    assert distance(two, one) < 1e-12


@pytest.mark.parametrize("trainer", ["dpo", pytest.param("reward_model", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, trainer):
    """Also from a warm-up, after which the reference is what the warm-up left."""
    warmup = [] if trainer == "reward_model" else ["warmup.num_steps=2", "warmup.rows_per_step=4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    every = ["checkpoint.every_steps=1", "eval.every_steps=1", *warmup]
    wanted = trained(config(whole, trainer, ROWS, "batch.num_steps=3", *every))
    for steps in (1, 3):
        found = trained(config(parts, trainer, ROWS, f"batch.num_steps={steps}", *every))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    records = [read_metrics(folder / "run" / "metrics.jsonl") for folder in (whole, parts)]
    ours = [
        [{k: v for k, v in r.items() if not k.startswith(("time", "speed", "memory"))} for r in one] for one in records
    ]
    assert len(ours[0]) == (5 if warmup else 4) and ours[0] == ours[1]


def test_preferences_are_learned_and_named_as_trl_does(tmp_path):
    cfg = config(tmp_path, "dpo", ROWS, "batch.num_steps=12", "optim.lr=3e-3")
    accuracy = play(cfg, "train", sweep=False)
    first, *_, last = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "dpo" and r["step"]]
    assert last["loss:mean"] < first["loss:mean"] and accuracy == last["eval/rewards/accuracies:mean"] == 1.0
    assert last["rewards/margins:mean"] > 0 == first["rewards/margins:mean"]
    assert {"rewards/chosen:mean", "rewards/rejected:mean", "logps/chosen:mean", "logps/rejected:mean"} <= last.keys()


def test_the_export_is_the_judge_and_transformers_classifier(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from skyrl.judges.batch import RankTools
    from skyrl.judges.models import RewardModel
    from skyrl.types import Episode, Prompt, Sample, Turn

    more = ["batch.num_steps=3", "optim.lr=1e-2", "checkpoint.export=true", "model.dtype=float32"]
    cfg = config(tmp_path, "reward_model", ROWS, *more)
    kept = []
    real = reward_model.measure
    try:
        reward_model.measure = lambda run, prompts, *rest, **named: (
            kept.append(real(run, prompts, *rest, **named)) or kept[-1]
        )
        play(cfg, "train", sweep=False)
    finally:
        reward_model.measure = real
    rows, metrics = kept[-1]  # the last evaluation
    folder = tmp_path / "run" / "export"
    config_file = json.loads((folder / "config.json").read_text())
    assert config_file["architectures"] == ["Qwen3ForSequenceClassification"]
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_labels == 1
    with torch.no_grad():
        logits = [float(model(torch.tensor(row.tokens)[None]).logits[0, 0]) for row in rows]
    assert max(logits) == pytest.approx(metrics["eval/max_reward:max"], abs=1e-5)
    np.testing.assert_allclose(logits, [row.values[-1] for row in rows], atol=1e-5)

    def episode(answer):
        sample, asked = Sample("u", np.array([1]), np.zeros(1), "stop", 0), [{"role": "user", "content": "3+4="}]
        turn = Turn(np.array([1]), sample, text=answer, observed=asked)
        return Episode(Prompt("p/1", "e", []), 0, [turn], 0.0, "stop")

    tools = RankTools("cpu", lambda episodes: [], lambda conversations, max_tokens: [])
    scores = RewardModel(model=str(folder)).score([episode("7"), episode("8")], tools)
    np.testing.assert_allclose(scores, logits[0:2], atol=2e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "1+1=", "chosen": "2"}, ":7: field 'rejected' is missing; fields of this row: chosen, prompt"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": "2"}, ":7: 'chosen' and 'rejected' are the same text"),
        (
            {"prompt": "1+1=", "chosen": "2", "rejected": 3},
            ":7: field 'rejected' is 3, wanted a text or a list of messages",
        ),
        ({"prompt": "1+1=", "chosen": "2", "rejected": " "}, ":7: field 'rejected' has an empty text of 'assistant'"),
        (
            {"chosen": "2", "rejected": "3"},
            ":7: nothing is asked before 'chosen' and 'rejected'; give a field 'prompt'",
        ),
        ({"prompt": "1+1=", "completion": "2", "label": "yes"}, ":7: field 'label' is 'yes', wanted true"),
        (
            {"prompt": "1+1=", "completion": "2", "label": True, "chosen": "3", "rejected": "4"},
            ":7: has both 'completion' and 'chosen'; keep one",
        ),
        (
            {"prompt": "1+1=", "completion": "2", "label": True},
            ":7: no 'chosen' and 'rejected' to learn from; a single",
        ),
        (
            {"prompt": "1=", "chosen": "2", "rejected": "x" * 5000},
            ":7: 5003 tokens with an answer, and rows end at 4096",
        ),
        ({"prompt": "1=", "chosen": "2", "rejected": "3", "margin": "big"}, ":7: field 'margin' is 'big', wanted a"),
        (
            {"prompt": "1=", "chosen": [{"role": "user", "content": "2"}], "rejected": "3"},
            ":7: field 'chosen' has user after the prompt, wanted one answer of the assistant",
        ),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path, row, said):
    with pytest.raises(UserError) as refused:
        play(config(tmp_path, "dpo", [*ROWS, row]), "train", sweep=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["trainer=dpop"], "trainer=dpop: choose one of: rl, sft, dpo, reward_model, distill"),
        (["trainer=dpo", "algorithm.kl.coef=0.1"], "algorithm.kl.coef: trainer=dpo does not read it; leave it out"),
        (
            ["experiment=dpo", "preference.gamma=1"],
            "preference.gamma=1.0: has an effect only with preference.loss=simpo",
        ),
        (["experiment=dpo", "preference.label_smoothing=0.5"], "label_smoothing=0.5: must be below 0.5"),
        (
            ["experiment=dpo", "preference.loss=hinge"],
            "preference.loss=hinge: choose one of: dpo, ipo, simpo, orpo, kto",
        ),
        (["preference.beta=0.5"], "preference.beta=0.5: has an effect only with trainer=dpo"),
        (["experiment=dpo", "trainer=rl"], "env.name=preference: its rows are to be learned and give no reward"),
        (["experiment=distill"], "distill.teacher: no teacher is named"),
        (
            ["experiment=sft_chat", "warmup.num_steps=0"],
            "warmup.num_steps=0: supervised training needs at least 1 step",
        ),
        (
            ["experiment=dpo", "preference.loss=kto", *(f"preference.{name}desirable_weight=0" for name in ("", "un"))],
            "preference.desirable_weight=0: preference.undesirable_weight is 0 too",
        ),
        (
            ["experiment=dpo", "preference.loss=kto", "batch.prompts_per_step=1"],
            "batch.prompts_per_step=1: preference.loss=kto pairs each prompt with the answer to another one",
        ),
        (
            ["experiment=reward_model", "model.lora.rank=4"],
            "model.lora.rank=4: trainer=reward_model trains all weights",
        ),
        (["trainer=dpo"], "no 'chosen' and 'rejected' to learn from; such rows come with env.name=preference"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, said):
    with pytest.raises(UserError) as refused:
        play(load_config([*options, *SMALL, *QUIET[:6], f"run.dir={tmp_path}"]), "train", sweep=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)
