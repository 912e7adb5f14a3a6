"""Under fully_shard on two gloo ranks: the same weights, log-probs and gradients as whole, from code and from files."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from gloo import run_ranks

from skyrl.config.schema import ModelConfig, TinyModelConfig
from skyrl.models.forward import collate
from skyrl.models.lora import adapted
from skyrl.pretrained.load import build_model, build_on_meta, load_into
from skyrl.text.tokenizer import load_tokenizer
from skyrl.types import Datum, LoraSpec

SMALL = TinyModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48, vocab_size=301)


def rows(seed, count, vocab):
    rng = np.random.default_rng(seed)
    return [
        Datum(rng.integers(0, vocab, n), rng.integers(0, vocab, n), rng.random(n)) for n in rng.integers(1, 24, count)
    ]


def loss_of(model, data):
    mb = collate(data, torch.float64, "cpu")
    out = model(mb, temperature=0.7, entropy=True)
    if model.head == "value":
        return (out.values_T.square() * mb.weights_T).sum(), out.values_T
    return ((out.logprobs_T + 0.1 * out.entropy_T) * mb.weights_T).sum(), out.logprobs_T


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from skyrl.strategies.fsdp import sum_gradients

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    units = [part for part in model.modules() if isinstance(part, FSDPModule)]
    return model, sum_gradients(units, torch.device("cpu"), torch.float64, ranks=2)


class Any96:
    def __len__(self):
        return 96


def check(cfg, head, rank, vocab):
    tokenizer = load_tokenizer(cfg) if cfg.path == "tiny" else Any96()
    whole = build_model(cfg, tokenizer, dtype=torch.float64, head=head, seed=3)
    model, divided = shard(build_on_meta(cfg, tokenizer, head=head, dtype=torch.float64))
    load_into(model, cfg, device="cpu", seed=3)
    ours, theirs = dict(model.named_parameters()), dict(whole.named_parameters())
    assert list(ours) == list(theirs)
    for name, param in ours.items():
        assert torch.equal(param.full_tensor(), theirs[name]), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    if head == "logits":
        assert adapted(model, LoraSpec(2)).keys() == adapted(whole, LoraSpec(2)).keys()
    data = [rows(r, 5, vocab) for r in range(2)]
    for micro in range(2):  # gradients add up over calls
        half = [part[micro * 2 : micro * 2 + 2] for part in data]
        loss, mine = loss_of(model, half[rank])
        loss.backward()
        both = [loss_of(whole, part) for part in half]
        assert (mine - both[rank][1]).abs().max() < 1e-12
        (both[0][0] + both[1][0]).backward()
    for name, param in ours.items():
        gap = (param.grad.full_tensor() * divided - theirs[name].grad).abs().max()
        assert gap <= 1e-12 * max(1.0, theirs[name].grad.abs().max()), (name, gap)


def worker(folder):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    try:
        check(ModelConfig(tiny=SMALL, logits_chunk_tokens=1), "logits", rank, 301)  # tied, 3 blocks of the vocabulary
        check(ModelConfig(tiny=SMALL, activation_checkpointing=True), "value", rank, 301)
        for path in sorted(folder.iterdir()):
            check(ModelConfig(path=str(path)), "logits", rank, 96)
    finally:
        dist.destroy_process_group()


@pytest.mark.ranks
def test_sharded_equals_whole(tmp_path):
    from families import make_net

    newer = ["kimi_linear"] if hasattr(transformers, "KimiLinearConfig") else []
    for name in ("qwen3_moe", "gemma2", *newer):
        make_net(name, std=0.1).save_pretrained(tmp_path / name, max_shard_size="20KB")
    run_ranks(2, worker, tmp_path)
