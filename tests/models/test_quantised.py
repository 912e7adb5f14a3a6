"""Weights in 4 or 8 bits: loaded as transformers dequantises them, bit for bit, whole and in shards."""

import json

import pytest
import torch
import transformers as tf
from families import make_net, needs_newer
from gloo import run_ranks
from safetensors.torch import load_file, save_file

from skyrl.config.schema import ModelConfig
from skyrl.hub.quantised import dequantise
from skyrl.pretrained.load import build_model, check_against_transformers
from skyrl.types import UserError
from tests.models.test_sharded import check
from tests.pretrained.test_load_files import WEIGHTS, Entries, edit


def mark(folder, **given):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": given}))


def in_mxfp4(folder):
    """A gpt-oss whose experts are random codes with random scales."""
    make_net("gpt_oss", std=0.1, intermediate_size=64).save_pretrained(folder)
    tensors, draw = load_file(folder / WEIGHTS), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=draw, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = torch.randint(120, 126, codes.shape[:-1], generator=draw, dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    mark(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    return tf.Mxfp4Config(dequantize=True)


def in_fp8(folder, block=8):
    """A DeepSeek V3 whose products, single experts among them, are float8 with a factor for each block."""
    make_net("deepseek_v3").save_pretrained(folder)
    tensors, draw = load_file(folder / WEIGHTS), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("proj.weight") or "kv_a_proj" in name and "proj" in name]:
        rows, columns = tensors[name].shape
        tensors[name] = (4 * tensors[name]).to(torch.float8_e4m3fn)
        grid = -(-rows // block), -(-columns // block)
        tensors[f"{name}_scale_inv"] = 0.01 + torch.rand(grid, generator=draw)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    mark(folder, quant_method="fp8", weight_block_size=[block, block], activation_scheme="dynamic", fmt="e4m3")
    return tf.FineGrainedFP8Config(dequantize=True, weight_block_size=(block, block))


MADE = {"mxfp4": in_mxfp4, "fp8": in_fp8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [pytest.param("fp8", marks=needs_newer), "mxfp4"])
def test_dequantised_as_transformers_does(method, dtype, tmp_path):
    how = MADE[method](tmp_path)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=dtype)
    model = build_model(ModelConfig(path=str(tmp_path)), Entries(96), dtype=dtype)
    check_against_transformers(model)
    theirs, ours = dict(theirs.named_parameters()), dict(model.net.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name].to(dtype))] == []
    assert getattr(model.config, "quantization_config", None) is None  # what is exported is no longer quantised


def test_the_last_block_may_be_cut():
    """As in kv_a_proj_with_mqa of DeepSeek V3: 576 rows in blocks of 128."""
    codes = torch.randn(20, 13).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    want = torch.tensor([[float(codes[r, c]) * float(scales[r // 8, c // 8]) for c in range(13)] for r in range(20)])
    assert torch.allclose(dequantise(codes, scales, (8, 8)), want, rtol=1e-6)
    for whole in (scales[0, 0], scales[:1, 0]):  # one factor for all of them
        assert torch.equal(dequantise(codes, whole, (8, 8)), codes.float() * scales[0, 0])


def test_factors_of_activations_change_no_weight(tmp_path):
    """As in Devstral 2, of which each product has one, beside one factor for the whole matrix."""
    make_net("qwen2").save_pretrained(tmp_path)
    mark(tmp_path, quant_method="fp8", weight_block_size=None, activation_scheme="static")

    def act(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name] = (4 * tensors[name]).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.tensor(0.25)
            tensors[f"{name[:-6]}activation_scale"] = torch.tensor(0.3)

    edit(tmp_path / WEIGHTS, act)
    made = dict(build_model(ModelConfig(path=str(tmp_path)), Entries(96)).net.named_parameters())
    for name, codes in load_file(tmp_path / WEIGHTS).items():
        if codes.dtype == torch.float8_e4m3fn:
            assert torch.equal(made[name], codes.float() / 4)


@pytest.mark.ranks
@pytest.mark.parametrize("method", MADE)
def test_each_rank_has_its_part(method, tmp_path):
    MADE[method](tmp_path)
    run_ranks(2, on_ranks, tmp_path)


def on_ranks(folder):
    import os

    torch.distributed.init_process_group("gloo")
    try:
        check(ModelConfig(path=str(folder)), "logits", int(os.environ["RANK"]), 96)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("fp8", lambda key, t: t[:, :1].expand(-1, 7).contiguous(), "_scale_inv in .* does not fit .* factors for"),
        ("mxfp4", lambda key, t: t[:, :-1].contiguous(), "_scales in .* does not fit"),
        ("mxfp4", None, "has no place for .*_scales|has no place for .*_blocks"),
        ("fp8", None, "is float8_e4m3fn without the factors"),
        ("bytes", lambda key, t: t, "does not fit .* it is uint8 and not float8"),
    ],
)
def test_scales_that_do_not_fit(method, change, said, tmp_path):
    MADE["fp8" if method == "bytes" else method](tmp_path)

    def act(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(("_scale_inv", "_scales")))
        value = tensors.pop(key)
        if change is not None:
            tensors[key] = change(key, value)
        if method == "bytes":  # codes that were saved by their bits
            tensors[key[:-10]] = tensors[key[:-10]].view(torch.uint8)

    edit(tmp_path / WEIGHTS, act)
    with pytest.raises(UserError, match=said) as caught:
        build_model(ModelConfig(path=str(tmp_path)), Entries(96))
    assert "\n" not in str(caught.value)
