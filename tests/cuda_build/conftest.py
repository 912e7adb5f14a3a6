"""What of the CUDA path can be tried without a GPU, with torch's CUDA build and no driver (make test-cuda-build).

Three ways: the CUDA entry of an operator called on CPU tensors (`cuda_entry`: its checks come before any kernel);
forwards on fake tensors of cuda:0 (`fake_cuda`: wrong devices and hidden synchronisations show); training on meta
tensors that say they are CUDA's (`meta_is_cuda`). None of them shows a kernel's numbers, NCCL, graphs or the allocator:
those are for benchmarks/gpu_smoke.py.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from common import OperatorCounts  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the tests of this folder out where they say nothing: a CPU build, or a GPU on which they would crash."""
    if torch.version.cuda is None:
        reason = "needs torch's CUDA build: make test-cuda-build"
    elif torch.cuda.is_available():
        reason = "for machines without a GPU: here benchmarks/gpu_smoke.py runs the real thing"
    else:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Operators(OperatorCounts):
    """Counts copies between host and device besides for which the host waits, by operator, in `blocking`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            waits = not (args[2:] or (kwargs or {}).get("non_blocking", False))
            if waits and {source.device.type, out.device.type} == {"cpu", "cuda"}:
                self.blocking[f"{func} from {source.device.type}"] += 1
        return out


@pytest.fixture
def operators() -> Operators:
    """`with operators: ...`, then operators.counts["aten._local_scalar_dense.default"], operators.blocking."""
    return Operators()


@pytest.fixture
def cuda_entry() -> Callable[..., Any]:
    """Calls an operator's CUDA implementation on CPU tensors: cuda_entry(torch.ops.aten.x.default, ...).

    What its argument checks refuse raises their RuntimeError; what they accept fails later, for want of a driver."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(op: Any, *args: Any, **kwargs: Any) -> Any:
        return op.redispatch(keys, *args, **kwargs)

    return call


@pytest.fixture
def fake_cuda() -> Iterator[Callable[[torch.nn.Module], torch.nn.Module]]:
    """fake_cuda(module) replaces its parameters and buffers by fake ones on cuda:0; tensors made in the test are fake
    as well. Nothing is computed, shapes, dtypes, devices and synchronisations are those of a GPU."""

    def move(module: torch.nn.Module) -> torch.nn.Module:
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    like = torch.empty(weight.shape, dtype=weight.dtype, device="cuda:0")
                    part._parameters[name] = torch.nn.Parameter(like, requires_grad=weight.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda:0")
        return module

    with FakeTensorMode():
        yield move


@pytest.fixture
def meta_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device say that they are CUDA's, so that code takes the branches of a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type in ("cuda", "meta")))
