"""A Hugging Face folder as its source was, with other weights: for transformers, of earlier releases too, and vLLM.

Config, tokenizer and generation settings are the source's own files and not what transformers would write today: a
tokenizer that is serialised again, end tokens that only generation_config.json knows, or a key that a later release
renamed would be lost on whoever serves the folder.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from skyrl.config.schema import ModelConfig
from skyrl.files import disk_reason, write_folder_atomic
from skyrl.hub.locate import locate, name_for_others
from skyrl.hub.tensor_files import INDEX
from skyrl.pretrained.load import build_net
from skyrl.text.tokenizer import TINY
from skyrl.types import UserError

log = logging.getLogger("skyrl.models")

SHARD_BYTES = 5 << 30
PREFIX = "net."
CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
# What belongs to a tokenizer, where model.tokenizer names another folder than model.path.
TOKENIZER_FILES = (
    "tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.spm", "*.tiktoken", "chat_template*", "additional_chat_templates",
)  # fmt: skip
# What is copied beside it: settings of generation and of processors, custom code, terms of use. No weights, no config.
SIDE_FILES = (*TOKENIZER_FILES, "*.json", "*.jinja", "*.txt", "*.py", "LICENSE*", "NOTICE*")
LICENCE = ("license", "license_name", "license_link", "language")  # of a base's card, which hold for what is made of it
OWN_FILES = (CONFIG, "*.index.json", "adapter_config.json", "trainer_state.json")


def export_model(
    state: dict[str, Tensor],
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    *,
    source: ModelConfig | None = None,
    shard_bytes: int = SHARD_BYTES,
    more: Callable[[Path], None] = lambda part: None,
    classifier: bool = False,
    about: str = "",
) -> None:
    """Writes `folder`, which AutoModelForCausalLM and AutoTokenizer load and which gives the same log-probabilities.

    `state`: whole weights on the CPU in `dtype`, and persistent buffers, named as in CausalLM ("net.model..."), tied
    ones once; a value head is left out. `source` says which model it was: its config with what `config` has changed,
    and its other files as they are. Without it, or for `tiny`, `config` and `tokenizer` are written instead. `folder`
    appears whole, in the place of an earlier export; `more` is called with it before that, and may add files. A
    `classifier`'s value head is its one label, and AutoModelForSequenceClassification loads it. `about`: how it was
    trained, for the card. Raises: UserError when the disk does not take it; what was there before stays.
    """
    from transformers.core_model_loading import revert_weight_conversion

    folder, source = Path(folder), source or ModelConfig()
    net = build_net(copy.deepcopy(config), torch.float32, trust_remote_code=source.trust_remote_code)
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    architecture, changes = type(net).__name__, dict[str, Any]()
    if classifier:
        architecture = classifier_class(net)
        weights["score.weight"] = state["value_head.weight"]
        changes = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
            changes["pad_token_id"] = tokenizer.pad_token_id  # its last token that is no padding is what it reads
    try:
        with write_folder_atomic(folder) as part:
            # names and shapes as in the files that the family is published in (single experts instead of fused ones)
            _write_weights(revert_weight_conversion(net, weights), part, shard_bytes)
            origin = _origin(source.path, source.revision)
            _write_config(config, part, origin, dtype, architecture, changes)
            _copy_side_files(part, origin, source, tokenizer, config.model_type)
            _write_card(part, origin, source.path, classifier, about)
            more(part)
    except OSError as error:
        raise UserError(
            f"export to {folder} failed: {disk_reason(error, folder)}; free space there or choose another folder"
        ) from error


def _origin(path: str, revision: str = "") -> Path | None:
    """The folder of a model or tokenizer; None for `tiny`, and for one that is gone since the run began."""
    try:
        return None if path == TINY else locate(path, revision, weights=False)
    except UserError as error:
        log.warning("export: the files beside the weights are written anew: %s", error)
        return None


def _write_weights(weights: dict[str, Tensor], part: Path, shard_bytes: int) -> None:
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_bytes)
    for file, keys in split.filename_to_tensors.items():
        save_tensors({key: weights[key] for key in keys}, part / file)
    if split.is_sharded:
        _write_json(part / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file; tensors may share memory. Raises: OSError."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().contiguous()
        # safetensors refuses two names for one memory; whoever gives us that means two tensors
        plain[name] = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:  # how it tells what the system said
        found = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))) from error


def classifier_class(net: Any) -> str:
    """The class of transformers for sequence classification with the body of `net`. Raises UserError without one."""
    import transformers

    name = re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", type(net).__name__)
    if not name.endswith("ForSequenceClassification") or not hasattr(transformers, name):
        raise UserError(
            f"model.path: transformers has no classifier for {net.config.model_type}, so a reward model of it could "
            "not be loaded; use another family, or set checkpoint.export=false"
        )
    return name


def _write_config(
    config: Any, part: Path, origin: Path | None, dtype: torch.dtype, architecture: str, changes: dict[str, Any]
) -> None:
    """config.json with the keys of the source, what the export changes, and the names that transformers 4 reads."""
    keys = {} if origin is None else json.loads((origin / CONFIG).read_text(encoding="utf-8"))
    if keys.get("model_type") != config.model_type:  # none, or that of a model whose text part this is
        config = copy.deepcopy(config)
        config._attn_implementation_internal = None  # ours is not known where this is loaded
        keys = json.loads(config.to_json_string())
        GenerationConfig.from_model_config(config).save_pretrained(part)
    if architecture not in keys.get("architectures", ()):  # a bare model, or one with another head
        keys["architectures"] = [architecture]
    keys.pop("transformers_weights", None)  # a name of files that are not these
    keys["tie_word_embeddings"] = config.tie_word_embeddings
    keys["dtype"] = keys["torch_dtype"] = str(dtype).removeprefix("torch.")
    if not str(keys.get("transformers_version", "")).startswith("4."):
        keys = {**_harmless(_keys_of_transformers_4(keys, type(config).attribute_map), keys, type(config)), **keys}
    _write_json(part / CONFIG, keys | changes)


def _keys_of_transformers_4(keys: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Names that releases before 5 read, for those that 5 has put in their place; `names`: old name -> new name. They
    do not complain of what they do not know: the rotary base would be 10,000, a window would lie in other layers."""
    out: dict[str, Any] = {old: keys[new] for old, new in names.items() if new in keys}
    rope = keys.get("rope_parameters") or {}
    local = rope.get("sliding_attention")
    whole = rope.get("full_attention", {} if local else rope) or {}  # None: those layers have no positions
    if "rope_theta" in whole:
        out["rope_theta"] = whole["rope_theta"]
        scaling = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
        out["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
        if "partial_rotary_factor" in whole:
            out["partial_rotary_factor"] = whole["partial_rotary_factor"]
        if keys.get("model_type") == "gpt_neox":
            out["rotary_emb_base"], out["rotary_pct"] = whole["rope_theta"], whole.get("partial_rotary_factor", 0.25)
    if local and "rope_theta" in local:
        out["rope_local_base_freq"] = local["rope_theta"]
    layers = keys.get("layer_types") or []
    if "full_attention" in layers and "sliding_attention" in layers:
        every = layers.index("full_attention") + 1
        if layers == ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(layers))]:
            out["sliding_window_pattern"] = every
    return out


def _harmless(old: dict[str, Any], keys: dict[str, Any], family: Any) -> dict[str, Any]:
    """Those of the `old` names beside which this transformers reads `keys` as without them. Some families read an old
    name first: rope_scaling of null would take their rotary frequencies away."""

    def read(more: dict[str, Any]) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a name is old
            return family.from_dict(copy.deepcopy(more | keys)).to_dict()

    kept: dict[str, Any] = {}
    wanted = read({})
    for name, value in old.items():
        with suppress(Exception):  # refused, by whatever reads it
            got = read({**kept, name: value})
            if all(got[key] == same for key, same in wanted.items()):
                kept[name] = value
    return kept


def _copy_side_files(
    part: Path, origin: Path | None, source: ModelConfig, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """The source's files beside its weights, with the tokenizer and the template that the run used; settings for images
    not where a model of `kind` is the text part alone of the source."""
    home = origin
    if source.tokenizer and source.tokenizer != source.path:
        home = _origin(source.tokenizer)
    if origin is not None:
        images = json.loads((origin / CONFIG).read_text(encoding="utf-8")).get("model_type") != kind
        others = (*(() if home == origin else TOKENIZER_FILES), *(("*processor_config.json",) if images else ()))
        _copy(origin, part, SIDE_FILES, (*OWN_FILES, *others))
    if home is None:
        tokenizer.save_pretrained(part)
    elif home != origin:
        _copy(home, part, TOKENIZER_FILES, OWN_FILES)
    file = part / TOKENIZER_CONFIG
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    after = dict(before)
    if after.get("tokenizer_class") == "TokenizersBackend":  # what releases before 5 call it
        after["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(after.get("extra_special_tokens"), list):
        after["additional_special_tokens"] = after.pop("extra_special_tokens")
    if source.chat_template:
        after["chat_template"] = tokenizer.chat_template
        (part / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    if after != before:
        _write_json(file, after)


def _copy(origin: Path, part: Path, wanted: tuple[str, ...], but: tuple[str, ...]) -> None:
    for file in sorted(origin.iterdir()):
        if not any(fnmatch(file.name, one) for one in wanted) or any(fnmatch(file.name, one) for one in but):
            continue
        if file.is_dir():
            shutil.copytree(file, part / file.name)
        else:
            shutil.copyfile(file, part / file.name)


def _write_card(part: Path, origin: Path | None, base: str, classifier: bool, how: str) -> None:
    """README.md, for whoever gets this folder: what it is, the base and its licence as the base's own card says, `how`
    it was trained, and how it is loaded and served."""
    tags = ["skyrl", *(["reinforcement-learning"] if "| trainer | rl |" in how else [])]
    about: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    card = origin / "README.md" if origin is not None else Path()
    told = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    with suppress(yaml.YAMLError):
        own = yaml.safe_load(told[4:].partition("\n---")[0]) if told.startswith("---\n") else None
        about |= {key: own[key] for key in LICENCE if key in own} if isinstance(own, dict) else {}
    known = name_for_others(base)
    if origin is not None and "/" in known:
        about["base_model"] = known
    made_of = "a random model." if base == TINY else f"{known}. The licence of that model applies."
    use = "In this folder:\n\n    vllm serve .\n    lm_eval --model hf --model_args pretrained=. --tasks gsm8k\n"
    reward = "A reward model: the one logit of transformers.AutoModelForSequenceClassification is the reward.\n"
    head = f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\nTrained with skyrl from {made_of}\n\n"
    (part / "README.md").write_text(f"{head}{how}{reward if classifier else use}", encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
