"""Supervised training on conversations, and distillation: what is learned of a row, gradients against autograd through
both models in float64, ranks, going on."""

import json

import numpy as np
import pytest
import torch
from gloo import run_ranks
from small import SMALL, distance, weights_of
from small_tokenizers import byte_level

from skyrl.checkpoint.folder import latest
from skyrl.config.load import load_config
from skyrl.distributed.collectives import MetricSums
from skyrl.engine import ModelSpec
from skyrl.loop import open_run
from skyrl.models.forward import collate
from skyrl.run_dir import read_metrics
from skyrl.sweep import play
from skyrl.text.chat import Chat
from skyrl.trainers import distill, sft
from skyrl.trainers.experience import frozen_source
from skyrl.types import Datum, UserError

QUIET = [
    "eval.num_prompts=8", "eval.every_steps=0", "checkpoint.every_steps=0", "checkpoint.async_save=false",
    "checkpoint.export=false", "tracking.console=off", "tracking.rollouts_every=0", "model.dtype=float64",
    "optim.grad_clip_norm=0",
]  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4 it is"},
]


def test_only_the_assistants_turns_are_learned_with_their_ends():
    tokenizer = byte_level()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = CHATML
    chat = Chat(tokenizer)
    ids, learned = chat.conversation(TURNS)
    whole = chat.render(TURNS, answer_next=False).removesuffix("\n")
    assert tokenizer.decode(ids) == whole and ids.tolist() == tokenizer(whole)["input_ids"]
    spans, before = [], False
    for token, mine in zip(ids.tolist(), learned, strict=True):
        if mine and not before:
            spans.append([])
        if mine:
            spans[-1].append(token)
        before = mine
    assert [tokenizer.decode(span) for span in spans] == ["Hi.<|im_end|>", "4 it is<|im_end|>"]


def chat_config(folder, rows, *more):
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.path={file}", f"data.eval_path={file}", f"run.dir={folder / 'run'}", "warmup.rows_per_step=2"]
    return load_config(["experiment=sft_chat", *SMALL, *QUIET, *given, *more])


CHATS = [
    {"messages": TURNS[1:]},
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": [{"role": "user", "content": "5="}], "completion": [{"role": "assistant", "content": "5"}]},
]


@pytest.mark.parametrize(
    ("train_on", "learned"), [("all", "Hi.^4 it is^"), pytest.param("last", "4 it is^", marks=pytest.mark.slow)]
)
def test_rows_of_conversations_and_epochs(tmp_path, train_on, learned):
    cfg = chat_config(tmp_path, CHATS, "data.epochs=2", f"env.options.train_on={train_on}", "data.shuffle=false")
    kept, real = [], sft.solution_row
    try:
        sft.solution_row = lambda run, prompt: kept.append((run.engine.tokenizer, real(run, prompt))) or kept[-1][1]
        play(cfg, "train", sweep=False)
    finally:
        sft.solution_row = real
    tokenizer, row = kept[0]
    said = [int(token) for token, weight in zip(row.targets, row.weights, strict=True) if weight]
    assert tokenizer.decode(said).replace("<eos>", "^") == learned
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3]  # two passes over three rows, two rows a step
    assert 4 < records[-1]["eval/nll:mean"] < 4.7 and "eval/accuracy:mean" not in records[-1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": TURNS[1:4]}, ":4: no solution to learn from; give it one"),
        ({"messages": TURNS[2:]}, ":4: an assistant's message answers nothing; put a user's before it"),
        ({"messages": TURNS[1:], "completion": "2"}, ":4: has both 'messages' and 'completion'; keep one"),
        ({"prompt": "2"}, ":4: no solution to learn from; give it one"),
        ({"messages": [{"role": "User", "content": "2"}]}, ":4: field 'messages' has role 'User' in entry 0"),
        ({"messages": [*TURNS[1:4], {"role": "assistant", "content": ""}]}, ":4: field 'messages' has an empty text"),
        ({"prompt": "2", "completion": "9" * 5000}, ":4: 5002 tokens with its solution, and rows end at 4096"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, row, said):
    with pytest.raises(UserError) as refused:
        play(chat_config(tmp_path, [*CHATS, row]), "train", sweep=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)


# ---- distillation


def distill_config(folder, *more):
    steps = ["batch.num_steps=2", "batch.prompts_per_step=4", "optim.warmup_steps=0", "warmup.num_steps=0"]
    given = ["distill.teacher=tiny", f"run.dir={folder / 'run'}", "sampler.max_new_tokens=6"]
    return load_config(["experiment=distill", *SMALL, *QUIET, *steps, *given, *more])


def stir(model, seed):
    """Moves all weights of a model, so that two of the same seed differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.strategy.module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def made_rows():
    rng = np.random.default_rng(1)
    rows = []
    for length in (7, 3, 12):
        ids = rng.integers(4, 90, length + 1)
        rows.append(Datum(ids[:-1], ids[1:], (rng.random(length) < 0.6).astype(float), name=f"r{length}"))
    return rows


@pytest.mark.parametrize(("beta", "top_k"), [(1.0, 0), (0.4, 5), pytest.param(0.0, 5, marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_divergence_of_both_models(tmp_path, beta, top_k):
    cfg = distill_config(tmp_path, f"distill.beta={beta}", f"distill.teacher_top_k={top_k}", "sampler.temperature=0.8")
    with open_run(cfg) as run:
        engine = run.engine
        engine.create("teacher", ModelSpec(trainable=False, source=cfg.model))
        stir(engine.models["teacher"], 5)
        rows = made_rows()
        count = sum(np.count_nonzero(row.weights) for row in rows)
        student, teacher = (engine.models[name].strategy.module for name in ("policy", "teacher"))
        total = 0.0
        for row in rows:
            wide = Datum(row.tokens, np.tile(np.arange(100), (len(row.tokens), 1)), np.ones((len(row.tokens), 100)))
            batch = collate([wide], torch.float64, "cpu")
            p, q = (module(batch, temperature=0.8).logprobs_T for module in (student, teacher))
            if top_k:
                ids = q.topk(top_k).indices
                p, q = (x.gather(1, ids) for x in (p, q))
                p, q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (p, q))
            m = torch.log(beta * q.exp() + (1 - beta) * p.exp())
            kl = {0.0: (q.exp() * (q - p)), 1.0: (p.exp() * (p - q))}
            both = beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)
            total = total + (kl.get(beta, both).sum(1) * torch.tensor(row.weights)).sum() / count
        total.backward()
        expected = {name: p.grad.clone() for name, p in student.named_parameters()}
        for cells, tokens in ((1 << 24, 8192), (600, 10)):
            engine.clear_gradient("policy")
            distill.CELLS = cells
            object.__setattr__(engine.cfg.batch, "max_tokens_per_microbatch", tokens)
            sums = MetricSums()
            distill.learn(run, rows, count, sums)
            found = {name: p.grad.clone() for name, p in student.named_parameters()}
            assert distance(found, expected) < 1e-10
            assert sums.result(run.world)["distill/divergence:mean"] == pytest.approx(total.item(), rel=1e-10)
        distill.CELLS = 1 << 24


def distilled(cfg):
    """A whole run on this rank with a teacher that is not the student: its weights."""
    kept, real = [], distill.train_distill

    def spy(run):
        create = run.engine.create

        def stirred(name, spec):
            create(name, spec)
            if name == "teacher":
                stir(run.engine.models[name], 7)

        run.engine.create = stirred
        real(run)
        kept.append(weights_of(run.engine))

    distill.train_distill = spy
    try:
        play(cfg, "train", sweep=False)
    finally:
        distill.train_distill = real
    return kept[0]


@pytest.mark.slow
def test_a_student_comes_nearer_and_goes_on_bit_for_bit(tmp_path):
    """Half of the steps on its own answers, half on solutions; the teacher is in no checkpoint."""
    more = ["distill.on_policy=0.5", "distill.beta=0.5", "distill.teacher_top_k=20", "optim.lr=5e-3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = distilled(distill_config(whole, *more, "batch.num_steps=6"))
    for steps in (2, 6):
        found = distilled(distill_config(parts, *more, f"batch.num_steps={steps}"))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    records = read_metrics(whole / "run" / "metrics.jsonl")
    assert records[-1]["eval/divergence:mean"] < 0.9 * records[0]["eval/divergence:mean"]
    assert not any("eval/accuracy:mean" in one for one in records)  # conversations are not scored
    sampled = [r.get("sampled_tokens:sum", 0) > 0 for r in records if r["step"]]
    assert any(sampled) and not all(sampled)
    newest = latest(whole / "run" / "checkpoints")
    assert newest is not None and newest.state["models"] == ["policy"]


@pytest.mark.slow
def test_two_ranks_distill_what_one_does(tmp_path):
    one = distilled(distill_config(tmp_path / "one"))
    two = run_ranks(2, distilled, distill_config(tmp_path / "two"))[0]
    assert distance(two, one) < 1e-12


def test_a_teacher_with_another_tokenizer_is_refused_by_name(tmp_path):
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    cfg = distill_config(tmp_path)
    with (
        open_run(cfg) as run,
        pytest.raises(UserError, match="distill.teacher: .* has another tokenizer than"),
    ):
        frozen_source(run, str(tmp_path / "other"), "distill.teacher")
