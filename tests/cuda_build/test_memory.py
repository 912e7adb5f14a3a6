"""Batches and optimizer steps as a GPU would see them."""

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from skyrl.models.packed import collate
from skyrl.strategies.adam import make_adam
from skyrl.types import Datum


def test_a_micro_batch_reaches_the_gpu_by_one_copy(fake_cuda, operators):
    rows = [Datum(np.arange(n), np.arange(n), np.ones(n), advantages=np.ones(n)) for n in (3, 5)]
    with operators:
        batch = collate(rows, torch.float32, "cuda:0")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert {str(value.device) for value in tensors} == {"cuda:0"} and len(tensors) == 7
    assert operators.counts["aten._to_copy.default"] == 1
    assert operators.counts["aten._local_scalar_dense.default"] == 0 and not operators.blocking


def test_adamw_over_shards_is_one_fused_kernel_without_a_synchronisation(operators):
    """As FSDPStrategy makes it without offload: sharded parameters, the number of steps beside them on the device."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cuda", (2,))
        with FakeTensorMode():
            p = torch.nn.Parameter(DTensor.from_local(torch.zeros(4, 3, device="cuda:0"), mesh, [Shard(0)]))
            adam = make_adam([p], fused=False)
            p.grad = torch.zeros_like(p)
            with operators:
                adam.step()
    finally:
        dist.destroy_process_group()
    assert sum(count for name, count in operators.counts.items() if "_fused_adamw_" in name) >= 1
    assert operators.counts["aten._local_scalar_dense.default"] == 0
    assert operators.counts["aten._foreach_sqrt.default"] == 0
