"""An export is what its source was: its own files, its config's keys, and names that earlier transformers read."""

import getpass
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from families import FAMILIES, make_net
from logits_of import IDS

from skyrl.config.schema import ModelConfig
from skyrl.hub import locate
from skyrl.models.forward import CausalLM
from skyrl.pretrained.export import _write_card, _write_config, export_model
from skyrl.text.tokenizer import tiny_tokenizer

HERE = Path(__file__).parent
# What serving stacks run: a release, and the tokenizers and hub client that it asks for. Installed without dependencies
# beside this environment's torch.
RELEASES = {
    "4.51.3": ("tokenizers>=0.21,<0.22", "huggingface_hub>=0.30,<1.0"),
    "4.57.6": ("tokenizers>=0.22,<=0.23.0", "huggingface_hub>=0.34,<1.0"),
}
# Families that came after them.
UNKNOWN = {"4.57.6": {"gemma4_text", "kimi_linear", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text"}}
UNKNOWN["4.51.3"] = UNKNOWN["4.57.6"] | {"gemma3n_text", "gpt_oss", "qwen3_next"}
# Llama 4 turns positions there by the number of a layer, whatever its config says.
OTHERWISE = {("4.51.3", "llama4_text")}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
EXTRA = {
    "preprocessor_config.json": "{}",
    "special_tokens_map.json": '{"eos_token":  "<eos>"}',
    "tokenization_own.py": "# own\n",
    "LICENSE": "terms",
    "README.md": "not copied",
    "trainer_state.json": "{}",
    "pytorch_model.bin.index.json": "{}",
}


def make_source(name, folder):
    """A folder as transformers 5 writes it, with several end tokens and a special token of its own."""
    net = make_net(name)
    net.generation_config = tf.GenerationConfig(eos_token_id=[1, 2], temperature=0.6, do_sample=True)
    net.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    for file, text in EXTRA.items():
        (folder / file).write_text(text)
    return net, tokenizer


def export(net, tokenizer, out, source):
    model = CausalLM(net)
    state = {name: p.detach() for name, p in model.named_parameters()}
    export_model(state, model.config, tokenizer, out, torch.float32, source=source)
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("base", "how", "head"),
    [
        ("org/base", "| trainer | rl |", {"tags": ["skyrl", "reinforcement-learning"], "base_model": "org/base"}),
        ("org/base", "| trainer | sft |", {"tags": ["skyrl"], "base_model": "org/base"}),
        ("{here}/base.gguf", "| trainer | sft |", {"tags": ["skyrl"]}),  # no name of the hub, which refuses it
    ],
)
@pytest.mark.parametrize("source", [b"---\r\nlicense: mit\r\n---\r\n", b"\xef\xbb\xbf---\nlicense: mit\n---\ncaf\xe9"])
def test_a_card_says_what_is_true_of_the_model_whatever_wrote_the_base_s_card(tmp_path, base, how, head, source):
    """A card in another encoding had ended the export, behind the last step of the run."""
    (tmp_path / "README.md").write_bytes(source)
    (tmp_path / "base.gguf").touch()
    _write_card(tmp_path, tmp_path, base.format(here=tmp_path), "", how)
    card = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert card == {"library_name": "transformers", "license": "mit", **head}


def test_of_a_model_of_the_hub_the_card_comes_too(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(locate, "download", lambda name, patterns, revision: asked.append(patterns) or tmp_path)
    for weights in (False, True):
        assert locate.locate("org/base", weights=weights) == tmp_path
        assert "README.md" in asked[0] and ("*.safetensors" in asked[0]) == weights
        asked.clear()


def test_files_beside_the_weights_are_the_source_s_own(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    net, tokenizer = make_source("qwen3", source)
    config = json.loads((source / "config.json").read_text())
    config.update({"auto_map": {"AutoConfig": "own.Config"}, "architectures": ["Qwen3Model"], "own_key": 7})
    (source / "config.json").write_text(json.dumps(config))
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\ntags: [x]\n---\nIts card.\n")
    got = export(net, tokenizer, out, ModelConfig(path=str(source)))
    card = (out / "README.md").read_text()
    assert "license: apache-2.0\nlicense_link: LICENSE" in card and "- x" not in card and "vllm serve ." in card
    assert "Trained with skyrl from source. The licence" in card and str(tmp_path) not in card  # a path is ours alone
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}
    assert config.items() <= (got | {"architectures": ["Qwen3Model"]}).items()
    assert got["architectures"] == ["Qwen3ForCausalLM"] and got["torch_dtype"] == got["dtype"] == "float32"
    kept = {"generation_config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"}
    kept |= {"special_tokens_map.json", "tokenization_own.py", "LICENSE"}
    for file in kept:
        assert (out / file).read_bytes() == (source / file).read_bytes(), file
    assert {p.name for p in out.iterdir()} == kept | {
        "config.json",
        "tokenizer_config.json",
        "model.safetensors",
        "README.md",
    }
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|end|>"] and "extra_special_tokens" not in config
    again = tf.AutoTokenizer.from_pretrained(out)
    assert again.encode("1+2<|end|>") == tokenizer.encode("1+2<|end|>") and again.chat_template == TEMPLATE


def test_a_tokenizer_config_that_all_releases_read_stays_as_it_is(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    net, tokenizer = make_source("qwen3", source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class":"PreTrainedTokenizerFast",  "eos_token":"<eos>"}')
    (source / "generation_config.json").unlink()
    export(net, tokenizer, out, ModelConfig(path=str(source)))
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert not (out / "generation_config.json").exists()


def test_another_tokenizer_and_another_template_than_the_model_s(tmp_path):
    source, other, out = tmp_path / "source", tmp_path / "other", tmp_path / "out"
    net, tokenizer = make_source("qwen3", source)
    tiny_tokenizer().save_pretrained(other)
    (other / "vocab.txt").write_text("its own")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    template = tmp_path / "t.jinja"
    template.write_text(tokenizer.chat_template)
    export(net, tokenizer, out, ModelConfig(str(source), tokenizer=str(other), chat_template=str(template)))
    assert (out / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert (out / "vocab.txt").exists() and not (out / "tokenization_own.py").exists()
    assert (out / "preprocessor_config.json").exists() and (out / "generation_config.json").exists()
    assert tf.AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template


def test_a_source_that_is_gone_costs_no_weights(tmp_path):
    net, tokenizer = make_source("qwen3", tmp_path / "source")
    export(net, tokenizer, tmp_path / "out", ModelConfig(path=str(tmp_path / "gone")))
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


KEYS = {
    "qwen3": {"rope_theta": 1e4, "rope_scaling": None},
    "llama3": {"rope_scaling": "llama3"},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2},
    "phi3": {"partial_rotary_factor": 1.0},
    "qwen3_moe": {"num_experts": 4},
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("old", [False, True])
def test_keys_that_transformers_4_reads(name, old, tmp_path):
    """Written beside those of transformers 5, and never over those of a source of transformers 4."""
    net = make_net(name)
    net.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    if old:
        config["transformers_version"] = "4.57.6"
        file.write_text(json.dumps(config))
    got = export(net, tiny_tokenizer(), tmp_path / "out", ModelConfig(path=str(tmp_path / "source")))
    for key, value in KEYS[name].items():
        if old:
            assert key not in got or got[key] == config[key]
        elif value == "llama3":
            assert got[key]["rope_type"] == value and "rope_theta" not in got[key]
        else:
            assert got[key] == value
    assert tf.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == net.config.rope_parameters


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_earlier_releases_read_what_is_exported(release, tmp_path):
    """The same logits, ids, template and end tokens; make test-exports installs the releases once."""
    cache = Path(tempfile.gettempdir()) / f"skyrl-test-transformers-{getpass.getuser()}" / release
    if not cache.is_dir():
        if os.environ.get("SKYRL_TEST_DOWNLOAD") != "1":
            pytest.skip(f"transformers {release} is not there: make test-exports installs it")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(cache)]
        subprocess.run([*command, f"transformers=={release}", *RELEASES[release]], check=True)
    wanted = {}
    for name in FAMILIES:
        net, tokenizer = make_source(name, tmp_path / "source" / name)
        with torch.no_grad():
            wanted[name] = net(input_ids=torch.tensor([IDS])).logits[0]
        export(net, tokenizer, tmp_path / name, ModelConfig(path=str(tmp_path / "source" / name)))
    run = subprocess.run(
        [sys.executable, HERE / "logits_of.py", *(tmp_path / name for name in wanted)],
        env={**os.environ, "PYTHONPATH": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    said = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {got["unknown"] for got in said if "unknown" in got} == UNKNOWN[release]
    for (name, logits), got in zip(wanted.items(), said, strict=True):
        assert got["version"] == release
        if "unknown" in got:
            continue
        equal = (torch.tensor(got["logits"]) - logits).abs().max() < 1e-4
        assert equal == ((release, name) not in OTHERWISE), name
        assert got["ids"] == tokenizer("1+2=3<|end|>")["input_ids"] and got["text"] == "<user>hi"
        assert got["end"] == [1, [1, 2]] and got["dtype"] == "torch.float32"


OLD = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
KINDS = {
    "MellumConfig": OLD,  # takes its frequencies away for rope_scaling of null
    "LagunaConfig": {**OLD, "num_attention_heads_per_layer": [4] * 4, "mlp_layer_types": ["dense"] * 4},
    "Gemma4TextConfig": OLD,  # refuses rope_scaling of a type that transformers 4 did not know
    "BeamConfig": OLD,  # has layers without positions
    "GPTNeoXConfig": {},
    "LlamaConfig": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_transformers_4_change_nothing_for_5(kind, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    if not hasattr(tf, kind):
        pytest.skip(f"transformers {tf.__version__} has no {kind}")
    getattr(tf, kind)(**KINDS[kind]).save_pretrained(source)
    config = tf.AutoConfig.from_pretrained(source)
    out.mkdir()
    _write_config(config, out, source, torch.float32, "Own", {})
    got, want = tf.AutoConfig.from_pretrained(out).to_dict(), config.to_dict()
    assert got["architectures"] == ["Own"]
    changed = {key for key in want if got[key] != want[key]}
    assert changed <= {"architectures", "dtype", "_name_or_path"}
