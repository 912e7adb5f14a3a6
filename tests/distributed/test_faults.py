"""Real texts of torch, CUDA, NCCL and gloo: which of them say that another rank is gone, and what the others say."""

import errno
import socket

import pytest
import torch
import torch.distributed as dist

from skyrl import main
from skyrl.distributed import env
from skyrl.distributed.failure import is_lost_peer
from skyrl.distributed.faults import classify, describe
from skyrl.planner.device import ALLOCATOR_OPTIONS, torch_release

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.29.7\n{}\nLast error:\n{}"
)
UNHANDLED_CUDA = "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
CALL_FAILED = "ncclUnhandledCudaError: Call to CUDA function failed."
UNHANDLED_SYSTEM = "unhandled system error (run with NCCL_DEBUG=INFO for details)"
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
INVALID = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/{}"
needs_alloc_conf = pytest.mark.skipif(
    torch_release() < (2, 9), reason="an older torch reads PYTORCH_CUDA_ALLOC_CONF, which the advice names there"
)
AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)  # torch 2.7 raises the plain one
SEARCH = "\nSearch for `cudaErrorX' in https://docs.nvidia.com/cuda/cuda-runtime-api for more information.\n"
OOM = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.12 GiB is "
    "free. {}Including non-PyTorch memory, this process has 70.97 GiB memory in use. Of the allocated memory {} GiB is "
    "allocated by PyTorch, and {} GiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try "
    "setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def of_cuda(last: str) -> dist.DistBackendError:
    return dist.DistBackendError(NCCL.format(UNHANDLED_CUDA, CALL_FAILED, last))


def of_system(last: str) -> dist.DistBackendError:
    return dist.DistBackendError(NCCL.format(UNHANDLED_SYSTEM, SYSTEM, last))


LOST = [
    RuntimeError(GLOO.format("pair.cc:537] Read error [127.0.0.1]:14755: Connection reset by peer. This is typically")),
    RuntimeError(GLOO.format("pair.cc:544] Connection closed by peer [127.0.0.1]:45345")),
    RuntimeError(GLOO.format("unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete")),
    RuntimeError(GLOO.format("pair.cc:523] Application timeout caused pair closure")),
    RuntimeError("Rank 0 successfully reached monitoredBarrier, received errors: [c10d] Connection closed by peer"),
    dist.DistStoreError("wait timeout after 20000ms, keys: /x"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    dist.DistBackendError(
        NCCL.format(
            "remote process exited or there was a network error",
            REMOTE,
            "socketProgress: Connection closed by remote peer",
        )
    ),
    of_system("socketPollConnect: connect to 10.0.0.4<4242> returned Connection timed out"),
    dist.DistBackendError(
        NCCL.format(
            "internal error",
            "ncclInternalError: Internal check failed.",
            "Net : Call to recv from n2<1> failed : Broken pipe",
        )
    ),
    dist.DistBackendError(
        "NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] "
        "Watchdog caught collective "
        "operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600029 "
        "milliseconds before "
        "timing out."
    ),
    RuntimeError("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE) ran"),
    RuntimeError("[Gloo] Rank 0 successfully reached monitoredBarrier, but received errors while waiting for rank 1"),
    dist.DistBackendError(
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId via c10d key-value store by key '0', "
        "but store->get('0') got error: Connection reset by peer"
    ),
]
HERE = [
    (
        torch.OutOfMemoryError(OOM.format("", "60.00", "0.50")),
        "memory",
        "CUDA out of memory. Tried to allocate 20.00 GiB",
    ),
    (AcceleratorError("CUDA error: out of memory" + SEARCH), "memory", "CUDA error: out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory", "CUBLAS"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory", "CUDNN"),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "memory",
        "DefaultCPUAllocator",
    ),
    (MemoryError("Unable to allocate 7.11 PiB for an array with shape (10,)"), "memory", "7.11 PiB"),
    (MemoryError(), "memory", "no memory is left"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory", "Cannot allocate memory"),
    (of_cuda("Cuda failure 2 'out of memory'"), "memory", "Cuda failure 2"),
    (AcceleratorError("CUDA error: uncorrectable ECC error encountered" + SEARCH), "gpu", "ECC"),
    (of_cuda("Cuda failure 214 'uncorrectable ECC error encountered'"), "gpu", "Cuda failure 214"),
    (
        AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution" + SEARCH),
        "gpu",
        "NVLink",
    ),
    (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable" + SEARCH), "gpu", "busy"),
    (
        AcceleratorError("CUDA error: an illegal memory access was encountered" + SEARCH),
        "kernel",
        "illegal memory",
    ),
    (AcceleratorError("CUDA error: misaligned address" + SEARCH), "kernel", "misaligned"),
    (AcceleratorError("CUDA error: unspecified launch failure" + SEARCH), "kernel", "unspecified"),
    (RuntimeError("CUDA error: device-side assert triggered" + SEARCH), "kernel", "assert"),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, ...)`"),
        "kernel",
        "CUBLAS",
    ),
    (of_cuda("Cuda failure 700 'an illegal memory access was encountered'"), "kernel", "Cuda failure 700"),
    (
        dist.DistBackendError(
            "NCCL communicator was aborted on rank 0. Original reason for failure was: CUDA error: an illegal memory "
            "access was encountered"
        ),
        "kernel",
        "illegal",
    ),
    (
        RuntimeError("CUDA error: no kernel image is available for execution on the device" + SEARCH),
        "setup",
        "no kernel",
    ),
    (
        RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        "setup",
        "driver",
    ),
    (
        RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version" + SEARCH),
        "setup",
        "insufficient",
    ),
    (AssertionError("Torch not compiled with CUDA enabled"), "setup", "not compiled"),
    (RuntimeError("Distributed package doesn't have NCCL built in"), "setup", "NCCL built in"),
    (ValueError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), "setup", "no GPUs found"),
    (
        dist.DistBackendError(
            NCCL.format(
                "invalid usage", INVALID, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
            )
        ),
        "setup",
        "Duplicate GPU",
    ),
    (
        of_system(
            "Error while creating shared memory segment /dev/shm/nccl-x (size 9), error: No space left on device (28)"
        ),
        "setup",
        "/dev/shm",
    ),
    (
        dist.DistBackendError(
            NCCL.format(
                "internal error", "ncclInternalError: Internal check failed.", "Bootstrap : no socket interface found"
            )
        ),
        "setup",
        "no socket",
    ),
    (
        RuntimeError(
            "unable to open shared memory object </torch_12_3> in read-write mode: No space left on device (28)"
        ),
        "setup",
        "shared memory",
    ),
    (RuntimeError("CUDA driver error: out of memory"), "memory", "driver error"),
    (RuntimeError("HIP error: out of memory"), "memory", "HIP"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "memory", "Triton"),
    (RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"), "memory", "Triton"),
    (of_cuda("Failed to CUDA calloc async 608 bytes"), "memory", "calloc"),
    (of_cuda("Failed to CUDA host alloc 4096 bytes"), "memory", "alloc"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "memory", "CUBLAS"),
    (RuntimeError("CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`"), "memory", "BLAS"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "memory", "CUDNN"),
    (RuntimeError("CUDA error: device 3 is lost"), "gpu", "device 3"),
    (of_cuda("Cuda failure 721 'Contained error'"), "gpu", "Contained"),
    (RuntimeError("Unable to determine the device handle: GPU is lost. Reboot the system"), "gpu", "GPU is lost"),
    (RuntimeError("Triton Error [CUDA]: misaligned address"), "kernel", "misaligned"),
    (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/x"), "setup", "/dev/shm/x"),
    (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "setup", "unable to write"),
    (of_system("Error: failed to extend /dev/shm/nccl-3Xq1 to 9637892 bytes"), "setup", "extend"),
    (RuntimeError("CUDA error: the provided PTX was compiled with an unsupported toolchain." + SEARCH), "setup", "PTX"),
    (RuntimeError("CUDA error: device kernel image is invalid" + SEARCH), "setup", "invalid"),
    # none of these is a fault that one line explains: they keep their traceback
    (ValueError("no judge for 'What is an NCCL timeout?': Connection refused by http://localhost:8000"), None, ""),
    (OSError(errno.ENOSPC, "No space left on device", "/scratch/x"), None, ""),
    (RuntimeError("Parent directory /dev/shm/run1 does not exist."), None, ""),
    (RuntimeError("Expected all tensors on the same device, found cuda:0 and cpu! /dev/shm/hf_cache"), None, ""),
    (RuntimeError("unable to open shared memory object </torch_1_2>: Too many open files (24)"), None, ""),
    (RuntimeError("could not unlink the shared memory file /torch_123 : No such file or directory (2)"), None, ""),
    (RuntimeError("device mesh is lost"), None, ""),
    (RuntimeError("no device name; what the episode says is lost"), None, ""),
    (RuntimeError("the environment wrote: self-Contained error message"), None, ""),
    (RuntimeError("the log contained error lines"), None, ""),
    (RuntimeError("the emulated machine met an illegal instruction"), None, ""),
    (RuntimeError("Connection reset by peer while talking to nccl-lab.example.org"), None, ""),
    (RuntimeError("https://example.org/gloo/scores: Connection refused"), None, ""),
    (RuntimeError("NCCL_ALGO=Foo is not known"), None, ""),
    (
        dist.DistBackendError(
            NCCL.format(
                "invalid argument", "ncclInvalidArgument: Invalid value for an argument.", "Broadcast : invalid root 7"
            )
        ),
        None,
        "",
    ),
    (RuntimeError("the judge's request timed out"), None, ""),
    (RuntimeError("HTTP: Connection reset by peer"), None, ""),
    (ConnectionResetError("Connection reset by peer"), None, ""),
    (
        RuntimeError("[enforce fail at /x/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 50000 vs 8"),
        None,
        "",
    ),
    (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), None, ""),
    (KeyError("NCCL"), None, ""),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-60:])
def test_a_lost_rank_is_known_by_its_text(error):
    assert classify(error).kind == "lost" and is_lost_peer(error)


@pytest.mark.parametrize("error, kind, what", HERE, ids=lambda part: str(part)[-60:])
def test_what_is_wrong_here_is_not_a_lost_rank(error, kind, what):
    fault = classify(error)
    assert (fault.kind if fault else None) == kind and not is_lost_peer(error)
    if fault is not None:
        line = describe(fault, "training", 7, "")
        assert what in fault.what and "\n" not in line and "in training, step 7" in line
        assert kind == "memory" or fault.remedy


def test_out_of_memory_says_the_phase_what_was_planned_and_what_to_lower():
    def line(phase, others="", allocated="60.00", idle="0.50", planned="12.00 of 79.1 GiB (weights 3.00)"):
        return describe(classify(torch.OutOfMemoryError(OOM.format(others, allocated, idle))), phase, 3, planned)

    training, drawing, loading = line("training"), line("generation"), line("loading")
    assert training.startswith(
        "out of memory in training, step 3 (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"
    )
    assert "planned: 12.00 of 79.1 GiB (weights 3.00); lower batch.max_tokens_per_microbatch" in training
    assert "lower sampler.kv_cache_gib or sampler.max_running" in drawing and "microbatch" not in drawing
    assert "strategy.name=fsdp or zero3" in loading and line("evaluation") == drawing.replace(
        "generation", "evaluation"
    )
    for told in (training, drawing, loading, line("")):
        assert "expandable_segments" not in told and told.endswith("dry_run=true shows what needs how much")
    assert "another process (4321) holds 60.00 GiB" in line("training", "Process 4321 has 60.00 GiB memory in use. ")
    assert line("").startswith("out of memory (") and "planned" not in line("", planned="")


@pytest.mark.parametrize(
    "processes, known, blamed",
    [
        ("Process 17 has 60.00 GiB memory in use. ", True, "(17) holds 60.00 GiB"),
        ("Process 17 has 9000.00 MiB memory in use. ", True, "(17) holds 9000.00 MiB"),
        ("Process 9 has 4.00 MiB memory in use. Process 17 has 20.00 GiB memory in use. ", True, "(17) holds 20.00"),
        ("Process 17 has 20.00 GiB memory in use. Process 9 has 30.00 GiB memory in use. ", True, "(9) holds 30.00"),
        ("Process 3 has 17179869184.00 GiB memory in use. Process 9 has 8.00 GiB memory in use. ", True, "(9) holds 8"),
        ("Process 17 has 4.00 MiB memory in use. ", True, None),
        ("Process 17 has 7.90 GiB memory in use. ", True, None),
        ("Process 17 has 17179869184.00 GiB memory in use. ", True, None),
        ("Process 17 has 77.91 GiB memory in use. ", False, None),  # a container: this is the run itself
        ("Process 17 has 40.00 GiB memory in use. Process 18 has 30.00 GiB memory in use. ", False, None),
        ("", True, None),
    ],
)
def test_another_process_is_blamed_only_for_what_it_surely_holds(processes, known, blamed):
    text = OOM.format(processes, "60.00", "0.50")
    if not known:
        text = text.replace("Including non-PyTorch memory, this process has 70.97 GiB memory in use. ", "")
    line = describe(classify(torch.OutOfMemoryError(text)), "training", 3, "")
    if blamed:
        assert f"another process {blamed}" in line and "lower" not in line
    else:
        assert "another process" not in line and "; lower batch.max_tokens_per_microbatch" in line


@needs_alloc_conf
@pytest.mark.parametrize(
    "options, idle, advised",
    [
        ({}, "9.50", "; PYTORCH_ALLOC_CONF=expandable_segments:True (memory"),
        ({}, "7.00", ""),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "9.50", ""),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
            "9.50",
            "; PYTORCH_ALLOC_CONF=expandable_segments:True (",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"}, "9.50", ""),
        (  # torch reads the older name first, and then not the newer one
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            "9.50",
            "; PYTORCH_ALLOC_CONF=expandable_segments:True in place of PYTORCH_CUDA_ALLOC_CONF (memory",
        ),
    ],
)
def test_expandable_segments_are_advised_where_they_are_not_in_force(monkeypatch, options, idle, advised):
    for name in ALLOCATOR_OPTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    line = describe(classify(torch.OutOfMemoryError(OOM.format("", "60.00", idle))), "training", 3, "")
    assert advised in line and ("expandable_segments" in line) == bool(advised)


def test_a_full_shared_memory_is_told_with_how_to_enlarge_it(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/dev/shm/psm_1")
    assert main._report(full, "train") == 1 and "--shm-size" in capsys.readouterr().err
    assert main._report(OSError(errno.ENOSPC, "No space left on device", "/scratch/x"), "train") == 2
    assert "free some space there" in capsys.readouterr().err


@needs_alloc_conf
def test_what_a_person_sees_of_a_fault(capsys, monkeypatch):
    """One line with rank and host; for a kernel's fault also where the program was, before it."""
    monkeypatch.setattr(env, "planned_memory", "1.00 GiB")
    out_of_memory, illegal = HERE[0][0], next(error for error, kind, _ in HERE if kind == "kernel")
    assert main._report(out_of_memory, "train") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"skyrl: error: rank 0 on {socket.gethostname()}: out of memory (CUDA out")
    assert said.count("\n") == 1
    assert "planned: 1.00 GiB; lower batch.max_tokens_per_microbatch" in said
    assert main._report(illegal, "train") == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].startswith("torch.AcceleratorError: CUDA error: an illegal") and "CUDA_LAUNCH_BLOCKING=1" in lines[-1]
    )
    assert lines[-1].startswith(f"skyrl: error: rank 0 on {socket.gethostname()}: CUDA error: an illegal memory access")
    assert main._report(RuntimeError("NCCL_ALGO=Foo is not known"), "train") == 1
    assert "RuntimeError: NCCL_ALGO=Foo" in capsys.readouterr().err
