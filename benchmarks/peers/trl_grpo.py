"""The peer of rl_step.py: TRL's GRPOTrainer on the same shapes, in its fastest setting on a CPU. Needs trl, datasets.

bfloat16 weights, a static key/value cache, no reference model, no gradient checkpointing, one forward for a rank's
whole batch, the end token held back until the last position so that every completion has the same length. Prints one
line of JSON from rank 0: seconds of each measured step, sampling and the rest, and the most memory it has held in GiB.
--model: pretrained weights of a folder in place of the random ones; --lora: with an adapter of this rank on all linear
layers.

    torchrun --nproc_per_node=2 benchmarks/peers/trl_grpo.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for rl_prompts

import torch
from datasets import Dataset
from peft import LoraConfig
from rl_prompts import prompt_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer


def arguments() -> argparse.Namespace:
    """The same shapes that rl_step.py gives to both sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(prompts=8, samples=8, prompt_tokens=16, new_tokens=64, steps=10, warmup=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    for name, default in dict(layers=4, hidden=256, heads=4, kv_heads=2, ffn=704, vocab=512, threads=1).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", default="")
    parser.add_argument("--lora", type=int, default=0)
    return parser.parse_args()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones."""
    names = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def random_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Of the random model."""
    given: dict[str, Any] = {"attn_implementation": "sdpa"}  # which PreTrainedConfig takes and does not name
    return Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **given,
    )


def main() -> None:
    """Trains a few steps and prints their times."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    dtype = getattr(torch, args.dtype)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
    else:
        tokenizer = byte_tokenizer()
        model = Qwen3ForCausalLM(random_config(args, tokenizer)).to(dtype)
    count = args.prompts * (args.steps + args.warmup) + 64
    data = Dataset.from_list([{"prompt": text} for text in prompt_texts(args.model, count, args.prompt_tokens)])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_rank = args.prompts * args.samples // world
    clock = {"step": 0.0, "sample": 0.0}
    rows: list[tuple[float, float]] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.update(step=time.perf_counter(), sample=0.0)

        def on_step_end(self, *_, **__):
            rows.append((time.perf_counter() - clock["step"], clock["sample"]))

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *a, **k):
            start = time.perf_counter()
            out = super()._generate_single_turn(*a, **k)
            clock["sample"] += time.perf_counter() - start
            return out

    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=per_rank,
        num_generations=args.samples,
        max_completion_length=args.new_tokens,
        max_steps=args.steps + args.warmup,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        cache_implementation="static",
        generation_kwargs={"min_new_tokens": args.new_tokens},
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )

    def even(completion_ids, **_):
        return [sum(t % 2 == 0 for t in ids) / max(1, len(ids)) for ids in completion_ids]

    Timed(
        model=model,
        reward_funcs=even,
        args=options,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Steps()],
        peft_config=LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules="all-linear") if args.lora else None,
    ).train()
    if int(os.environ.get("RANK", "0")) == 0:
        measured = rows[args.warmup :]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            json.dumps({"step": [r[0] for r in measured], "sample": [r[1] for r in measured], "gib": memory}),
            flush=True,
        )


if __name__ == "__main__":
    main()
