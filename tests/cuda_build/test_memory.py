"""Batches and optimizer steps as a GPU would see them."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from skyrl.algorithms.losses import compute_loss
from skyrl.models.forward import CausalLM
from skyrl.models.packed import collate
from skyrl.models.results import RowResults
from skyrl.strategies.adam import make_adam
from skyrl.types import Datum, ForwardOutput, LossSpec
from tests.families import make_net


def test_a_micro_batch_reaches_the_gpu_by_one_copy(fake_cuda, operators):
    rows = [Datum(np.arange(n), np.arange(n), np.ones(n), advantages=np.ones(n)) for n in (3, 5)]
    with operators:
        batch = collate(rows, torch.float32, "cuda:0")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert {str(value.device) for value in tensors} == {"cuda:0"} and len(tensors) == 7
    assert operators.counts["aten._to_copy.default"] == 1
    assert operators.counts["aten._local_scalar_dense.default"] == 0 and not operators.blocking


@pytest.fixture(params=["qwen3", "gemma3", "mistral"])
def model(request):
    """Made before tensors are fake."""
    return CausalLM(make_net(request.param)).to(torch.bfloat16)


def test_an_update_copies_nothing_that_the_host_waits_for(model, fake_cuda, operators):
    """Batch, forward and loss (autograd wants a driver); what comes to the host comes at the end of a call."""
    fake_cuda(model)
    model.net.tie_weights()
    numbers = (9, 17, 30)
    with operators:
        rows = [Datum(np.arange(n), np.arange(n), np.ones(n), advantages=np.ones(n), old_logprobs=-np.ones(n),
                      sampling_logprobs=-np.ones(n)) for n in numbers]  # fmt: skip
        batch = collate(rows, torch.float32, "cuda:0")
        out = model(batch, temperature=0.7, entropy=True)
        loss_T, metrics = compute_loss(out, batch, LossSpec("ppo", correction="token_truncate"))
        results = RowResults(rows)
        results.add_output([0, 1, 2], out.logprobs_T)
        results.add_loss((loss_T * batch.weights_T).sum(), loss_T, metrics, batch)
    assert operators.counts["torch_attn._varlen_attn.default"] > 0
    assert not operators.counts["aten._local_scalar_dense.default"] and not operators.blocking


@pytest.mark.parametrize("name", "importance_sampling reinforce ppo cispo sapo dppo_tv gspo gmpo vespo dro".split())
def test_a_loss_copies_nothing_to_the_gpu(name, fake_cuda, operators):
    """Its parameters are numbers of the host."""
    rows = [Datum(np.arange(n), np.arange(n), np.ones(n), advantages=np.ones(n), old_logprobs=-np.ones(n),
                  sampling_logprobs=-np.ones(n)) for n in (9, 17)]  # fmt: skip
    batch = collate(rows, torch.float32, "cuda:0")
    out = ForwardOutput(-torch.ones(26, device="cuda:0"), torch.ones(26, device="cuda:0"))
    with operators:
        compute_loss(out, batch, LossSpec(name, entropy_coef=0.1, correction="sequence_mask"))
    assert not operators.counts["aten._local_scalar_dense.default"] and not operators.blocking


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
