"""The build itself, and that the three ways of this folder work with it."""

import pytest
import torch


def test_this_is_the_cuda_build_without_a_driver():
    """Else the other tests of this folder would say nothing."""
    assert torch.version.cuda and not torch.cuda.is_available()
    assert "sm_80" in torch._C._cuda_getArchFlags().split()


def test_an_operator_s_own_checks_answer_on_cpu_tensors(cuda_entry):
    """FlashAttention 2 wants the borders of queries and keys both or neither, and says so before any kernel."""
    packed, starts = torch.randn(4, 2, 64, dtype=torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    attention = torch.ops.aten._flash_attention_forward.default
    with pytest.raises(RuntimeError, match="must be both set or both not set"):
        cuda_entry(attention, packed, packed, packed, starts, None, 4, 4, 0.0, True, False)


def test_synchronisations_show_on_fake_tensors(fake_cuda, operators):
    layer = fake_cuda(torch.nn.Linear(4, 3))
    with operators:
        out = layer(torch.ones(2, 4, device="cuda:0"))
    assert out.device == torch.device("cuda", 0) and operators.counts["aten._local_scalar_dense.default"] == 0
    assert not operators.blocking
    with operators:
        out.cpu()
        out.copy_(torch.ones(2, 3), non_blocking=True)
        torch.ones(3).to("cuda:0", non_blocking=True)
        torch.tensor([1.0], device="cuda:0")
    assert sum(operators.blocking.values()) == 2


def test_meta_tensors_take_the_branches_of_a_gpu(meta_is_cuda):
    assert torch.empty(1, device="meta").is_cuda and not torch.empty(1).is_cuda
