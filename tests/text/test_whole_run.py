"""A whole run on a folder as real chat models are: what ends a turn stands in generation_config.json alone."""

import json

import numpy as np
import torch
from loop import LOOP, train_here
from small_tokenizers import SPECIALS, characters
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from skyrl.config.load import load_config
from skyrl.run_dir import read_metrics

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<|{{ m['role'] }}|>"
    "\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
END = SPECIALS.index("<end_of_turn>")


def gemma_like(folder):
    """Tied embeddings, capped logits, a sliding window; <end_of_turn> is no end token of the tokenizer's."""
    tokenizer = characters()
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    net = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer) + 3, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
            sliding_window=16, query_pre_attn_scalar=16, eos_token_id=2, bos_token_id=1, pad_token_id=0, **sizes,
        )
    )  # fmt: skip
    net.generation_config = GenerationConfig(eos_token_id=[2, END], bos_token_id=1, pad_token_id=0)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_turns_end_where_generation_config_says_from_warm_up_to_export(tmp_path):
    gemma_like(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b), "solution": f" {a + b}\n"} for a in range(3) for b in range(3)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = load_config(
        [
            *LOOP, "experiment=custom", f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'train.jsonl'}",
            "env.name=single_turn", "env.options.reward=exact", f"run.dir={tmp_path / 'run'}", "run.threads=1",
            "batch.num_steps=1", "sampler.max_new_tokens=24", "warmup.num_steps=40", "warmup.rows_per_step=9",
            "warmup.lr=1e-2", "checkpoint.export=true",
        ]
    )  # fmt: skip
    supervised, *_, updated = train_here(cfg)
    for row in supervised.rows:  # trimmed as the template does it, ended by its own end, not by the tokenizer's
        assert row.targets[row.weights > 0].tolist()[1:] == [END] and row.tokens[0] == 1
    learned = [row.targets[row.weights != 0] for row in updated.rows]
    assert all((ids[:-1] != END).all() for ids in learned if len(ids))
    files = sorted((tmp_path / "run" / "rollouts").glob("*.jsonl"))  # of the step, and of two evaluations
    episodes = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    turns = [turn for episode in episodes for turn in episode["turns"]]
    ended = [turn["tokens"][-1] for turn in turns if turn["stop"] == "stop"]
    assert len(files) == 3 and len(ended) > len(turns) // 2 and END in ended
    for turn in turns:
        assert not set(turn["tokens"][:-1]) & {2, END}
        assert (turn["tokens"][-1] in (2, END)) == (turn["stop"] == "stop")
    assert max(episode["reward"] for episode in episodes) == 1.0  # the reward reads the answer without its end
    assert np.isfinite(read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["loss:sum"])
    exported = json.loads((tmp_path / "run" / "export" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [2, END]
