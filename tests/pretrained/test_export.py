"""What is exported loads in transformers, gives the same log-probs, and never replaces a good export by half of one."""

import os
import resource

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, make_net

from skyrl.config.schema import ModelConfig, TinyModelConfig
from skyrl.models.forward import CausalLM, collate
from skyrl.models.weights import persistent_buffers
from skyrl.pretrained import export
from skyrl.pretrained.export import export_model
from skyrl.pretrained.load import build_model, plain_logprobs
from skyrl.text.tokenizer import load_tokenizer, tiny_tokenizer
from skyrl.types import Datum, UserError


def state_of(model):
    return {name: p.detach() for name, p in (*model.named_parameters(), *persistent_buffers(model).items())}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_exported(name, tmp_path):
    model = CausalLM(make_net(name))
    export_model(state_of(model), model.config, tiny_tokenizer(), tmp_path / "out", torch.float32, shard_bytes=20000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again, info = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = dict(model.net.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in again.named_parameters())
    rows = [torch.arange(24)]
    with torch.no_grad():
        gap = plain_logprobs(model.net, rows)[0] - torch.log_softmax(again(input_ids=rows[0][None]).logits[0], -1)
    assert gap.abs().max() < 1e-5
    same = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert same.encode("1+2=3") == tiny_tokenizer().encode("1+2=3") and same.eos_token_id == 1
    original = tmp_path / "original"
    model.net.save_pretrained(original)  # the names of the files are those that the family is published with
    from skyrl.hub.tensor_files import Checkpoint

    assert set(Checkpoint(original).files) == set(Checkpoint(tmp_path / "out").files)


def test_round_trip_of_the_tiny_model_in_bfloat16(tmp_path):
    cfg = ModelConfig(tiny=TinyModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48))
    tokenizer = load_tokenizer(cfg)
    model = build_model(cfg, tokenizer, dtype=torch.bfloat16)
    export_model(state_of(model), model.config, tokenizer, tmp_path / "out", torch.bfloat16)
    back = ModelConfig(path=str(tmp_path / "out"))
    again = build_model(back, load_tokenizer(back), dtype=torch.bfloat16)
    mb = collate([Datum(np.arange(9), np.arange(9), np.ones(9))], torch.float32, "cpu")
    assert torch.equal(model(mb).logprobs_T, again(mb).logprobs_T)
    config = (tmp_path / "out" / "config.json").read_text()
    assert "skyrl" not in config and '"bfloat16"' in config


def test_a_second_export_replaces_the_first_and_a_failed_one_does_not(tmp_path, monkeypatch):
    model = CausalLM(make_net("qwen3"))
    args = (model.config, tiny_tokenizer(), tmp_path / "out", torch.float32)
    export_model(state_of(model), *args)
    changed = {n: p + 1 for n, p in state_of(model).items()}
    export_model(changed, *args)
    first = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.norm.weight.clone()
    assert torch.equal(first, model.net.model.norm.weight + 1)

    def full(*_args, **_kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match="export to .*out failed: No space left on device"):
        export_model(state_of(model), *args)
    assert torch.equal(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.norm.weight, first)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_disk_that_takes_no_more(tmp_path):
    model = CausalLM(make_net("qwen3"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the same path through safetensors as a full disk
    try:
        with pytest.raises(UserError, match="export to .*out failed: .*free space there"):
            export_model(state_of(model), model.config, tiny_tokenizer(), tmp_path / "out", torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="export to .* failed"):
        export_model(state_of(model), model.config, tiny_tokenizer(), tmp_path / "file" / "out", torch.float32)
