"""Loading: the same parameters and buffers as transformers' own load, clear refusals, seeds that no layout changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import FAMILIES, REFUSED, make_net
from safetensors.torch import load_file, save_file

from skyrl.config.schema import ModelConfig, TinyModelConfig
from skyrl.models.forward import CausalLM
from skyrl.models.weights import init_random
from skyrl.pretrained.load import (
    build_model,
    build_on_meta,
    check_against_transformers,
    load_into,
    read_config,
)
from skyrl.pretrained.support import check_supported
from skyrl.text.chat import load_chat
from skyrl.text.tokenizer import load_tokenizer, tiny_tokenizer
from skyrl.types import UserError

SMALL = TinyModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48)


class Entries(int):
    """Stands for a tokenizer where only its size matters."""

    def __len__(self):
        return int(self)


def saved(tmp_path, name, **more):
    make_net(name).save_pretrained(tmp_path / name, **more)
    return ModelConfig(path=str(tmp_path / name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_parameters_and_buffers_as_transformers(name, dtype, tmp_path):
    cfg = saved(tmp_path, name, max_shard_size="20KB")
    assert (tmp_path / name / "model.safetensors.index.json").exists()
    own = build_model(cfg, Entries(96), dtype=dtype)
    ref = tf.AutoModelForCausalLM.from_pretrained(cfg.path, dtype=dtype)
    params, buffers = dict(ref.named_parameters()), dict(ref.named_buffers())
    assert {n for n, _ in own.net.named_parameters()} == set(params)
    for n, p in own.net.named_parameters():
        want = params[n]  # in float32 where the family keeps it so
        assert p.dtype == want.dtype and p.device.type == "cpu" and torch.equal(p, want), n
    assert {n for n, _ in own.net.named_buffers()} == set(buffers)
    for n, b in own.net.named_buffers():
        # never cast below what transformers has: rotary frequencies are float32 in both
        assert torch.equal(b.to(buffers[n].dtype), buffers[n]), n
        assert "inv_freq" not in n or b.dtype == torch.float32
    check_against_transformers(own)


def test_one_file_and_loading_after_moving_off_meta(tmp_path):
    cfg = saved(tmp_path, "qwen2")
    model = build_on_meta(cfg, Entries(96), dtype=torch.float64)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    load_into(model, cfg, device="cpu", seed=0)
    want = dict(make_net("qwen2").named_parameters())
    assert all(torch.equal(p, want[n].double()) for n, p in model.net.named_parameters())


def test_critic_from_a_policy(tmp_path):
    for name in ("qwen3", "qwen2"):  # an untied head is left out, a tied one has nothing to leave
        model = build_model(saved(tmp_path, name), Entries(96), head="value", seed=4)
        other = build_model(saved(tmp_path, name), Entries(96), head="value", seed=5)
        assert model.value_head.weight.abs().max() > 0 and model.value_head.bias.item() == 0
        assert not torch.equal(model.value_head.weight, other.value_head.weight)
        assert torch.equal(model.decoder.norm.weight, make_net(name).model.norm.weight)


def edit(folder, change):
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    def refused(match, change):
        shutil.rmtree(tmp_path / "qwen3", ignore_errors=True)
        cfg = saved(tmp_path, "qwen3")
        edit(cfg.path, change)
        with pytest.raises(UserError, match=match):
            build_model(cfg, Entries(96))

    refused(r"lacks model.norm.weight.*config.json", lambda t: t.pop("model.norm.weight"))
    refused(r"no place for surplus.weight", lambda t: t.update({"surplus.weight": torch.zeros(2)}))
    refused(
        r"model.norm.weight .* has shape \(7,\); the config asks for \(32,\)",
        lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
    )


def test_broken_folders_are_refused(tmp_path):
    def refused(match, path, **more):
        with pytest.raises(UserError, match=match) as caught:
            build_model(ModelConfig(path=str(path), **more), Entries(96))
        assert "\n" not in str(caught.value)

    refused("no folder .*/nowhere.*hub name looks like org/name", tmp_path / "nowhere")
    refused("no folder .*hub name looks like org/name", "qwen")
    (tmp_path / "empty").mkdir()
    refused("has no config.json", tmp_path / "empty")
    cfg = saved(tmp_path, "qwen3", max_shard_size="20KB")
    shard = sorted(Path(cfg.path).glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(f"{shard.name} cannot be read", cfg.path)
    shard.unlink()
    refused(f"lacks {shard.name}", cfg.path)
    for file in Path(cfg.path).glob("model*"):
        file.unlink()
    refused("holds no model.safetensors", cfg.path)
    (Path(cfg.path) / "config.json").write_text('{"model_type": "unheard_of"}')
    refused("transformers cannot read its config", cfg.path)


UNSUPPORTED = {
    "T5Config": "encoder-decoder",
    "Glm4vConfig": "more than text .*vision_config",
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_families_are_refused_by_name(kind):
    config = getattr(tf, kind)()
    with pytest.raises(UserError, match=UNSUPPORTED[kind]) as caught:
        check_supported(config)
    assert config.model_type in str(caught.value) and "qwen3" in str(caught.value)


def test_rope_that_depends_on_the_batch_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="rope_type dynamic"):
        check_supported(tf.LlamaConfig(rope_parameters=rope))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("BloomConfig", "attention interface"),
        ("FalconConfig", "falcon"),
        ("MambaConfig", "linear attention is not|layers of type mamba"),  # transformers 5.5 calls its layers that
        ("MiniMaxConfig", "linear attention is not"),
    ],
)
def test_families_that_show_only_when_built(kind, match, tmp_path):
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    getattr(tf, kind)(**sizes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=match):
        build_on_meta(ModelConfig(path=str(tmp_path)), Entries(96))


@pytest.mark.skipif(not REFUSED, reason="this transformers computes them as we do")
@pytest.mark.parametrize("name", REFUSED)
def test_what_an_older_transformers_computes_otherwise_is_refused(name, tmp_path):
    make_net(name, refused=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not supported: (packed log-probabilities differ|its |this )"):
        check_against_transformers(build_model(ModelConfig(path=str(tmp_path)), Entries(96)))


def test_probe_finds_a_head_and_a_window_that_are_not_what_they_seem():
    model = CausalLM(make_net("gemma2"))
    check_against_transformers(model)
    model.head_spec = type(model.head_spec)()
    with pytest.raises(UserError, match="gemma2.*differ from transformers' own"):
        check_against_transformers(model)
    model = CausalLM(make_net("gemma3"))
    model.net.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(UserError, match="gemma3_text.*differ"):
        check_against_transformers(model)
    # OLMoE hands its attention a window that its eager mask does not have: which one is meant, nobody can tell
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    olmoe = tf.AutoModelForCausalLM.from_config(
        tf.OlmoeConfig(**sizes, num_experts=8, eos_token_id=1, sliding_window=8)
    )
    with pytest.raises(UserError, match="olmoe.*differ"):
        check_against_transformers(CausalLM(olmoe))


def test_random_weights_depend_on_seed_and_name_only():
    cfg = ModelConfig(tiny=SMALL)
    tokenizer = tiny_tokenizer()
    one, two = (build_model(cfg, tokenizer, seed=1) for _ in range(2))
    other = build_model(cfg, tokenizer, seed=2)
    weights = dict(one.named_parameters())
    for name, p in two.named_parameters():
        assert torch.equal(p, weights[name])
    name = "net.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], other.get_parameter(name))
    assert not torch.equal(weights[name], weights[name.replace("layers.0", "layers.1")])
    assert abs(weights[name].std() - 0.02) < 1e-3 and (weights["net.model.norm.weight"] == 1).all()
    double = build_model(cfg, tokenizer, dtype=torch.float64)
    assert torch.equal(double.get_parameter(name), weights[name].double())
    init_random(other, 1, residual_layers=2)
    assert all(torch.equal(p, weights[n]) for n, p in other.named_parameters())


def test_tokenizer_options(tmp_path):
    assert len(load_tokenizer(ModelConfig())) == 100
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = load_tokenizer(ModelConfig(chat_template=str(template)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False) == "1+1"
    with pytest.raises(UserError, match="model.chat_template=.*gone.jinja: no such file"):
        load_tokenizer(ModelConfig(chat_template=str(tmp_path / "gone.jinja")))
    with pytest.raises(UserError, match="model.tokenizer=.*no folder"):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path / "gone")))
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    assert len(load_tokenizer(ModelConfig(tokenizer=str(tmp_path / "tok")))) == 100
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_chat(ModelConfig(tokenizer=str(tmp_path / "tok")))


def test_tiny_is_read_without_files():
    assert read_config(ModelConfig()).model_type == "qwen3" and read_config(ModelConfig()).vocab_size == 100


@pytest.mark.skipif(
    not tf.DiffLlamaPreTrainedModel._supports_attention_backend,
    reason="this transformers has no attention interface in DiffLlama: refused for that",
)
def test_a_layer_that_attends_twice_is_refused(tmp_path):
    """Its packed forward is right, and the sampler would keep the keys and values of the second time alone."""
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    net = tf.AutoModelForCausalLM.from_config(tf.DiffLlamaConfig(**sizes, num_key_value_heads=2))
    with pytest.raises(UserError, match="'diffllama' is not supported: a layer of it attends more than once"):
        check_against_transformers(CausalLM(net.float().eval()))
