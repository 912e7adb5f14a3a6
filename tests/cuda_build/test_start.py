"""What a run says on this build where there is no driver: the facts, the refusal, and the texts that torch raises."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from skyrl.distributed.faults import classify
from skyrl.planner.device import choose, look, runs_on
from skyrl.types import UserError


def test_the_facts_of_this_build(tmp_path):
    facts = look("auto", 0, tmp_path)
    assert facts.cuda == torch.version.cuda and facts.count == 0 and "NVIDIA driver" in facts.problem
    assert runs_on(facts.architectures[-1], (12, 0)) and any(runs_on(code, (8, 0)) for code in facts.architectures)
    assert choose("auto", "auto", facts).kind == "cpu"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    facts = dataclasses.replace(look("auto", 0, tmp_path), visible=None)
    with pytest.raises(UserError, match="no NVIDIA driver.*docker run --gpus all"):
        choose("auto", "auto", facts)


def test_a_process_that_was_forked_after_its_parent_had_asked_computes_on_the_cpu_as_well():
    code = (
        "import os, torch\n"
        "from skyrl.planner.device import choose, look\n"
        "look('auto', 0)\n"
        "if child := os.fork():\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "facts = look('auto', 0)\n"
        "print(facts.problem, choose('auto', 'auto', facts).kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "in forked subprocess" in done.stdout and done.stdout.endswith(" cpu\n"), done


def test_what_torch_raises_here_is_a_fault_of_this_machine(cuda_entry):
    packed, starts = torch.randn(4, 2, 64, dtype=torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    attention = torch.ops.aten._flash_attention_forward.default
    for action in (
        lambda: torch.ones(1, device="cuda"),
        lambda: cuda_entry(attention, packed, packed, packed, starts, starts, 4, 4, 0.0, True, False),
        lambda: torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            action()
        fault = classify(caught.value)
        assert fault is not None and fault.kind == "setup", caught.value
