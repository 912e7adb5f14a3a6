"""What an error of torch, CUDA, NCCL or gloo means: another rank is gone, or something is wrong on this one.

By type and text alone, without torch, so that a text from any machine can be tested. The whole text counts, and what is
wrong here comes first: NCCL reports a broken GPU of this rank under the same first line as a lost connection.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import Literal

from skyrl.planner.device import ALLOCATOR, ALLOCATOR_OPTIONS

Kind = Literal["memory", "gpu", "kernel", "setup", "lost"]
LONGEST = 4000  # characters of an error that are looked at; symbolised C++ frames may follow
FRAGMENTED = 0.1  # of the device's memory, reserved and not allocated
HELD = 0.1  # of the device's memory: another process that holds less is not to blame
SIZE = r"(?P<size>(?P<number>[\d.]+) (?P<unit>\wiB))"
UNITS = {"KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0, "TiB": 2.0**10}
OVER_MORE_RANKS = "strategy.name=fsdp or zero3 over more ranks"
STARTING = "the start"
PHASE_REMEDIES = {
    STARTING: "nothing of this run is loaded yet: nvidia-smi (rocm-smi) shows what fills it: end that, or change nodes",
    "generation": f"lower sampler.kv_cache_gib or sampler.max_running, or {OVER_MORE_RANKS}",
    "training": "lower batch.max_tokens_per_microbatch or model.logits_chunk_tokens, set "
    f"model.activation_checkpointing=true, or {OVER_MORE_RANKS}",
    "loading": f"{OVER_MORE_RANKS}, strategy.offload, or a smaller model",
    "": "lower batch.max_tokens_per_microbatch or sampler.kv_cache_gib, set model.activation_checkpointing=true, or "
    f"{OVER_MORE_RANKS}",
}
SAME_REMEDY = {"evaluation": "generation", "warm-up": "training"}
SAME_REMEDY |= dict.fromkeys(("opening", "finishing", "saving"), "loading")


@dataclass(frozen=True)
class Fault:
    """`kind`: memory (out of it), gpu (broken or taken), kernel (a program's fault, or a GPU's), setup (something of
    this machine or start), lost (another rank, or the way to it). `what` is the line of the text that says so."""

    kind: Kind
    what: str
    remedy: str = ""


_LAST_CHECKPOINT = "the same command goes on from the last checkpoint"
_BROKEN = f"leave this GPU or node out and tell who runs it (dmesg says more); {_LAST_CHECKPOINT}"
_KERNEL = (
    "CUDA_LAUNCH_BLOCKING=1 (AMD_SERIALIZE_KERNEL=3 on ROCm) shows the line that started it; where it comes and goes, "
    f"a GPU is broken (dmesg says so); {_LAST_CHECKPOINT}"
)
# Before the words of a fault of a GPU, on the same line: a user's "illegal instruction" is about something else.
_CUDA_SAYS = r"(\b(CUDA|HIP) (driver |runtime )?(error|failure)|Triton Error|NVML).*"
_RULES: tuple[tuple[Kind, str, str], ...] = (
    (
        "memory",
        r"(CUDA|HIP) out of memory|(CUDA|HIP) (driver |runtime )?error:? (\(2\) : )?out of memory|"
        r"(Cuda|HIP) failure:? (\d+ )?'out of memory'|Triton Error.*out of memory|Failed to CUDA (host )?[cm]?alloc|"
        r"(CU|HIP)\w+_STATUS_ALLOC_FAILED|(CU|HIP)(BLAS|DNN)\w*_STATUS_NOT_INITIALIZED|rocblas_status_memory_error|"
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|"
        r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|Cannot allocate memory",
        "",
    ),
    (
        "gpu",
        rf"{_CUDA_SAYS}(ECC error|uncorrectable NVLink|over nvlink or a hardware error|hardware stack error|"
        r"unspecified device failure|(?<![\w-])Contained error\b|\bdevice .*is lost|device lost)|"
        r"uncorrectable ECC error|GPU is lost|fallen off the bus|cudaErrorDevicesUnavailable",
        _BROKEN,
    ),
    (
        "gpu",
        r"device\(s\) is/are busy or unavailable",
        "another process holds the GPU, or it is in exclusive mode (nvidia-smi, rocm-smi): end it or use another GPU",
    ),
    (
        "setup",
        r"no kernel image is available|invalid device function|kernel image is invalid|unsupported toolchain",
        "this torch has no kernels for the GPU and its driver: update that, or install the build that a run names",
    ),
    (
        "kernel",
        r"device-side assert triggered",
        "an index is out of range, most often a token id beyond the model's vocabulary; CUDA_LAUNCH_BLOCKING=1 "
        "(AMD_SERIALIZE_KERNEL=3 on ROCm) shows where",
    ),
    (
        "kernel",
        rf"{_CUDA_SAYS}(illegal memory access|misaligned address|illegal instruction|invalid program counter|"
        r"invalid address space|unspecified launch failure|launch timed out and was terminated)|"
        r"(CU|HIP)\w+_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)",
        _KERNEL,
    ),
    (
        "setup",
        r"driver version is insufficient|driver on your system is too old|Found no NVIDIA driver|"
        r"no (CUDA|ROCm)-capable device|No (CUDA|HIP) GPUs are available|driver initialization failed|"
        r"system not yet initialized|(CUDA|HIP) unknown error|(CUDA|HIP) error: (unknown error|initialization error)",
        "see whether nvidia-smi (rocm-smi) works here, mend the driver or use another node; skyrl-tx doctor says more",
    ),
    (
        "setup",
        r"not compiled with CUDA|doesn't have NCCL built in|ProcessGroupNCCL is only supported with GPUs",
        "install a torch built for this machine's GPUs (CUDA or ROCm), or give strategy.device=cpu",
    ),
    ("setup", r"Duplicate GPU detected", "start one process for each GPU, with torchrun or srun --gpus-per-task=1"),
    ("setup", r"Mismatched NCCL version", "give all nodes the same environment"),
    (
        "setup",
        r"/dev/shm.*No space left on device|No space left on device.*/dev/shm|failed to extend /dev/shm|"
        r"(unable to|Error while creating) (?!.*(No such file|Too many open files|Permission denied))"
        r".*(shared memory|/dev/shm|</torch_\d+)",
        "/dev/shm is full or too small: in a container --shm-size=8g or --ipc=host",
    ),
    (
        "setup",
        r"no socket interface found|Failed to initialize (any )?NET plugin|ibv_\w+ .*failed|"
        r"Failed to bind NVLink SHARP",
        "NCCL_SOCKET_IFNAME names the interface between nodes, NCCL_IB_DISABLE=1 or NCCL_NVLS_ENABLE=0 leaves the "
        "broken way out; NCCL_DEBUG=INFO says more",
    ),
)
# What gloo, NCCL and the store say of a rank that is gone or late. A text that is none of theirs is not looked at: a
# user's "connection reset" is about something else.
_OF_A_GROUP = re.compile(r"/gloo/[\w/]+\.\w+:\d+|\[Gloo\]|WorkNCCL|NCCL (error|comm)|\bnccl[A-Z]|ProcessGroup|c10d")
_LOST = re.compile(
    r"Connection (closed|reset|refused|aborted|timed out)|Broken pipe|pair closure|closed by (remote )?peer|"
    r"ncclRemoteError|remote process exited|Timed out waiting|collective operation timeout|before timing out|"
    r"NCCL timeout|communicator was aborted|Socket (Timeout|closed)|No route to host|wait timeout|"
    r"Software caused connection abort|successfully reached monitoredBarrier",
    re.IGNORECASE,
)


def classify(error: BaseException) -> Fault | None:
    """The fault that an error (of a disk: a full /dev/shm) tells of; None for others, shown with their traceback."""
    names = [kind.__name__ for kind in type(error).__mro__]
    text = str(error)[:LONGEST]
    memory = "OutOfMemoryError" in names or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if memory or isinstance(error, MemoryError):
        return Fault("memory", _line(text) or "no memory is left")
    if not isinstance(error, (RuntimeError, AssertionError, ValueError)) and getattr(error, "errno", 0) != errno.ENOSPC:
        return None
    for kind, pattern, remedy in _RULES:
        if found := re.search(pattern, text, re.IGNORECASE):
            return Fault(kind, _line(text, found.start()), remedy)
    if not {"DistNetworkError", "DistStoreError", "DistQueueEmptyError"}.isdisjoint(names):
        return Fault("lost", _line(text))
    if ("DistBackendError" in names or _OF_A_GROUP.search(text)) and (found := _LOST.search(text)):
        return Fault("lost", _line(text, found.start()))
    return None


def describe(fault: Fault, phase: str, step: int, planned: str) -> str:
    """One line for a person about a fault of this rank: where, what, what was planned, what to do. `phase` is "" when
    it is not known, `planned` the plan's memory in words, or ""."""
    where = f" in {phase}, step {step}" if phase else ""
    if fault.kind != "memory":
        return f"{fault.what}{where}; {fault.remedy}"
    text = f"out of memory{where} ({fault.what})"
    return f"{text}; {f'planned: {planned}; ' if planned else ''}{remedy_of(fault, phase)}"


def remedy_of(fault: Fault, phase: str) -> str:
    """What to do about a fault of this rank in `phase`; STARTING is the time before anything is loaded."""
    if fault.kind != "memory":
        return fault.remedy
    text, name = fault.what, next((name for name in ALLOCATOR_OPTIONS if name in os.environ), ALLOCATOR)
    capacity = _gib(re.search(rf"total capacity of {SIZE}", text))
    # In a container this process stands in the list as another; sizes that are not known are far too large.
    processes = re.finditer(rf"Process (?P<pid>\d+) has {SIZE} memory in use", text)
    others = [found for found in processes if HELD * capacity < _gib(found) <= capacity]
    if others and "this process has" in text:
        most = max(others, key=_gib)
        return f"another process ({most['pid']}) holds {most['size']} of that GPU: end it, or use another GPU"
    if phase == STARTING:
        return PHASE_REMEDIES[STARTING]
    remedy = PHASE_REMEDIES[SAME_REMEDY.get(phase, phase if phase in PHASE_REMEDIES else "")]
    idle = _gib(re.search(rf"{SIZE} is reserved by PyTorch but unallocated", text))
    expandable = re.search(r"expandable_segments\s*:\s*True", os.environ.get(name, ""))
    if idle > FRAGMENTED * capacity > 0 and not expandable:
        instead = "" if name == ALLOCATOR else f" in place of {name}"
        remedy = f"{ALLOCATOR}=expandable_segments:True{instead} (memory lies in pieces), {remedy}"
    return f"{remedy}; dry_run=true shows what needs how much"


def _gib(found: re.Match[str] | None) -> float:
    """GiB of a match of SIZE; 0 without one."""
    return float(found["number"]) * UNITS.get(found["unit"], 0.0) if found else 0.0


def _line(text: str, at: int = 0) -> str:
    """The line of `text` around position `at`, without double spaces, at most 600 characters; torch's long advice on
    its allocator is cut off."""
    begin = text.rfind("\n", 0, at) + 1
    line = " ".join(text[begin:].split("\n")[0].split()).partition(" If reserved but unallocated")[0]
    return line if len(line) <= 600 else f"{line[:600]}..."
