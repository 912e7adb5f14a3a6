"""A working directory that imitates the model hub: what the SDK and the cookbook look up by name lies under it.

`Qwen/Qwen3-8B` is a Qwen3 of random weights, small enough for seconds on a CPU, with a byte-level tokenizer of 268
entries that has the special tokens of the qwen3 renderers. Server and clients read the same folder.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODEL = "Qwen/Qwen3-8B"
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>".split()
# As in Qwen3's own tokenizer these are single tokens but not special: renderers write them as text.
WORDS = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Any:
    """256 bytes and 12 special tokens; nothing is added at either end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(folder: Path, *, hidden: int = 64, layers: int = 2, positions: int = 4096, seed: int = 0) -> Path:
    """Writes config, random weights and tokenizer of a small Qwen3; the same bytes for the same arguments."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        # Embeddings of norm 1 per channel: at 0.02 the first layers see next to nothing of the token's identity.
        model.model.embed_tokens.weight.normal_()
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_hub(folder: Path, *, weights: Path | None = None, aliases: Iterable[str] = (), **model: Any) -> Path:
    """`folder` with the model and links for further names to it. Returns `folder`.

    weights: a trained model with the same tokenizer, which then stands under MODEL instead of a random one.
    """
    if weights is None:
        weights = make_model(folder / MODEL, **model)
    else:
        aliases = (MODEL, *aliases)
    for name in aliases:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(weights.resolve(), target_is_directory=True)
    return folder


# ---- data sets of the recipes' shapes


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def gsm8k_folder() -> Path | None:
    """Where GSM8K's train.jsonl and test.jsonl lie, if they are here."""
    root = Path(__file__).resolve().parents[2]
    for data in (os.environ.get("SKYRL_TEST_DATA"), root.parent / "shared" / "data"):
        if data and (Path(data) / "gsm8k" / "train.jsonl").exists():
            return Path(data) / "gsm8k"
    return None


COLOURS = "red green blue white black brown grey pink".split()
THINGS = "ball box cup hat door car ship tree".split()


def _talk(draw: random.Random) -> list[dict[str, str]]:
    colour, thing = draw.choice(COLOURS), draw.choice(THINGS)
    return [
        {"role": "user", "content": f"Say that the {thing} is {colour}."},
        {"role": "assistant", "content": f"The {thing} is {colour}."},
    ]


def add_data(hub: Path, *, rows: int = 512, seed: int = 0) -> None:
    """Small stand-ins for what the recipes load, generated; GSM8K's own questions where they can be had, else sums of
    the same shape. Each split holds more than one batch of the recipes' small settings."""
    draw = random.Random(seed)
    talks = [{"messages": _talk(draw), "prompt": "", "prompt_id": str(i), "category": "Chat"} for i in range(rows)]
    write_lines(hub / "HuggingFaceH4/no_robots/train.jsonl", talks)
    write_lines(hub / "HuggingFaceH4/no_robots/test.jsonl", talks[: rows // 4])
    write_lines(hub / "talks.jsonl", [{"messages": row["messages"]} for row in talks])

    gsm8k = gsm8k_folder()
    for split in ("train", "test"):
        lines = (gsm8k / f"{split}.jsonl").read_text().splitlines()[:rows] if gsm8k else _sum_questions(draw, rows)
        target = hub / "openai/gsm8k/main" / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines) + "\n")
    files = [{"split": split, "path": f"main/{split}.jsonl"} for split in ("train", "test")]
    header = json.dumps([{"config_name": "main", "data_files": files}])
    (hub / "openai/gsm8k/README.md").write_text(f"---\nconfigs: {header}\n---\n")

    pairs = [_preference(draw) for _ in range(rows)]
    write_lines(hub / "Anthropic/hh-rlhf/train.jsonl", pairs)
    write_lines(hub / "Anthropic/hh-rlhf/test.jsonl", pairs[: rows // 4])
    problems = [
        {"question": f"What is {i} + {i}?", "final_answer": str(2 * i), "answer": str(2 * i)} for i in range(rows)
    ]
    write_lines(hub / "zwhe99/DeepMath-103K/train.jsonl", problems)
    tests = [{"problem": row["question"], "answer": row["answer"], "solution": ""} for row in problems[:32]]
    write_lines(hub / "HuggingFaceH4/MATH-500/test.jsonl", tests)
    write_lines(hub / "distilled.jsonl", [{"messages": _language(draw)} for _ in range(rows)])


def _sum_questions(draw: random.Random, rows: int) -> list[str]:
    lines = []
    for _ in range(rows):
        a, b = draw.randrange(50), draw.randrange(50)
        lines.append(json.dumps({"question": f"Tom has {a} and gets {b}. How many?", "answer": f"#### {a + b}"}))
    return lines


def _preference(draw: random.Random) -> dict[str, str]:
    colour, thing = draw.choice(COLOURS), draw.choice(THINGS)
    question = f"\n\nHuman: What colour is the {thing}?\n\nAssistant: "
    return {"chosen": f"{question}It is {colour}, I think.", "rejected": f"{question}Go away, I will not say {colour}."}


def _language(draw: random.Random) -> list[dict[str, str]]:
    word, label = draw.choice([("hello", "en"), ("bonjour", "fr"), ("hallo", "de"), ("hola", "es")])
    return [{"role": "user", "content": word}, {"role": "assistant", "content": label}]
