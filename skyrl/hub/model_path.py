"""What model.path names when it is no folder of weights that can be trained, and what to do about it. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MLX, KERAS = "weights for Apple's MLX", "weights of TensorFlow or Flax"
ENDINGS = {
    ".ggml": "a GGML file, which llama.cpp read before GGUF",
    ".onnx": "an ONNX model, made for inference, which cannot be trained",
    ".npz": MLX,
    ".h5": KERAS,
    ".msgpack": KERAS,
}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z", ".nemo")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
DEQUANTISED = ("mxfp4", "fp8")  # quant_method of what is published so alone; hub.quantised reads it
ORIGINAL = "give the model that it was made from, a folder in Hugging Face format or a hub name"


def path_problem(path: str) -> str:
    """What keeps the file or folder at `path` from being trained, and what to do; "" for one that may be, and for what
    is not there: a hub name, or a mistake that is told where it is looked for."""
    if path in ("", "tiny"):  # which other rules look at
        return ""
    place = Path(path)
    try:
        return _file_problem(place) if place.is_file() else _folder_problem(place) if place.is_dir() else ""
    except OSError as error:
        return f"cannot be read ({error.strerror}); mend its permissions, or give another folder"


def config_problem(config: dict[str, Any]) -> str:
    """The same for the content of a model's config.json: weights that are quantised."""
    given = config.get("quantization_config") or config.get("compression_config")
    if given and not isinstance(given, dict):
        return "its config.json has a quantization_config that is no JSON object; put the model's own file back"
    if given:
        method = given.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in given else "")
        if method in DEQUANTISED:
            return ""
        return f"its weights are quantised{f' ({method})' if method else ''}, which cannot be trained; {ORIGINAL}"
    if isinstance(config.get("quantization"), dict):
        return f"its weights are quantised for Apple's MLX, which cannot be trained; {ORIGINAL}"
    return ""


def _file_problem(file: Path) -> str:
    if file.suffix.lower() == ".gguf":
        return ""  # skyrl.hub.gguf makes a folder of it
    if kind := ENDINGS.get(file.suffix.lower()):
        return f"is {kind}; {_origin(kind)}"
    with file.open("rb") as opened:
        if opened.read(4) == b"GGUF":  # a blob of Ollama's or of the hub's cache
            return f"is a GGUF file, but does not end in .gguf; give a link to it that does: ln -s {file} model.gguf"
    if file.suffix.lower() in ARCHIVES:
        return "is an archive; unpack it and give the folder"
    if (file.parent / "config.json").is_file():
        return f"is one file of a model; give its folder, {file.parent}"
    return "is a file of weights alone; give a folder that holds it with the model's config.json and tokenizer"


def _origin(kind: str) -> str:
    return f"{ORIGINAL}, whose weights are safetensors" if kind == KERAS else ORIGINAL


def _folder_problem(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    kinds = dict.fromkeys(kind for name in found if (kind := ENDINGS.get(Path(name).suffix.lower())))
    if any(folder.glob("*.gguf")) and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return ""
    if "config.json" not in found:
        return _without_config(folder, found, next(iter(kinds), ""))
    if "adapter_config.json" in found:
        return _adapter(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return f"its config.json is no JSON ({error}); put the model's own file back"
    if not isinstance(config, dict):
        return "its config.json is no JSON object; put the model's own file back"
    if problem := config_problem(config):
        return problem
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if name in found:
            return config_problem({"quantization_config": {"quant_method": method}})
    if kinds and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return f"holds {(kind := next(iter(kinds)))}; {_origin(kind)}"
    return ""


def _adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = ""
    whose, itself = (f", for {base}", f", or {base} itself") if base else ("", "")
    return f"holds an adapter of peft alone{whose}; give the model that merge_and_unload of peft makes of it{itself}"


def _without_config(folder: Path, found: list[str], kind: str) -> str:
    if "adapter_config.json" in found:
        return _adapter(folder)
    inside = [name for name in found if (folder / name / "config.json").is_file()]
    if (folder / "snapshots").is_dir():
        inside = [f"snapshots/{path.name}" for path in sorted((folder / "snapshots").iterdir())]
    if kind:
        return f"holds {kind}; {_origin(kind)}"
    if inside:
        return f"has no config.json; give the folder in it that has, {folder / inside[-1]}"
    if "params.json" in found and any(name.startswith("consolidated") for name in found):
        return "holds weights as their makers trained them; give them in Hugging Face format (the hub has both)"
    if "manifest.json" in found or ".metadata" in found or any(name.startswith("checkpoint") for name in found):
        return "holds checkpoints of training; skyrl-tx export makes a folder in Hugging Face format of one of ours"
    if "zero_to_fp32.py" in found or "latest" in found:
        return "holds a checkpoint of DeepSpeed; its zero_to_fp32.py makes weights of it, which go beside a config.json"
    return "has no config.json; give a folder in Hugging Face format"
