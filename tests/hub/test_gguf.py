"""GGUF files as model.path: the numbers that their codes stand for, the text rule they name, and what is refused."""

import os
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch

from skyrl.config.schema import ModelConfig
from skyrl.hub.get_model import get_model
from skyrl.hub.gguf import _lost, convert, converted, gguf_file
from skyrl.hub.locate import locate
from skyrl.pretrained.load import build_model
from skyrl.text.tokenizer import load_tokenizer
from skyrl.types import UserError
from tests.families import needs_newer

gguf = pytest.importorskip("gguf")
pytestmark = needs_newer  # which asks for the version of gguf in a way that today's does not answer

WIDTH, INNER, LAYERS, HEADS = 64, 96, 2, 4
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + n) for n in range(68)]
TOKENS = ["<|end|>", "<|start|>", *BYTES, "ĠĠ", "he", "hel"]
MERGES = ["Ġ Ġ", "h e", "he l"]


def write(path, *, rule="smollm", kind=gguf.GGMLQuantizationType.Q8_0, architecture="llama", more=lambda writer: None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ '<|start|>' + m['content'] + '<|end|>' }}{% endfor %}")
    draw = numpy.random.default_rng(1)
    shapes = {"token_embd": (len(TOKENS), WIDTH)}
    for layer in range(LAYERS):
        block = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
        block |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
        block |= {"ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    values = {}
    for name, shape in shapes.items():
        data = gguf.quantize(draw.normal(0, 0.1, shape).astype(numpy.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.dequantize(data, kind).copy())
    for name in ["output_norm", *(f"blk.{n}.{part}_norm" for n in range(LAYERS) for part in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, numpy.float32))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "skyrl" / "gguf"


def test_a_file_and_the_folder_that_holds_it_load_as_the_numbers_of_its_codes(cache, tmp_path, capfd):
    (tmp_path / "m").mkdir()
    values = write(tmp_path / "m" / "small.gguf")
    cfg = ModelConfig(path=str(tmp_path / "m" / "small.gguf"))
    tokenizer = load_tokenizer(cfg)
    net = dict(build_model(cfg, tokenizer, device="cpu", dtype=torch.float32, seed=0).net.named_parameters())
    assert torch.equal(net["model.embed_tokens.weight"], values["token_embd"])
    assert torch.equal(net["model.layers.1.mlp.down_proj.weight"], values["blk.1.ffn_down"])
    assert locate(str(tmp_path / "m")) == locate(cfg.path)
    said = capfd.readouterr().err
    assert said.count("dequantising") == 1 and "Q8_0" in said, "said once, and converted once"
    assert (locate(cfg.path) / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<|start|>he<|end|>"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_text_is_split_by_the_rule_that_the_file_names(cache, tmp_path):
    """`smollm`: digits alone, so the spaces before one stay together; `gpt-2`: the last space goes with the digit."""
    for rule, pieces in (("smollm", ["ĠĠ", "5", "9"]), ("gpt-2", ["Ġ", "Ġ", "5", "9"]), (None, ["Ġ", "Ġ", "5", "9"])):
        write(tmp_path / f"{rule}.gguf", rule=rule)
        tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / f"{rule}.gguf")))
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("  59")) == pieces
        assert tokenizer.decode(tokenizer.encode("  59 hel")) == "  59 hel"


def test_a_changed_file_is_converted_anew(cache, tmp_path):
    write(tmp_path / "m.gguf")
    first = converted(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", rule="gpt-2")
    assert converted(tmp_path / "m.gguf") != first


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            {"rule": "some-new-rule"},
            "m.gguf: its tokenizer splits text by the rule 'some-new-rule', which is not known",
        ),
        ({"architecture": "nonesuch"}, "transformers cannot convert this model"),
    ],
)
def test_what_is_not_known_is_refused_by_name(cache, tmp_path, made, said):
    write(tmp_path / "m.gguf", **made)
    with pytest.raises(UserError, match=said):
        locate(str(tmp_path / "m.gguf"))
    assert not list(cache.glob("*/")), "nothing half made is left"


def _linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


PASSED_OVER = {
    "frequencies, as of Llama 3.1": (
        lambda writer: writer.add_tensor("rope_freqs.weight", numpy.linspace(1, 8, 8, dtype=numpy.float32)),
        "rope_freqs.weight",
    ),
    "positions, as of Gemma 3": (_linear, "rope.scaling.factor"),
    "a window, as of Phi-3": (lambda writer: writer.add_sliding_window(16), "attention.sliding_window"),
    "biases": (
        lambda writer: writer.add_tensor("blk.0.attn_q.bias", numpy.ones(WIDTH, numpy.float32)),
        "blk.0.attn_q.bias",
    ),
}


@pytest.mark.parametrize(("more", "named"), PASSED_OVER.values(), ids=PASSED_OVER)
def test_what_transformers_passes_over_is_refused(tmp_path, more, named):
    """Such a model would be trained with other numbers than it has learned with, and no shape would show it."""
    write(tmp_path / "m.gguf", more=more)
    with pytest.raises(UserError, match=f"transformers passes over {named} in it"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_changes_no_number_may_be_passed_over(tmp_path):
    def more(writer):
        writer.add_tensor("rope_freqs.weight", numpy.ones(8, numpy.float32))
        writer.add_sliding_window(128)  # as long as the longest row

    write(tmp_path / "m.gguf", more=more)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    plain = SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert _lost(plain, [], reader) == []
    plain.rope_parameters["rope_theta"] = 500000.0  # a family whose base is not read, as Starcoder 2's
    assert _lost(plain, [], reader) == ["rope.freq_base"]
    plain = SimpleNamespace(rope_parameters={}, query_pre_attn_scalar=256, head_dim=256)  # Gemma 2 and 3 but for 27B
    assert _lost(plain, [], reader) == []
    plain.head_dim = 128
    assert _lost(plain, [], reader) == ["the scale of queries of heads of another size"]


def test_a_quantisation_that_is_newer_than_the_package(tmp_path):
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of its sizes, and the sizes
    (tmp_path / "m.gguf").write_bytes(data[:at] + (999).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        UserError, match="has a quantisation that the package gguf does not know .*999.*; update it, or"
    ):
        convert(tmp_path / "m.gguf", tmp_path / "out")


DAMAGE = {
    "a weight under another name": (
        b"blk.1.attn_q.weight",
        b"blk.1.attn_X.weight",
        "lacks 1 weights, first model",
    ),
    "no embedding": (b"token_embd.weight", b"token_embX.weight", "lacks 2 weights, first lm_head"),
    "heads of another number": (
        b"llama.attention.head_count",
        b"llama.attention.heaX_count",
        "cannot convert this model",
    ),
    "no vocabulary": (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX", "'tokens'"),
}


@pytest.mark.parametrize(("old", "new", "said"), DAMAGE.values(), ids=DAMAGE)
def test_what_a_file_lacks_is_never_made_up(tmp_path, old, new, said):
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    assert old in data
    (tmp_path / "m.gguf").write_bytes(data.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_its_full_size_whose_end_never_came(tmp_path):
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-30_000] + bytes(30_000))
    with pytest.raises(UserError, match="holds zeros alone, as after a cut download; fetch it again"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 2_000, 0.9])
def test_a_cut_download_is_one_line(tmp_path, keep):
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(UserError, match="is no whole GGUF file .* fetch it again"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"<html>not found</html>" * 40)
    with pytest.raises(UserError, match="is no whole GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_file_is_meant(tmp_path):
    write(tmp_path / "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "mmproj-a.gguf")  # what makes tokens of images
    assert gguf_file(tmp_path) == tmp_path / "a.gguf"
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(UserError, match=r"several GGUF files \(a.gguf, b.gguf\); give the path of one"):
        gguf_file(tmp_path)
    shutil.copy(tmp_path / "a.gguf", tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(UserError, match="is one part of a model; join the parts"):
        gguf_file(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "model.safetensors").write_text("")
    assert gguf_file(tmp_path) is None, "a Hugging Face folder that has a GGUF file beside it is that folder"


def test_get_model_leaves_what_is_there(tmp_path):
    with pytest.raises(UserError, match="no such model; choose one of: smollm2-135m"):
        get_model("nonesuch", tmp_path / "m")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        get_model("smollm2-135m", tmp_path)
