"""Tokenizers: loading one, what ends a turn, and text to ids and back without a character that nobody wrote.

A tokenizer writes or drops spaces at the ends of what it is given, since it takes that for a whole text. Most of what
passes here is a piece of a text: an answer, what follows it, a stop string. `encode_after` and `make_decode` give and
read ids as they stand inside the whole text. Imports without torch.
"""

from __future__ import annotations

import importlib.util
import json
import string
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl.config.schema import ModelConfig
from skyrl.hub.locate import locate
from skyrl.text.check import check_text
from skyrl.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TINY = "tiny"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TINY_VOCABULARY = (PAD, EOS, UNKNOWN, *"\n\t ", *string.digits, *string.ascii_letters, *string.punctuation)
TINY_POSITIONS = 4096  # of the model that model.path=tiny builds
BROKEN = "\ufffd"  # what a decoder writes for a character that is not whole yet
# What a fragment is put after where nothing is known of the text before it, or where that melts into it.
ANCHORS = ("\n", ".", "0", "a", "?", ")", "\u00e9")


class Decode(Protocol):
    """Ids to their text as it stands after other text: special tokens written out, every space as it is. Bytes that are
    no whole character come out as U+FFFD.

    `after`: the id before them, where it is known: some tokenizers put a space behind each special token, and that one
    is left out, there and within `tokens`, since nobody wrote it. `skip`: ids that are left out of the text."""

    def __call__(self, tokens: Sequence[int], after: int | None = None, skip: Set[int] = frozenset()) -> str: ...


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII, newline and tab, so decode(encode(x)) == x; others become <unk>.

    100 entries: <pad> 0, <eos> 1, <unk> 2, then the characters. Nothing is added at either end of a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(TINY_VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=TINY_POSITIONS,
    )


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `cfg`, with its chat template replaced if `model.chat_template` names a file.

    Raises: UserError for a tokenizer that cannot be read, or a missing template.
    """
    from transformers import AutoTokenizer

    source = cfg.tokenizer or cfg.path
    if source == TINY:
        tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()
    else:
        where = "model.tokenizer" if cfg.tokenizer else "model.path"
        folder = locate(source, "" if cfg.tokenizer else cfg.revision, where=where, weights=False)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
            if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers has made an empty one of the family
                raise ValueError("the folder holds no file of one")
        except Exception as error:  # the package tokenizers, in Rust, raises no more special one for a damaged file
            reason = " ".join(f"{error or type(error).__name__}".split())[:200]
            if (Path(folder) / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
                reason = "tokenizer.model is read by the package sentencepiece: pip install sentencepiece"
            raise UserError(
                f"{where}={source}: no tokenizer can be read there ({reason}); set model.tokenizer, or mend the folder"
            ) from error
    if cfg.chat_template:
        file = Path(cfg.chat_template)
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = "no such file" if not file.exists() else f"cannot be read ({getattr(error, 'strerror', error)})"
            said = f"model.chat_template={cfg.chat_template}: {why}"
            raise UserError(f"{said}; give a file with a Jinja template") from error
    return tokenizer


def end_tokens(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that end a turn, by id, each with who names it ("tokenizer, generation_config.json").

    The union of the tokenizer's end-of-sequence token and of `eos_token_id`, a number or a list, in the model's
    config.json and generation_config.json: many chat models name the token that ends a turn in the last one only. The
    tokenizer's own comes first. Raises UserError when nothing names one, or a file has something else there.
    """
    found: dict[int, list[str]] = {}
    if tokenizer.eos_token_id is not None:
        found[int(tokenizer.eos_token_id)] = ["tokenizer"]
    if cfg.path != TINY:
        folder = locate(cfg.path, cfg.revision, weights=False)
        for name in ("config.json", "generation_config.json"):
            for token in dict.fromkeys(_named_in(folder / name)):
                found.setdefault(token, []).append(name)
    if not found:
        raise UserError(
            f"model.tokenizer={cfg.tokenizer or cfg.path}: the tokenizer has no end-of-sequence token, and the model's "
            "config.json and generation_config.json name none; give a tokenizer that has one"
        )
    return {token: ", ".join(sources) for token, sources in found.items()}


def _named_in(path: Path) -> list[int]:
    """`eos_token_id` of a config file, of its part for text too; [] without the file or the field."""
    if not path.is_file():
        return []
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        parts = [config, config.get("text_config") or {}]
        values = [part.get("eos_token_id") for part in parts]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: no JSON object ({error}); put the model's own file back") from error
    found: list[int] = []
    for value in values:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{path}: eos_token_id={value!r}; allowed: a token id, or a list of them")
        found += ids
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as a whole, nothing added at its ends but what the tokenizer takes for part of the text."""
    return list(tokenizer(check_text(text), add_special_tokens=False, verbose=False)["input_ids"])


def encode_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """Ids of `text` as they stand in before + text: what follows the ids of `before` there.

    So no space is added that a tokenizer puts before a whole text (Metaspace, add_prefix_space), and one that a special
    token in front brings with it is. Where the border lies inside a token of the whole text, `text` is tokenised as
    after another character: what was drawn stays as it is.
    """
    if not text:
        return []
    for anchor in (before, *ANCHORS):
        known = encode(tokenizer, anchor) if anchor else []
        whole = encode(tokenizer, anchor + text) if known else []
        if known and whole[: len(known)] == known:
            return whole[len(known) :]
    return encode(tokenizer, text)


def make_decode(tokenizer: Any) -> Decode:
    """A Decode of this tokenizer, without any clean-up.

    A decoder drops the space before the first word of what it is given (SentencePiece), or joins tokens with spaces
    (word pieces); so ids are decoded behind a token whose text is known, and that text is taken off.
    """

    from tokenizers import decoders

    own = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    words = decoders.WordPiece(own.prefix, cleanup=False) if isinstance(own, decoders.WordPiece) else None

    def plain(tokens: Sequence[int]) -> str:
        if words is not None:  # a decoder with a clean-up of its own, which joins "f ( a )"
            return words.decode(tokenizer.convert_ids_to_tokens(list(tokens)))
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    anchor, joined = _decoding_anchor(tokenizer, plain)
    front = [] if anchor is None else [anchor]
    skipped = len(plain(front))

    def piece(tokens: Sequence[int], after: int | None) -> str:
        text = plain([*front, *tokens])[skipped:]
        return text.removeprefix(" ") if joined or after in spaced else text

    def decode(tokens: Sequence[int], after: int | None = None, skip: Set[int] = frozenset()) -> str:
        if joined:
            return piece([token for token in tokens if token not in skip], after)
        cuts = [place for place, token in enumerate(tokens, 1) if token in spaced or token in skip]
        text, start = "", 0
        for end in [*cuts, len(tokens)] if spaced or skip else [len(tokens)]:
            kept = tokens[start : end - 1] if end > start and tokens[end - 1] in skip else tokens[start:end]
            text += piece(kept, tokens[start - 1] if start else after) if len(kept) else ""
            start = end
        return text

    spaced: Set[int | None] = frozenset()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if added and decode(encode_after(tokenizer, str(next(iter(added.values()))), "a")).startswith(" "):
        spaced = {token for token, entry in added.items() if plain([token]).strip() == str(entry).strip()}  # no bytes
    return decode


def _decoding_anchor(tokenizer: Any, plain: Callable[[Sequence[int]], str]) -> tuple[int | None, bool]:
    """A token that others are decoded after, and whether the decoder puts a space between any two tokens."""
    likely = [token for text in ("a.", "x0", "1)", "ab") for token in encode(tokenizer, text)[::-1]]
    joined = None
    for token in [*likely, *range(min(len(tokenizer), 1000))]:
        text = plain([token])
        if not text.strip() or BROKEN in text or token in tokenizer.all_special_ids:
            continue
        twice = plain([token, token])
        if twice == 2 * text:
            return token, False
        if twice == f"{text} {text}" and joined is None:
            joined = token
    return joined, True
