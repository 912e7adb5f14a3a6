"""What each rank of tests/test_checkpoint_ranks.py does."""

import errno
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import skyrl.checkpoint.checkpointer as module
from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.checkpoint.folder import latest
from skyrl.types import UserError

SIZES = (5, 7, 3)  # divisible by neither 2 nor 4


def build(mesh, seed, steps):
    """An FSDP2 model and a plain (replicated) one with AdamW states, after some steps; on one process both plain."""
    models, tensors = {}, {}
    for name in ("sharded", "plain"):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(*SIZES[:2]), torch.nn.Linear(*SIZES[1:]))
        if name == "sharded" and mesh is not None:
            for layer in net:
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        models[name] = (net, optimizer)
        for _ in range(steps):
            train(net, optimizer)
        tensors[name] = {
            "model": dict(net.state_dict()),
            "optimizer": {key: dict(optimizer.state[value]) for key, value in net.named_parameters()},
        }
    if mesh is not None:  # a sharded model with a parameter without dimensions
        scalar = torch.tensor(float(seed))
        tensors["scalar"] = DTensor.from_local(scalar, mesh, [torch.distributed.tensor.Replicate()])
    else:
        tensors["scalar"] = torch.tensor(float(seed))
    tensors["count"] = seed
    return models, tensors


def train(net, optimizer):
    optimizer.zero_grad()
    net(torch.ones(2, SIZES[0])).square().sum().backward()
    optimizer.step()


def whole(tree):
    """Nested plain copies of the full tensors."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def same_error_everywhere(call):
    try:
        call()
        text = "no error"
    except UserError as problem:
        text = str(problem)
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert len(set(texts)) == 1, texts
    return text


def save(folder, rank, saver, mesh):
    models, tensors = build(mesh, seed=1, steps=3)
    before = whole(tensors)
    if rank == 0:
        torch.save(before, folder / "reference.pt")
    blocked = time.monotonic()
    saver.save("s1", tensors, {"step": 1, "position": 11}, score=0.5)
    blocked = time.monotonic() - blocked
    for net, optimizer in models.values():  # collectives of training on the default group, and changed parameters
        for _ in range(30):
            train(net, optimizer)
            dist.all_reduce(torch.ones(1))
    if isinstance(tensors["scalar"], DTensor):
        tensors["scalar"].to_local().fill_(-1)
    saver.wait()
    lines = saver.poll()
    assert len(lines) == (rank == 0), lines
    assert not same(whole(tensors), before)
    assert saver.load(folder / "checkpoints" / "s1", tensors) == {"step": 1, "position": 11}
    assert same(whole(tensors), before)

    # the disk of one rank fills up: every rank hears the same, and the next save works
    real = module._HashingStream.write

    def full(stream, data):
        stream.problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        return real(stream, data)

    if rank == 1:
        module._HashingStream.write = full
    saver.save("s2", tensors, {"step": 2}, score=None)
    text = same_error_everywhere(saver.wait)
    assert "not saved on rank 1 (No space left on device" in text and "last complete checkpoint is" in text, text
    module._HashingStream.write = real
    dist.barrier()
    assert os.listdir(folder / "checkpoints") == ["s1"]
    dist.barrier()
    saver.save("s3", tensors, {"step": 3}, score=None, block=True)
    dist.barrier()
    assert latest(folder / "checkpoints").tag == "s3"

    # a damaged file lies in the share of one rank: every rank refuses, nobody has touched a weight
    files = sorted((folder / "checkpoints" / "s3").glob("*.distcp"))
    assert len(files) == 2
    for path in files:
        dist.barrier()
        data = path.read_bytes()
        dist.barrier()
        if rank == 0:
            path.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
        dist.barrier()
        _, other = build(mesh, seed=2, steps=1)
        kept = whole(other)
        text = same_error_everywhere(lambda other=other: saver.load(folder / "checkpoints" / "s3", other))
        assert path.name in text and "damaged" in text and "run.resume=" in text, text
        assert same(whole(other), kept)
        dist.barrier()
        if rank == 0:
            path.write_bytes(data)
    dist.barrier()
    print(f"blocked {blocked:.3f} s", flush=True)


def load(folder, rank, saver, mesh):
    _, tensors = build(mesh, seed=2, steps=1)
    assert saver.load(folder / "checkpoints" / "s1", tensors) == {"step": 1, "position": 11}
    assert same(whole(tensors), torch.load(folder / "reference.pt"))
    saver.save(f"from-{saver.world_size}", tensors, {"step": 4}, score=None, block=True)


def run(action, folder):
    """`save` or `load`, on one of the ranks that the environment tells of."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    saver = Checkpointer(
        folder / "checkpoints",
        keep_last=0,
        keep_best=False,
        async_save=True,
        rank=rank,
        world_size=world_size,
        group=dist.new_group(backend="gloo"),
    )
    mesh = init_device_mesh("cpu", (world_size,))
    action(folder, rank, saver, mesh)
    dist.barrier()
    dist.destroy_process_group()
