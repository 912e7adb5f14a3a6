"""Which device a run computes on, decided from plain facts: never the CPU in silence, and in words that help."""

import dataclasses

import pytest

from skyrl.planner.device import DeviceChoice, DeviceFacts, choose, machine_facts, runs_on
from skyrl.types import UserError

WHEELS = {"12.6": (50, 60, 70, 75, 80, 86, 90), "12.9": (75, 80, 86, 90, 100, 120), "13.0": (75, 80, 86, 90, 100, 120)}
CU13 = tuple("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120".split())
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
NO_GPUS = "No CUDA GPUs are available"
FORKED = (
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start"
)
NODE = ("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/proc/driver/nvidia")
CPU_WHEEL = DeviceFacts("2.13.0+cpu", wheels=WHEELS)
CUDA_WHEEL = DeviceFacts("2.13.0+cu130", cuda="13.0", architectures=CU13, problem=NO_DRIVER, wheels=WHEELS)
H100 = dataclasses.replace(
    CUDA_WHEEL, problem="", count=2, name="NVIDIA H100 80GB HBM3", capability=(9, 0), nvidia=NODE, driver="580.65.06"
)

WSL = ("/usr/lib/wsl/lib/libcuda.so",)
ROCM = DeviceFacts("2.13.0+rocm6.4", hip="6.4", amd=("/dev/dri/card1",), wheels=WHEELS)


def at(facts: DeviceFacts, **changes) -> DeviceFacts:
    return dataclasses.replace(facts, **changes)


@pytest.mark.parametrize(
    "facts, words",
    [
        (
            at(CPU_WHEEL, nvidia=NODE, driver="580.65.06"),
            ["2.13.0+cpu is built for the CPU alone", "/dev/nvidia0", "CUDA 12.6 or CUDA 12.9 or CUDA 13.0"],
        ),
        (
            at(CPU_WHEEL, nvidia=NODE, driver="535.129.03"),
            ["driver 535.129.03", "built for CUDA 12.6 or CUDA 12.9, or"],
        ),
        (at(CPU_WHEEL, nvidia=("/proc/driver/nvidia",)), ["/proc/driver/nvidia", "built for the CPU alone"]),
        (
            at(CUDA_WHEEL, nvidia=NODE, driver="535.129.03", problem=TOO_OLD),
            ["driver 535.129.03 is too old", "580 or later", "CUDA 12.6 or CUDA 12.9"],
        ),
        (at(H100, problem=FORKED), ["had started CUDA: start ranks by torchrun"]),
        (at(CUDA_WHEEL, nvidia=NODE), [NO_DRIVER, "docker run --gpus all"]),
        (at(H100, count=0, problem=NO_GPUS, nvidia=("/proc/driver/nvidia",)), ["--gpus all"]),
        (at(H100, count=0, problem=NO_GPUS, in_slurm_job=True), ["--gpus-per-node"]),
        (
            at(H100, count=0, problem=NO_GPUS, visible="9"),
            ["CUDA_VISIBLE_DEVICES=9", "nvidia-smi lists"],
        ),
        (
            at(H100, problem="Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
            ["fabricmanager"],
        ),
        (
            at(
                H100,
                problem="Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted",
            ),
            ["compat"],
        ),
        (at(H100, problem="CUDA error: uncorrectable ECC error encountered"), ["broken", "another node"]),
        (at(H100, problem="CUDA out of memory. Tried to allocate 2.00 MiB."), ["another process fills the GPU"]),
        (at(H100, problem="CUDA error: all CUDA-capable devices are busy or unavailable"), ["exclusive"]),
        (at(CUDA_WHEEL, nvidia=NODE, cuda="", hip="6.4", torch="2.13.0+rocm6.4"), ["built for ROCm", "built for CUDA"]),
        (at(CPU_WHEEL, amd=("/dev/dri/card1",)), ["not built for ROCm", "/dev/dri/card1"]),
        (at(CUDA_WHEEL, amd=("/dev/dri/card1",)), ["not built for ROCm"]),
        (
            at(CUDA_WHEEL, problem="CUDA driver initialization failed, you might not have a CUDA gpu."),
            ["as the driver says"],
        ),
        (at(H100, local_rank=2), ["local rank 2 has no GPU", "2 visible", "at most 2 processes"]),
        (at(H100, local_rank=1, count=1, visible="3"), ["CUDA_VISIBLE_DEVICES=3", "at most 1 process per"]),
        (at(H100, local_rank=1, count=1, visible="MIG-a,MIG-b"), ["MIG", "start one process"]),
        (at(H100, local_rank=1, count=1, name="NVIDIA A100-SXM4-40GB MIG 1g.5gb"), ["MIG"]),
        (
            at(H100, capability=(7, 0), name="Tesla V100", driver="580.1.1"),
            ["Tesla V100", "capability 7.0", "sm_75", "torch==2.13.0 built for CUDA 12.6"],
        ),
        (
            at(H100, capability=(6, 1), name="GTX 1080", problem="CUDA error: no kernel image is available"),
            ["built for CUDA 12.6"],
        ),
        (at(H100, capability=(3, 5), name="Tesla K40"), ["no build of it does"]),
        (
            at(H100, capability=(7, 0), name="Tesla V100", driver="470.1"),
            ["built for CUDA 12.6, and update the driver to 525 or later, or strategy"],
        ),
        (at(CUDA_WHEEL, nvidia=NODE, driver="390.1", problem=TOO_OLD), ["to 580 or later, or strategy.device"]),
        (at(CUDA_WHEEL, nvidia=NODE, driver="470.57", problem=TOO_OLD), ["torch==2.7.1 built for CUDA 11.8, the last"]),
        (at(CUDA_WHEEL, nvidia=WSL, problem="Error 500: named symbol not found"), ["wsl --update"]),
        (at(CUDA_WHEEL, nvidia=WSL, problem="Error 35: x"), ["see whether nvidia-smi works here"]),
        (at(ROCM, problem="HIP error: unknown error"), ["ROCm 6.4 does not start", "see whether rocm-smi works"]),
        (at(ROCM, problem="HIP out of memory"), ["see rocm-smi"]),
        (at(ROCM, visible="9"), ["HIP_VISIBLE_DEVICES=9; name devices that rocm-smi lists"]),
        (at(ROCM, count=1, local_rank=1, visible="0"), ["(HIP_VISIBLE_DEVICES=0); start at most 1 process per"]),
        (
            at(H100, capability=(12, 0), name="RTX 5090", architectures=("sm_80", "sm_90"), driver="570.1"),
            ["built for CUDA 12.9,"],
        ),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_cannot_be_used_are_refused_with_what_would_do(facts, words, device):
    with pytest.raises(UserError) as caught:
        choose(device, "auto", facts)
    text = str(caught.value)
    assert text.startswith(f"strategy.device={device}: ") and "\n" not in text
    for word in words:
        assert word in text, text
    if "visible;" not in text and "MIG" not in text and "visible (" not in text:
        assert text.endswith("or strategy.device=cpu to compute on the CPU"), text
    assert choose("cpu", "auto", facts) == DeviceChoice("cpu", "float32")  # overrules all of it


def test_a_device_of_another_name_is_refused_before_any_is_looked_for():
    with pytest.raises(UserError, match=r"^strategy.device=gpu: choose one of: auto, cpu, cuda$"):
        choose("gpu", "auto", CPU_WHEEL)


def test_a_machine_without_gpus_computes_on_the_cpu():
    for facts in (CPU_WHEEL, CUDA_WHEEL, *(at(CUDA_WHEEL, problem=said) for said in (NO_GPUS, FORKED))):
        assert choose("auto", "auto", facts) == DeviceChoice("cpu", "float32")
        assert choose("auto", "float64", facts).dtype == "float64"
        with pytest.raises(UserError, match="strategy.device=cuda: this machine shows no GPU"):
            choose("cuda", "auto", facts)


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
@pytest.mark.parametrize("wheel", [CPU_WHEEL, CUDA_WHEEL])
def test_hidden_gpus_are_left_alone_and_told(wheel, visible):
    facts = at(wheel, nvidia=NODE, visible=visible)
    choice = choose("auto", "auto", facts)
    assert choice.kind == "cpu" and f"CUDA_VISIBLE_DEVICES={visible} hides the GPUs" in choice.notes[0]
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={visible} hides all devices; unset it"):
        choose("cuda", "auto", facts)


def test_texts_for_rocm_name_its_own_variable_and_files():
    with pytest.raises(UserError, match="HIP_VISIBLE_DEVICES=-1 hides all devices; unset it"):
        choose("cuda", "auto", at(ROCM, visible="-1"))
    assert "HIP_VISIBLE_DEVICES= hides the GPUs" in choose("auto", "auto", at(ROCM, visible="")).notes[0]
    with pytest.raises(UserError, match="shows no GPU .no /dev/kfd"):
        choose("cuda", "auto", at(ROCM, amd=()))


def test_the_dtype_is_one_that_the_device_computes_in():
    assert choose("auto", "auto", H100) == DeviceChoice("cuda", "bfloat16", "NVIDIA H100 80GB HBM3")
    assert choose("cuda", "float32", H100).dtype == "float32"
    t4 = at(H100, name="Tesla T4", capability=(7, 5))
    choice = choose("auto", "auto", t4)
    assert choice.dtype == "float32" and "Tesla T4 has compute capability 7.5" in choice.notes[0]
    assert "auto means float32" in choice.notes[0] and "matrix products" in choice.notes[0]
    with pytest.raises(UserError, match="model.dtype=bfloat16: needs compute capability 8.0 .* Tesla T4 has 7.5"):
        choose("auto", "bfloat16", t4)
    mi300 = at(
        H100,
        hip="6.4",
        cuda="",
        name="AMD Instinct MI300X",
        capability=(9, 4),
        architectures=(),
        amd=("/dev/dri/card1",),
        nvidia=(),
    )
    assert choose("auto", "auto", mi300) == DeviceChoice("cuda", "bfloat16", "AMD Instinct MI300X")


@pytest.mark.parametrize(
    "code, capability, wanted",
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True), ("sm_100a", (10, 3), False), ("sm_100f", (10, 3), True), ("sm_120", (12, 1), True),
        ("compute_70", (9, 0), True), ("compute_90", (8, 0), False), ("gfx90a", (9, 0), False),
    ],
)  # fmt: skip
def test_which_kernels_run_on_which_device(code, capability, wanted):
    assert runs_on(code, capability) is wanted


def test_what_a_machine_shows(tmp_path):
    assert machine_facts(tmp_path) == {"nvidia": (), "amd": (), "driver": ""}
    for name in ("dev/nvidia0", "dev/nvidiactl", "dev/nvidia-uvm", "dev/kfd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    for text, driver in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (me@x)", "580.65.06"),
    ):
        version.write_text(text)
        found = machine_facts(tmp_path)
        assert found["driver"] == driver
    assert found["nvidia"] == ("/dev/nvidia0", "/dev/nvidiactl", "/proc/driver/nvidia")
    for card, size in (("card0", 512 << 20), ("card1", 192 << 30)):  # the display of a CPU, and an accelerator
        (tmp_path / f"sys/class/drm/{card}/device").mkdir(parents=True)
        (tmp_path / f"sys/class/drm/{card}/device/mem_info_vram_total").write_text(f"{size}\n")
    assert machine_facts(tmp_path)["amd"] == ("/dev/dri/card1",)
