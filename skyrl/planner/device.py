"""Which device a rank computes on, and in which dtype: `look` collects plain facts of this process, `choose` decides.

`choose` needs neither torch nor a GPU, so that the decision for any machine is tested on every one. Nothing falls back
to the CPU in silence: where a machine shows GPUs that torch cannot use, the run is refused with what was found and what
would do, and strategy.device=cpu overrules.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from skyrl.files import text_of
from skyrl.types import UserError, few

# CUDA's major version -> the first driver that runs it (minor versions are compatible within a major one).
DRIVERS = {11: 450, 12: 525, 13: 580}
OLDEST = "install torch==2.7.1 built for CUDA 11.8, the last release with such a build"
NVIDIA_FILES = ("dev/nvidia[0-9]*", "dev/nvidiactl", "proc/driver/nvidia", "usr/lib/wsl/lib/libcuda.so")
DRIVER = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+\.\d[\d.]*)")  # in /proc/driver/nvidia/version
NO_DEVICE = re.compile(r"no NVIDIA driver|No (CUDA|HIP) GPUs|in forked sub", re.IGNORECASE)  # said without a GPU, too
AMD_MEMORY = 8 << 30  # of its own; what has less is a display, or the graphics part of a CPU
BF16_CAPABILITY = (8, 0)  # bfloat16 products and FlashAttention
HIDDEN = ("", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that let no device through; so does a negative number
# Of CUDA, of ROCm: the variable that hides devices, what shows them, and the driver's files.
NAMES = (("CUDA_VISIBLE_DEVICES", "nvidia-smi", "/dev/nvidia*"), ("HIP_VISIBLE_DEVICES", "rocm-smi", "/dev/kfd"))
OVERRULE = "or strategy.device=cpu to compute on the CPU"


@cache
def torch_release() -> tuple[int, ...]:
    """Major and minor number of the torch of this machine; of none a later one than any, since a machine without torch
    plans for one that has everything."""
    try:
        return tuple(int(part) for part in version("torch").split(".")[:2])
    except PackageNotFoundError:
        return (99, 0)


VARLEN_RELEASE = (2, 11)  # the first torch with variable-length attention as it is needed
# Where torch's allocator is told its options; the first that is set counts, and the last is the name since torch 2.9.
ALLOCATOR_OPTIONS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ALLOCATOR = ALLOCATOR_OPTIONS[-1 if torch_release() >= (2, 9) else 0]


@dataclass(frozen=True)
class DeviceFacts:
    """What one process finds. `count` devices are visible to torch; `name`, `capability` and `uuid` are those of this
    rank's own. `problem` is what the runtime said when it did not start, in one line. `wheels` maps CUDA versions for
    which this release of torch is built to the capabilities (86 for 8.6) of their kernels."""

    torch: str
    cuda: str = ""
    hip: str = ""
    nccl: str = ""
    architectures: tuple[str, ...] = ()
    count: int = 0
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    uuid: str = ""
    problem: str = ""
    nvidia: tuple[str, ...] = ()
    amd: tuple[str, ...] = ()
    driver: str = ""
    visible: str | None = None
    in_slurm_job: bool = False
    local_rank: int = 0
    wheels: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceChoice:
    """`kind` is cpu or cuda (ROCm's too), `dtype` the one of model.dtype=auto or what was asked for; `notes` are things
    a person should know, each one line."""

    kind: str
    dtype: str
    name: str = ""
    notes: tuple[str, ...] = ()


def choose(device: str, dtype: str, facts: DeviceFacts) -> DeviceChoice:
    """The device for strategy.device=`device` and model.dtype=`dtype`. Raises UserError where a GPU is asked for, or
    shown by the machine, and cannot be used."""
    cpu = "float32" if dtype == "auto" else dtype
    if device == "cpu":
        return DeviceChoice("cpu", cpu)
    if device not in ("auto", "cuda"):
        raise UserError(f"strategy.device={device}: choose one of: auto, cpu, cuda")
    where, (variable, _, file) = f"strategy.device={device}", NAMES[bool(facts.hip)]
    if facts.count and facts.local_rank >= facts.count:
        raise UserError(f"{where}: {_too_many(facts)}")
    if facts.capability > (0, 0) and not facts.hip:
        _check_architecture(where, facts)
    if facts.count and not facts.problem:
        return _on_gpu(dtype, facts)
    hidden = facts.visible is not None and (facts.visible.strip() in HIDDEN or facts.visible.strip().startswith("-"))
    shown = bool(facts.nvidia or facts.amd or (facts.problem and not NO_DEVICE.search(facts.problem)))
    if device == "auto" and (hidden or not shown):
        note = f"{variable}={facts.visible} hides the GPUs of this machine ({_found(facts)})"
        return DeviceChoice("cpu", cpu, notes=(note,) if shown else ())
    if hidden:
        raise UserError(f"{where}: {variable}={facts.visible} hides all devices; unset it, {OVERRULE}")
    if not shown:
        build = "" if facts.cuda or facts.hip else f", and torch {facts.torch} is built for the CPU alone"
        raise UserError(
            f"{where}: this machine shows no GPU (no {file}){build}; use a machine that has one, {OVERRULE}"
        )
    what, remedy = _why_not(facts)
    raise UserError(f"{where}: this machine has GPUs ({_found(facts)}), but {what}; {remedy}, {OVERRULE}")


def _on_gpu(dtype: str, facts: DeviceFacts) -> DeviceChoice:
    capability = ".".join(map(str, facts.capability))
    if facts.hip or facts.capability >= BF16_CAPABILITY:
        return DeviceChoice("cuda", "bfloat16" if dtype == "auto" else dtype, facts.name)
    if dtype == "bfloat16":
        raise UserError(
            f"model.dtype=bfloat16: needs compute capability 8.0 (A100 and later), {facts.name} has {capability}; give "
            "model.dtype=float32, or auto"
        )
    meaning = "so model.dtype=auto means float32 here, and" if dtype == "auto" else "so"
    note = (
        f"{facts.name} has compute capability {capability}; bfloat16 and FlashAttention need 8.0, {meaning} attention "
        "is computed by matrix products, which are slower and take more memory for long rows"
    )
    return DeviceChoice("cuda", "float32" if dtype == "auto" else dtype, facts.name, (note,))


def _too_many(facts: DeviceFacts) -> str:
    text = f"local rank {facts.local_rank} has no GPU of its own: {facts.count} visible"
    if "MIG" in f"{facts.visible} {facts.name}":
        return (
            f"{text}, an instance of a divided GPU (MIG): a process sees one, and NCCL does not join several of one "
            "GPU; start one process, or use whole GPUs"
        )
    given = f" ({NAMES[bool(facts.hip)][0]}={facts.visible})" if facts.visible is not None else ""
    return (
        f"{text}{given}; start at most {facts.count} process{'es' * (facts.count > 1)} per node, or ask for more GPUs"
    )


def runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `code` run on a device: sm_80 on 8.0 and later of the same major version, sm_90a on 9.0
    alone, sm_100f on its family 10.x, compute_80 (compiled at the start) on 8.0 and all later ones."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4] == "a":
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def _check_architecture(where: str, facts: DeviceFacts) -> None:
    if not facts.architectures or any(runs_on(code, facts.capability) for code in facts.architectures):
        return
    fitting = [
        version for version, codes in facts.wheels.items() if any(runs_on(f"sm_{c}", facts.capability) for c in codes)
    ]
    remedy, able = "no build of it does", _for_driver(fitting, facts.driver)
    if fitting:
        remedy = f"install torch=={facts.torch.partition('+')[0]} built for CUDA {' or '.join(able or fitting)}"
        driver = next((needed for needed in DRIVERS.values() if _for_driver(fitting, str(needed))), "")
        remedy += "" if able else f", and update the driver to {driver} or later"
    raise UserError(
        f"{where}: {facts.name} has compute capability {'.'.join(map(str, facts.capability))}, and torch {facts.torch} "
        f"holds kernels for {' '.join(facts.architectures)} alone; {remedy}, {OVERRULE}"
    )


def _for_driver(versions: Sequence[str], driver: str) -> list[str]:
    """Those CUDA versions that an NVIDIA driver runs; all where it is not known."""
    major = int(driver.partition(".")[0]) if driver[:1].isdigit() else 10**6
    return [version for version in versions if DRIVERS.get(int(version.partition(".")[0]), 0) <= major]


def _found(facts: DeviceFacts) -> str:
    files = few((*facts.nvidia, *facts.amd) or ("as the driver says",), 2)
    return files + (f"; NVIDIA driver {facts.driver}" if facts.driver else "")


def _why_not(facts: DeviceFacts) -> tuple[str, str]:
    """(why torch cannot use the GPUs that this machine shows, what to do)."""
    base, problem, (variable, smi, _) = facts.torch.partition("+")[0], facts.problem, NAMES[bool(facts.hip)]
    wheels = [f"CUDA {version}" for version in _for_driver(list(facts.wheels), facts.driver)] or ["CUDA"]
    wheel = f"install torch=={base} built for {' or '.join(wheels)}"
    if facts.amd and not facts.nvidia and not facts.hip:
        return f"torch {facts.torch} is not built for ROCm", f"install torch=={base} built for ROCm"
    if facts.nvidia and facts.hip:
        return f"torch {facts.torch} is built for ROCm", wheel
    if not facts.cuda and not facts.hip:
        return f"torch {facts.torch} is built for the CPU alone", wheel
    said = f"{'ROCm' if facts.hip else 'CUDA'} {facts.hip or facts.cuda} does not start ({problem or 'no GPU visible'})"
    needed = DRIVERS.get(int(facts.cuda.partition(".")[0] or 0), 0)
    older = f", or {OLDEST}" if _for_driver(["11.8"], facts.driver) else ""
    if facts.cuda and facts.driver and not _for_driver([facts.cuda], facts.driver):
        return (
            f"driver {facts.driver} is too old for torch {facts.torch}, which is built for CUDA {facts.cuda}",
            f"update the driver to {needed} or later" + (f", or {wheel}" if wheels != ["CUDA"] else older),
        )
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, problem, re.IGNORECASE):
            return said, remedy.replace("nvidia-smi", smi)
    if (facts.visible or "").strip():
        return f"{said}; {variable}={facts.visible}", f"name devices that {smi} lists, or unset it"
    if facts.in_slurm_job:
        return said, "ask Slurm for GPUs (--gpus-per-node)"
    if not any(name.startswith(("/dev/", "/usr/lib/wsl")) for name in facts.nvidia + facts.amd):
        return said, "give the container its GPUs (docker run --gpus all)"
    return said, f"see whether {smi} works here, mend the driver or use another node"


# What the runtime says when it does not start, and what helps. The first that fits counts.
_REMEDIES = (
    ("driver on your system is too old|driver version is insufficient", "update the driver, or install an older build"),
    ("Error 500|named symbol", "update the NVIDIA driver of Windows and WSL (wsl --update), then wsl --shutdown"),
    ("in forked subprocess", "the process that forked this one had started CUDA: start ranks by torchrun, or by spawn"),
    ("no NVIDIA driver", "mend the driver; in a container, libcuda.so comes with docker run --gpus all"),
    ("Error 802|not yet initialized", "start nvidia-fabricmanager on this node, or use another one"),
    ("Error 803|unsupported display driver", "library and kernel module of the driver differ: restart the node"),
    ("Error 804|forward compatibility", "this GPU takes no newer CUDA than its driver's: unset LD_LIBRARY_PATH, where "
     "compat libraries lie, or update the driver"),
    ("ECC|uncorrectable", "the GPU is broken: use another node, and tell who runs this one"),
    ("out of memory", "another process fills the GPU: see nvidia-smi, end it or use another GPU"),
    ("busy or unavailable|exclusive", "another process holds the GPU in exclusive mode: see nvidia-smi"),
    ("no kernel image", "install a build of torch that holds kernels for it"),
    ("lost|fallen off|unknown error|initialization", "see whether nvidia-smi works, restart the node or use another"),
)  # fmt: skip


def look(device: str, local_rank: int, root: Path = Path("/")) -> DeviceFacts:
    """The facts of this process. Starts the runtime of GPUs on this rank's device, with one small kernel, unless
    `device` is cpu."""
    import torch

    facts = DeviceFacts(torch.__version__, torch.version.cuda or "", torch.version.hip or "", local_rank=local_rank)
    if device == "cpu":
        return facts
    wheels = getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", {})
    machine = "aarch64" if platform.machine().lower() == "aarch64" else "x86_64"
    found = {
        **vars(facts),
        **machine_facts(root),
        "visible": os.environ.get(NAMES[bool(facts.hip)][0]),
        "in_slurm_job": "SLURM_JOB_ID" in os.environ,
        "wheels": {version: sorted(codes.get(machine, ())) for version, codes in wheels.items()},
    }
    if facts.cuda:
        found["architectures"] = tuple((torch._C._cuda_getArchFlags() or "").split())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several lines from each rank, about what `choose` says in one
        try:
            found["count"] = torch.cuda.device_count()
            if local_rank < found["count"]:
                torch.cuda.set_device(local_rank)
            if facts.cuda or facts.hip:
                torch.cuda.init()
            if local_rank < found["count"]:
                properties = torch.cuda.get_device_properties(local_rank)
                found.update(name=properties.name, uuid=str(getattr(properties, "uuid", "")))
                found["capability"] = (properties.major, properties.minor)
                torch.ones(1, device="cuda").add_(1).item()
        except Exception as error:  # whatever it is is told: init raises DeferredCudaCallError, an Exception alone
            found["problem"] = first_line(error)
    with suppress(AttributeError):  # a build without NCCL, as on Jetson and Windows
        if found.get("capability"):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return DeviceFacts(**found)


def first_line(error: BaseException) -> str:
    """An error's first line, at most 300 characters; its type where it has no text."""
    return " ".join(str(error).strip().split("\n")[0].split())[:300] or type(error).__name__


def machine_facts(root: Path = Path("/")) -> dict[str, tuple[str, ...] | str]:
    """`nvidia`, `amd` and `driver` of DeviceFacts: what the machine shows, whatever torch says."""
    nvidia = [f"/{path.relative_to(root)}" for pattern in NVIDIA_FILES for path in sorted(root.glob(pattern))]
    amd = []
    for total in sorted(root.glob("sys/class/drm/card*/device/mem_info_vram_total")):
        text = text_of(total)
        if (root / "dev/kfd").exists() and text.isdecimal() and int(text) >= AMD_MEMORY:
            amd.append(f"/dev/dri/{total.parents[1].name}")
    driver = DRIVER.search(text_of(root / "proc/driver/nvidia/version"))
    return {"nvidia": tuple(nvidia), "amd": tuple(amd), "driver": driver[1] if driver else ""}
