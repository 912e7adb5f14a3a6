"""Files in GGUF format (llama.cpp's), made into Hugging Face folders once, with their numbers dequantised.

transformers reads them. What it leaves to chance is checked here: the rule by which text is split
(`tokenizer.ggml.pre`), of which it ignores some without a word, and what says how weights are used (`_lost`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl.files import user_folder, write_folder_atomic
from skyrl.types import UserError, few

if TYPE_CHECKING:
    from gguf import GGUFReader

OTHER = "give the model in a K or legacy quantisation (Q4_K_M, Q8_0), in F16, or its Hugging Face folder"
# What `tokenizer.ggml.pre` may say for byte-level BPE, beside the rules that transformers applies by itself: every
# digit alone and then GPT-2's pattern, or that pattern alone (as llama.cpp has them).
DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
AS_GPT2 = ("gpt-2", "gpt2", "default", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion")


def gguf_file(path: Path, where: str = "model.path") -> Path | None:
    """The GGUF file that `path` is, or that a folder without other weights holds; None where there is none.

    Raises: UserError for a folder that holds several, and for a file that is a part of one.
    """
    if path.is_dir() and not any(any(path.glob(kind)) for kind in ("*.safetensors", "*.bin")):
        found = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))  # its images
        if len(found) > 1:
            names = few([file.name for file in found])
            raise UserError(f"{where}={path}: the folder holds several GGUF files ({names}); give the path of one")
        file = found[0] if found else None
    else:
        file = path if path.suffix.lower() == ".gguf" and path.is_file() else None
    if file is not None and "-of-0" in file.stem:
        raise UserError(f"{where}={file}: is one part of a model; join the parts first: llama-gguf-split --merge")
    return file


def converted(file: Path, *, where: str = "model.path") -> Path:
    """The Hugging Face folder of a GGUF file in the user's cache, made by the first process that asks for it.

    A file of another size or time of change is converted anew. Raises: UserError for what `convert` refuses.
    """
    from filelock import FileLock

    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = user_folder("XDG_CACHE_HOME", "~/.cache") / "gguf"
    folder = cache / f"{file.stem}-{key}"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():
                convert(file, folder, where=where)
    return folder


def convert(file: Path, folder: Path, *, where: str = "model.path", more: Mapping[str, bytes] | None = None) -> None:
    """Writes the model of a GGUF file as a Hugging Face folder: float32 weights, tokenizer, chat template, config.

    The weights are the numbers that the file's codes stand for. `more` are files to lie beside, by name. `folder`
    appears whole or not at all. Raises: UserError, before weights are read where possible, for a file that is cut or of
    another format, a quantisation, an architecture or a splitting rule that is not known, or a missing package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = _open(file, where)
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    held = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
    doing = f"dequantising {len(reader.tensors)} tensors ({held}) to float32, once; to {folder}"
    print(f"skyrl: {where}={file}: {doing}", file=sys.stderr, flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        _split_as_trained(tokenizer, reader, where, file)
        read: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype="float32", output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # the package tokenizers, in Rust, raises no more special one
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}={file}: transformers cannot convert this model: {reason}") from error
    net, loaded = read
    if missing := sorted(loaded["missing_keys"]):  # transformers draws these at random
        raise UserError(f"{where}={file}: lacks {len(missing)} weights, first {missing[0]}; fetch it again")
    if lost := _lost(net.config, [name for name, _ in net.named_parameters()], reader):
        raise UserError(
            f"{where}={file}: transformers passes over {few(lost)} in it, and so would compute other numbers; give the "
            "Hugging Face folder of the model"
        )
    # What transformers has read is a plain model; its mark of quantisation would only keep it from being saved.
    del net.config.quantization_config
    net.hf_quantizer = None
    net.is_quantized = False
    try:
        with write_folder_atomic(folder) as part:
            net.save_pretrained(part)
            tokenizer.save_pretrained(part)
            for name, content in (more or {}).items():
                (part / name).write_bytes(content)
            for written in part.iterdir():  # safetensors makes its files readable by their owner alone
                written.chmod((part / "config.json").stat().st_mode)
    except OSError as error:
        raise UserError(f"{where}={file}: its folder {folder} cannot be written: {error.strerror or error}") from error


def _open(file: Path, where: str) -> GGUFReader:
    """The file's header, and that all tensors that it names are there in a form that can be read."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(f"{where}={file}: reading GGUF needs an extra: pip install 'skyrl-spmd[gguf]'") from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        said, todo = f"is no whole GGUF file ({file.stat().st_size:,} bytes; {str(error)[:120]})", "fetch it again"
        if "GGMLQuantizationType" in str(error):  # one that is newer than the package
            said, todo = f"has a quantisation that the package gguf does not know ({error})", "update it, or " + OTHER
        raise UserError(f"{where}={file}: {said}; {todo}") from error
    for tensor in reader.tensors:  # of a file that was given its size before all of it came
        if tensor.data.ndim > 1 and not tensor.data.any():
            raise UserError(f"{where}={file}: {tensor.name} holds zeros alone, as after a cut download; fetch it again")
    for kind in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            dequantize(kind.data[:1] if kind.data.ndim > 1 else kind.data, kind.tensor_type)
        except NotImplementedError as error:
            name = kind.tensor_type.name
            raise UserError(f"{where}={file}: quantisation {name} cannot be dequantised here; {OTHER}") from error
    return reader


def _value(reader: GGUFReader, key: str) -> Any:
    return found.contents() if (found := reader.get_field(key)) is not None else None


def _lost(config: Any, parameters: Sequence[str], reader: GGUFReader) -> list[str]:
    """What a file says of how its weights are used, and the `config` and `parameters` that transformers makes of it do
    not have: it reads only the keys and tensors that it expects. No shape shows it."""
    kind, lost = _value(reader, "general.architecture"), list[str]()
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    if rope.get("rope_type", "default") == "default":  # Llama 3.1 and Phi-3 are scaled by tensors, Gemma 3 by a factor
        lost += [one.name for one in reader.tensors if one.name.startswith("rope_") and (one.data != 1).any()]
        lost += ["rope.scaling.factor"] if (_value(reader, f"{kind}.rope.scaling.factor") or 1) != 1 else []
    base, theta = _value(reader, f"{kind}.rope.freq_base"), rope.get("rope_theta")
    lost += ["rope.freq_base"] if base and theta and abs(base / theta - 1) > 1e-6 else []  # Starcoder 2
    window, whole = (_value(reader, f"{kind}.{key}") or 0 for key in ("attention.sliding_window", "context_length"))
    other = 0 < window < whole and window != getattr(config, "sliding_window", None)
    lost += ["attention.sliding_window"] if other else []  # Phi-3
    scale = getattr(config, "query_pre_attn_scalar", None)  # in no file; transformers' default is Gemma's but for 27B
    lost += ["the scale of queries of heads of another size"] if scale and scale != config.head_dim else []
    biases = [one.name for one in reader.tensors if re.search(r"\.(attn_(q|k|v|qkv|output)|ffn_\w+)\.bias$", one.name)]
    have = [name for name in parameters if name.endswith("bias") and "norm" not in name]
    return lost + (biases if len(biases) > len(have) else [])


def _split_as_trained(tokenizer: Any, reader: GGUFReader, where: str, file: Path) -> None:
    """Gives a byte-level BPE tokenizer the splitting rule that the file names."""
    from tokenizers import pre_tokenizers

    if _value(reader, "tokenizer.ggml.model") != "gpt2":
        return
    rule = _value(reader, "tokenizer.ggml.pre") or "default"
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:  # older releases apply none
        known = {}
    if rule in DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rule not in AS_GPT2 and rule not in known:
        raise UserError(
            f"{where}={file}: its tokenizer splits text by the rule {rule!r}, which is not known here, so the tokens "
            "would not be those of its training; give the Hugging Face folder of the model"
        )
