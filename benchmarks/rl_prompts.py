"""Prompts that both sides of rl_step.py read as the same number of tokens."""

from __future__ import annotations

import numpy as np


def prompt_texts(model: str, count: int, num_tokens: int) -> list[str]:
    """`count` texts of `num_tokens` tokens each: random letters for the byte tokenizer of the random model, words that
    are one token each for the tokenizer in the folder `model`."""
    rng = np.random.default_rng(0)
    if not model:
        return ["".join(map(chr, row)) for row in rng.integers(97, 123, (count, num_tokens))]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [str(tokenizer.decode([i])) for i in range(1000, 20000)]
    words = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    made = ["".join(words[i] for i in row) for row in rng.integers(0, len(words), (count, num_tokens))]
    assert all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) == num_tokens for text in made)
    return made
