"""The tokenizer made in code and the shapes it goes with."""

import string

import pytest

from skyrl.config.schema import TinyModelConfig
from skyrl.pretrained.tiny import tiny_config
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import UserError


def test_every_character_goes_there_and_back():
    tokenizer = tiny_tokenizer()
    text = "".join(chr(c) for c in range(32, 127)) + "\n\t  12 + 34 = ?\n\n " + string.printable[:95]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    for c in map(chr, range(32, 127)):
        assert tokenizer.decode(tokenizer.encode(c)) == c


def test_special_tokens():
    tokenizer = tiny_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.encode("\u00e9") == [2] and tokenizer.encode("7<eos>") == [tokenizer.encode("7")[0], 1]
    assert tokenizer.decode([*tokenizer.encode("7"), 1]) == "7<eos>"
    assert tokenizer.decode([*tokenizer.encode("7"), 1], skip_special_tokens=True) == "7"


def test_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Tom has 3 apples , he eats 2 .\n#### 1"
    assert again.encode(text) == tiny_tokenizer().encode(text) and again.decode(again.encode(text)) == text


def test_shapes():
    config = tiny_config(TinyModelConfig(vocab_size=128), 100)
    assert (config.vocab_size, config.head_dim, config.tie_word_embeddings) == (128, 64, True)
    for bad, match in ((dict(vocab_size=64), "model.tiny.vocab_size=64: the tokenizer has 100"),):
        with pytest.raises(UserError, match=match):
            tiny_config(TinyModelConfig(**bad), 100)
