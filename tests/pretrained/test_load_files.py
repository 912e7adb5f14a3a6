"""What is loaded is what transformers loads from the same folder, bit for bit, or an error that names the tensor."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import make_net
from safetensors.torch import load_file, save_file

from skyrl.config.schema import ModelConfig
from skyrl.pretrained.load import build_model, check_against_transformers
from skyrl.types import UserError

WEIGHTS, EMBEDDING, HEAD, NORM = "model.safetensors", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.0.mlp.experts.1.up_proj.weight"


class Entries(int):
    """Stands for a tokenizer where only its size matters."""

    def __len__(self):
        return int(self)


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def in_file(change):
    return lambda folder: edit(folder / WEIGHTS, change)


def renamed(old, new):
    return in_file(lambda t: [t.update({key.replace(old, new, 1): t.pop(key)}) for key in list(t)])


def in_config(change):
    def act(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return act


def in_index(change):
    def act(folder):
        file = folder / f"{WEIGHTS}.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return act


def in_shard(number, name, value):
    return lambda folder: edit(sorted(folder.glob("model-*"))[number], lambda t: t.update({name: value}))


def as_bin(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({**tensors, HEAD: tensors.get(HEAD, tensors[EMBEDDING])}, folder / "pytorch_model.bin")


def whole_file(folder):
    save_file({NORM: torch.zeros(32)}, folder / WEIGHTS, metadata={"format": "pt"})


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def another_file(folder):
    save_file({**load_file(folder / WEIGHTS), NORM: torch.full((32,), 3.0)}, folder / "own.safetensors")
    in_config(lambda c: c.update(transformers_weights="own.safetensors"))(folder)


def as_list(folder):
    torch.save(list(load_file(folder / WEIGHTS)), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def training_state(folder):
    torch.save({"model": load_file(folder / WEIGHTS), "step": 3}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def half(t):
    t.update({key: value.half() for key, value in t.items() if "mlp" in key})


# qwen2 is tied here, qwen3 is not; shards where the change needs them
SAME = {
    "tied": ("qwen2", lambda folder: None),
    "tied, with an equal head": ("qwen2", in_file(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))),
    "tied, the head alone": ("qwen2", in_file(lambda t: t.update({HEAD: t.pop(EMBEDDING)}))),
    "a head, the config says nothing": (
        "qwen2",
        lambda folder: (
            in_config(lambda c: c.pop("tie_word_embeddings"))(folder),
            in_file(lambda t: t.update({HEAD: torch.ones(96, 32)}))(folder),
        ),
    ),
    "tied by default": ("gemma2", in_config(lambda c: c.pop("tie_word_embeddings", None))),
    "base model without its prefix": ("qwen2", renamed("model.", "")),
    "both prefixes, equal": ("qwen3", in_file(lambda t: t.update({"norm.weight": t[NORM].clone()}))),
    "old rotary frequencies": (
        "qwen2",
        in_file(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})),
    ),
    "several dtypes": ("qwen3", in_file(half)),
    "a .bin": ("qwen3", as_bin),
    "a .bin of a tied model": ("qwen2", as_bin),
    "the index points to another shard": ("qwen3", in_index(lambda m: m.update({NORM: m[EMBEDDING]}))),
    "the index forgets a tensor": ("qwen3", in_index(lambda m: m.pop(NORM))),
    "answers as tuples": ("qwen3", in_config(lambda c: c.update(return_dict=False, output_hidden_states=True))),
    "a dtype of auto": ("qwen3", in_config(lambda c: c.update(dtype="auto"))),
    "another file by name": ("qwen3", another_file),
    "masks of old files": (
        "gpt2",
        in_file(
            lambda t: t.update({f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")})
        ),
    ),
}
REFUSED = {
    "tied, another head": (
        "qwen2",
        in_file(lambda t: t.update({HEAD: torch.ones(96, 32)})),
        rf"{EMBEDDING} and {HEAD}.*not equal.*tie_word_embeddings to false",
    ),
    "tied, neither": ("qwen2", in_file(lambda t: t.pop(EMBEDDING)), f"lacks {EMBEDDING}"),
    "untied, no head": ("qwen3", in_file(lambda t: t.pop(HEAD)), f"lacks {HEAD}"),
    "a classifier": ("qwen2", in_file(lambda t: t.update({"score.weight": torch.ones(2, 32)})), "no place for score"),
    "both prefixes": ("qwen3", in_file(lambda t: t.update({"norm.weight": t[NORM] + 1})), "norm.weight.*not equal"),
    "a wrapper": ("qwen3", renamed("model.", "model.language_model."), "no place for model.language_model"),
    "rest of an adapter": ("qwen3", in_file(lambda t: t.update({"x.lora_A": torch.ones(2)})), "no place for x.lora_A"),
    "the index names what no file has": (
        "qwen3",
        in_index(lambda m: m.update(x=m[NORM])),
        "index.json.*names x, which",
    ),
    "more in a shard": ("qwen3", in_shard(0, "surplus", torch.ones(2)), "no place for surplus"),
    "twice in the shards": ("qwen3", in_shard(0, NORM, torch.ones(32)), f"{NORM}.*differs between model-00001-of"),
    "shards and a whole file": ("qwen3", whole_file, "holds model.safetensors and the shards"),
    "no index": ("qwen3", lambda f: (f / f"{WEIGHTS}.index.json").write_text("{"), "is no index of weights"),
    "an expert is missing": ("qwen3_moe", in_file(lambda t: t.pop(UP)), "experts.gate_up_proj cannot be made"),
    "an expert of another shape": (
        "qwen3_moe",
        in_file(lambda t: t.update({UP: torch.ones(3, 32)})),
        "experts.gate_up_proj cannot be made",
    ),
    "an adapter": ("qwen3", adapter, "adapter of peft.*merge_and_unload"),
    "NaN where few rows look": (
        "qwen3",
        in_file(lambda t: t[EMBEDDING][95].fill_(float("nan"))),
        f"{EMBEDDING}.*finite",
    ),
    "infinity": ("qwen3", in_file(lambda t: t[HEAD][95, 0].fill_(float("-inf"))), f"{HEAD}.*not finite"),
    "NaN in two copies": (
        "qwen2",
        in_file(lambda t: (t[EMBEDDING][95].fill_(float("nan")), t.update({HEAD: t[EMBEDDING].clone()}))),
        f"{EMBEDDING}.*not finite",
    ),
    "an index of no names": ("qwen3", in_index(lambda m: m.update({NORM: None})), "is no index of weights"),
    "a .bin of something else": ("qwen3", as_list, "bin cannot be read .it is no mapping"),
    "a .bin of a training run": ("qwen3", training_state, "bin cannot be read .it is no mapping"),
    "a file by name that is not there": (
        "qwen3",
        in_config(lambda c: c.update(transformers_weights="own.safetensors")),
        "transformers_weights=own.safetensors",
    ),
    "a padding token beyond the embedding": ("qwen3", in_config(lambda c: c.update(pad_token_id=500)), "Padding_idx"),
    "a field that no config has room for": ("qwen3", in_config(lambda c: c.update(use_return_dict=True)), "read its c"),
    "a field of another type": ("qwen3", in_config(lambda c: c.update(tie_word_embeddings=None)), "read its config"),
}
# Values with which transformers builds a module that it cannot run: found by the probe, in one line.
NOT_RUN = {
    "more experts for a token than there are": ("qwen3_moe", {"num_experts_per_tok": 8}),
    "groups that do not divide the experts": ("deepseek_v3", {"n_group": 3}),
    "a window that is null": ("gpt_oss", {"sliding_window": None}),
    "chunks that are null": ("llama4_text", {"attention_chunk_size": None}),
    "chunks of nothing": ("llama4_text", {"attention_chunk_size": 0}),
}
SHARDED = {name for name in (*SAME, *REFUSED) if "index" in name or "shard" in name}


@pytest.fixture(scope="module")
def nets():
    return {name: make_net(name) for name in ("qwen2", "qwen3", "gemma2", "qwen3_moe", "gpt2")}


def prepared(nets, case, tmp_path):
    name, change, *match = (SAME | REFUSED)[case]
    nets[name].save_pretrained(tmp_path, max_shard_size="20KB" if case in SHARDED else "1GB")
    change(Path(tmp_path))
    return ModelConfig(path=str(tmp_path)), match


@pytest.mark.parametrize("case", SAME)
def test_loaded_as_transformers_loads_it(case, nets, tmp_path):
    cfg, _ = prepared(nets, case, tmp_path)
    theirs = dict(tf.AutoModelForCausalLM.from_pretrained(cfg.path, dtype=torch.float32).named_parameters())
    model = build_model(cfg, Entries(96))
    check_against_transformers(model)
    ours = dict(model.net.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_name_of_the_tensor(case, nets, tmp_path):
    cfg, match = prepared(nets, case, tmp_path)
    with pytest.raises(UserError, match=match[0]) as caught:
        build_model(cfg, Entries(96))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "values"), NOT_RUN.values(), ids=NOT_RUN)
def test_a_config_that_transformers_cannot_run_is_refused(name, values, tmp_path):
    make_net(name).save_pretrained(tmp_path)
    in_config(lambda config: config.update(values))(tmp_path)
    with pytest.raises(UserError, match="own forward fails with this config.json .*; put the model's own") as caught:
        check_against_transformers(build_model(ModelConfig(path=str(tmp_path)), Entries(96)))
    assert "\n" not in str(caught.value)
