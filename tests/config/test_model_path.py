"""A model.path that cannot be trained is answered with what it is and what to do, before anything is loaded."""

import json

import pytest

from skyrl.config.load import load_config
from skyrl.hub.model_path import path_problem
from skyrl.types import UserError

CONFIG = {"model_type": "llama"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["m.Q4_K_M.ggml"], "holds a GGML file, which llama.cpp read before GGUF; give the"),
        (["model.onnx", "config.json"], "holds an ONNX model"),
        (["weights.npz", "config.json"], "holds weights for Apple's MLX"),
        (["tf_model.h5", "config.json"], "holds weights of TensorFlow or Flax; give the model that it was made from"),
        (["quantize_config.json", "config.json", "model.safetensors"], "its weights are quantised (gptq), which"),
        (["adapter_config.json"], "holds an adapter of peft alone, for org/base; give the model that merge_and_unload"),
        (["adapter_config.json", "config.json"], "holds an adapter of peft alone"),
        (["params.json", "consolidated.00.pth"], "holds weights as their makers trained them"),
        (
            ["checkpoint-9/config.json", "checkpoint-9/model.safetensors"],
            "give the folder in it that has, {}/checkpoint-9",
        ),
        (["snapshots/abc/config.json"], "give the folder in it that has, {}/snapshots/abc"),
        (["export/config.json", "config.yaml", "metrics.jsonl"], "give the folder in it that has, {}/export"),
        (["manifest.json", "ranks.bin"], "skyrl-tx export makes a folder"),
        (["zero_to_fp32.py", "latest"], "holds a checkpoint of DeepSpeed"),
        (["readme.txt"], "has no config.json; give a folder in Hugging Face format"),
        ([], "has no config.json"),
    ],
)
def test_folders(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        content = {"base_model_name_or_path": "org/base"} if name == "adapter_config.json" else CONFIG
        (tmp_path / name).write_text(json.dumps(content))
    assert said.format(tmp_path) in path_problem(str(tmp_path)) and "\n" not in path_problem(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised (gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "its weights are quantised (awq)"),
        ({"quantization_config": {"load_in_4bit": True}}, "its weights are quantised (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "its weights are quantised (fbgemm_fp8), which"),
        ({"quantization_config": "int4"}, "its config.json has a quantization_config that is no JSON object"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ""),  # dequantised as they are read
        ({"quantization": {"bits": 4, "group_size": 64}}, "its weights are quantised for Apple's MLX"),
    ],
)
def test_quantised_folders(tmp_path, config, said):
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    problem = path_problem(str(tmp_path))
    assert problem.startswith(said) and bool(problem) == bool(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m.ggml", "is a GGML file"),
        ("m.safetensors", "is a file of weights alone; give a folder"),
        ("m.pt", "is a file of weights alone"),
        ("m.bin", "is a file of weights alone"),
        ("m.tar.gz", "is an archive; unpack it"),
    ],
)
def test_files(tmp_path, name, said):
    (tmp_path / name).write_text("")
    assert path_problem(str(tmp_path / name)).startswith(said)
    (tmp_path / "config.json").write_text("{}")
    if name.endswith((".pt", ".bin", ".safetensors")):
        assert path_problem(str(tmp_path / name)) == f"is one file of a model; give its folder, {tmp_path}"


def test_what_may_be_trained_and_where_it_is_asked(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": None}))
    (tmp_path / "m.onnx").write_text("")  # beside weights that can be trained
    (tmp_path / "model.safetensors").write_text("")
    assert path_problem(str(tmp_path)) == path_problem("org/name") == path_problem("tiny") == ""
    (tmp_path / "m.onnx").write_text("")
    for mode in ("train", "serve"):
        with pytest.raises(UserError, match=f"model.path={tmp_path}/m.onnx: is an ONNX model"):
            load_config([f"model.path={tmp_path}/m.onnx"], mode=mode)
    with pytest.raises(UserError, match="model.tokenizer=.*: is a file; give its folder"):
        load_config([f"model.tokenizer={tmp_path}/config.json"])


def test_a_gguf_file_without_its_ending_is_known_by_its_first_bytes(tmp_path):
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(b"GGUF" + bytes(20))
    assert path_problem(str(blob)).startswith("is a GGUF file, but does not end in .gguf; give a link to it")
