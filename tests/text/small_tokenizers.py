"""Tokenizers of every kind that pieces of text are tokenised by, made in code: a few hundred entries each."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|EOT|>", "<end_of_turn>")
CORPUS = [
    "The sum of 12 and 30 is 42.", "user: what is 7+5 ?\nassistant: 12\n", "if x != y : f ( a , b ) .", "a  b   c",
    "hello hello hello there, this is the answer to the question", "\n\nguess a number between 1 and 20: 13 is too low",
] * 3  # fmt: skip


def wrapped(core: Tokenizer, *, bos: bool = False, **more) -> PreTrainedTokenizerFast:
    """`core` with the special tokens. bos: the tokenizer puts <s> before a text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **more
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[4:])})
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def byte_level(add_prefix_space: bool = False, **more) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS, trainer)
    return wrapped(core, **more)


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def metaspace(scheme: str = "always", *, split: bool = True, model: str = "bpe", **more) -> PreTrainedTokenizerFast:
    """SentencePiece-like: a space is a character of words, put before a text too; bytes where one is unknown."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>") if model == "bpe" else models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    if model == "bpe":
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIALS, *BYTES])
    else:
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=[*SPECIALS, *BYTES], unk_token="<unk>")
    core.train_from_iterator(CORPUS, trainer)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if scheme != "never" else []))
    return wrapped(core, **more)


def llama2(**more) -> PreTrainedTokenizerFast:
    """As Llama 2's own file: the normalizer writes the spaces, nothing is split into words."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIALS, *BYTES]))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.pre_tokenizer = None
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(core, **more)


def word_piece(**more) -> PreTrainedTokenizerFast:
    """Words and ##pieces: the decoder writes a space between words."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(SPECIALS)))
    return wrapped(core, **more)


def characters(specials: tuple[str, ...] = SPECIALS, **more) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: i for i, token in enumerate([*specials, *"\n\t ", *string.printable[:94], "\u00e9", "\u65e5"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return wrapped(core, **more)


KINDS = {
    "byte level": byte_level,
    "byte level, space": lambda **more: byte_level(True, **more),
    "byte level, bos": lambda **more: byte_level(bos=True, **more),
    "metaspace always": metaspace,
    "metaspace first": lambda **more: metaspace("first", **more),
    "metaspace never": lambda **more: metaspace("never", **more),
    "metaspace always, whole": lambda **more: metaspace("always", split=False, **more),
    "unigram first": lambda **more: metaspace("first", model="unigram", **more),
    "unigram always, bos": lambda **more: metaspace("always", model="unigram", bos=True, **more),
    "llama 2": llama2,
    "characters": characters,
    "word pieces": word_piece,
}
