"""Pieces of text have the ids that they have in the whole text, and drawn ids read as they stand there."""

import json
import random

import pytest
from small_tokenizers import KINDS, characters, metaspace, word_piece
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from skyrl.config.schema import ModelConfig
from skyrl.sampler.stop import StringStop
from skyrl.text.tokenizer import encode, encode_after, end_tokens, load_tokenizer, make_decode, tiny_tokenizer
from skyrl.types import UserError


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


PIECES = [
    ("7+5=", "12"), ("user: what is 7+5 ?\nassistant:", " it is 42."), ("the answer is 13</s>", "\nuser: low"),
    ("<|assistant|>", "a  b"), ("12", "</s>\n<|user|>hello"), ("so \U0001f600", "\U0001f600 there"), ("f (", " a"),
]  # fmt: skip


def test_pieces_have_the_ids_of_the_whole_text(tokenizer):
    agree = 0
    for before, text in PIECES:
        known, whole = encode(tokenizer, before), encode(tokenizer, before + text)
        if whole[: len(known)] == known:  # else the border lies inside a token
            agree += 1
            assert known + encode_after(tokenizer, before, text) == whole, (before, text)
    assert agree >= len(PIECES) - 1


def test_a_border_inside_a_token_adds_no_space(tokenizer):
    decode = make_decode(tokenizer)
    for before, text in [("assistant: ", "12"), ("hel", "lo there"), ("\n", "a  b"), ("", "hello")]:
        ids = encode_after(tokenizer, before, text)
        assert decode(ids) == decode(encode_after(tokenizer, ".", text)), (before, text)
        assert not decode(ids).startswith(" ")


def test_ids_read_as_they_stand_in_the_text(tokenizer):
    decode = make_decode(tokenizer)
    if tokenizer.backend_tokenizer.model.__class__.__name__ != "WordPiece":  # it keeps no spaces
        for text in (" 13 is too low", "if x != y : f ( a , b ) .", "a\n<|EOT|>", "\U0001f600\U0001f600"):
            ids = encode_after(tokenizer, "user:", text)
            assert tokenizer.unk_token_id in ids or decode(ids) == text
    special = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert decode(encode_after(tokenizer, "<|assistant|>", "12"), special) == "12"


def test_word_pieces_are_joined_as_their_decoder_does():
    tokenizer = word_piece()
    decode = make_decode(tokenizer)
    ids = encode(tokenizer, "hello there , question")
    assert decode(ids) == "hello there , question" and decode(ids[1:]) == "there , question"


def test_no_clean_up():
    tokenizer = characters(clean_up_tokenization_spaces=True)
    text = "if x != y : f ( a , b ) ."
    assert tokenizer.decode(encode(tokenizer, text)) != text
    assert make_decode(tokenizer)(encode(tokenizer, text)) == text
    pieces = word_piece()
    pieces.backend_tokenizer.decoder = decoders.WordPiece(cleanup=True)  # the decoder has one of its own
    assert pieces.decode(encode(pieces, text)) != make_decode(word_piece())(encode(pieces, text))
    assert make_decode(pieces)(encode(pieces, text)) == make_decode(word_piece())(encode(pieces, text))


# ---- stop strings


def first_hit(strings, decode, tokens):
    rule = StringStop(strings, decode)
    return next((i for i, token in enumerate(tokens) if rule.push(token)), None)


def test_stop_strings_are_found_where_they_complete(tokenizer):
    """Against a search of the whole text, over ids in no order: halves of characters and of words among them."""
    decode, rng, hits = make_decode(tokenizer), random.Random(5), 0
    for _ in range(60):
        ids = [rng.randrange(len(tokenizer)) for _ in range(30)]
        ids[9:9] = encode_after(tokenizer, ".", "\U0001f600\u65e5" + rng.choice(["", " hello", "\n"]))
        texts = [decode(ids[: i + 1]) for i in range(len(ids))]
        start = rng.randrange(len(texts[-1]) - 8)
        stop = texts[-1][start : start + rng.randrange(1, 7)]
        if "\ufffd" not in stop:
            expected = next(i for i, text in enumerate(texts) if stop in text)
            hits += 1
            assert first_hit((stop,), decode, ids) == expected, (stop, ids)
    assert hits > 10


@pytest.mark.parametrize("kind", ["metaspace always", "metaspace never", "llama 2", "byte level"])
def test_a_stop_string_in_a_run_of_bytes(kind):
    tokenizer = KINDS[kind]()
    decode = make_decode(tokenizer)
    for stop in ("\U0001f600" * 4, "\U0001f600" * 40, "\u65e5\u672c"):
        ids = [token for text in ("so", stop, "x") for token in encode_after(tokenizer, ".", text)]
        assert len(ids) > 4 and tokenizer.unk_token_id not in ids
        assert first_hit((stop,), decode, ids) == len(ids) - 2


def test_a_stop_string_that_begins_with_the_space_of_a_word():
    tokenizer = metaspace("always")
    ids = encode_after(tokenizer, "7+5=", " 12")
    assert first_hit((" 12",), make_decode(tokenizer), ids) == len(ids) - 1


# ---- end tokens

GEN = "generation_config.json"


def saved(folder, config, generation=None, tokenizer=None):
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    "config, generation, found",
    [
        ({}, None, {1: "tokenizer"}),
        ({"eos_token_id": 1}, {"eos_token_id": [1, 5]}, {1: f"tokenizer, config.json, {GEN}", 5: GEN}),
        ({"eos_token_id": [7, 1]}, {}, {1: "tokenizer, config.json", 7: "config.json"}),
        ({"text_config": {"eos_token_id": 9}}, {"eos_token_id": 8}, {1: "tokenizer", 9: "config.json", 8: GEN}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {1: "tokenizer"}),
        ({"eos_token_id": 3}, {"eos_token_id": 3}, {1: "tokenizer", 3: f"config.json, {GEN}"}),
    ],
)  # fmt: skip
def test_what_ends_a_turn_is_the_union_of_three_files(tmp_path, config, generation, found):
    cfg = saved(tmp_path, config, generation)
    assert end_tokens(cfg, load_tokenizer(cfg)) == found


def test_end_tokens_of_a_model_whose_tokenizer_names_none(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<pad>")
    cfg = saved(tmp_path / "model", {}, {"eos_token_id": 5}, tokenizer)
    assert end_tokens(cfg, load_tokenizer(cfg)) == {5: "generation_config.json"}
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": "<eos>"}')
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id='<eos>'; allowed: a token id, or a list"
    ):
        end_tokens(cfg, load_tokenizer(cfg))
    (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-sequence token, and the model's config.json and generation_config"):
        end_tokens(cfg, load_tokenizer(cfg))


@pytest.mark.parametrize(
    "content",
    [
        '{"version": "1.0", "added_tokens": [], "model": {"type": "Newer"}}',
        '{"version"',
        "version https://git-lfs.github.com/spec/v1",
    ],
)
def test_a_tokenizer_file_that_cannot_be_read_is_one_line(tmp_path, content):
    """Of a newer release, for which the package tokenizers raises a bare Exception; cut; a pointer in its place."""
    cfg = saved(tmp_path / "model", {}, {}, tiny_tokenizer())
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no tokenizer can be read there .*; set model.tokenizer") as caught:
        load_tokenizer(cfg)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "latin.jinja").write_bytes("caf\xe9".encode("latin-1"))
    for name in ("latin.jinja", "none.jinja", "."):
        said = r"model.chat_template=.*: (cannot be read \(.*|no such file); give a file with a Jinja"
        with pytest.raises(UserError, match=said):
            load_tokenizer(ModelConfig(path="tiny", chat_template=str(tmp_path / name)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """transformers makes an empty tokenizer of the family there, which would read every text as nothing."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes}))
    with pytest.raises(UserError, match=f"^model.path={tmp_path}: no tokenizer can be read there .*; set model.tokeni"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
