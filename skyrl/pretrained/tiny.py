"""The model that needs no download: a small Qwen3 with random weights."""

from __future__ import annotations

from transformers import Qwen3Config

from skyrl.config.schema import TinyModelConfig
from skyrl.text.tokenizer import TINY_POSITIONS
from skyrl.types import UserError


def tiny_config(cfg: TinyModelConfig, tokenizer_size: int) -> Qwen3Config:
    """Qwen3 with tied embeddings in the shape of `cfg`. Raises UserError for fewer rows than the tokenizer needs."""
    assert cfg.hidden_size // cfg.num_heads % 2 == 0 and cfg.hidden_size % cfg.num_heads == 0, "validation.py has these"
    assert cfg.num_heads % cfg.num_kv_heads == 0, cfg
    if cfg.vocab_size and cfg.vocab_size < tokenizer_size:
        raise UserError(
            f"model.tiny.vocab_size={cfg.vocab_size}: the tokenizer has {tokenizer_size} entries; give 0, or no fewer"
        )
    return Qwen3Config(
        vocab_size=cfg.vocab_size or tokenizer_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.hidden_size // cfg.num_heads,
        max_position_embeddings=TINY_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.02,
    )
