"""What every benchmark writes beside its figures (hardware, versions, commit, command, load), and models to measure."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
GIB = 2**30
# layers, channels, heads, key/value heads, channels of a head, feed-forward channels, vocabulary
SHAPES = {
    "toy": (2, 64, 4, 2, 16, 128, 512),
    "tiny": (4, 256, 4, 2, 64, 704, 512),
    "m12": (6, 384, 6, 2, 64, 1024, 4096),
    "m100": (12, 768, 12, 4, 64, 2304, 16384),
    "0.6b": (28, 1024, 16, 8, 128, 3072, 151936),
    "4b": (36, 2560, 32, 8, 128, 9728, 151936),
}


def no_text(tokens: Sequence[int], after: int | None = None, skip: Set[int] = frozenset()) -> str:
    """For a sampler whose text nobody reads; `skyrl.text.tokenizer.Decode` says what it is given."""
    return ""


def qwen3(size: str, dtype: torch.dtype, positions: int = 2048) -> transformers.PreTrainedModel:
    """A random Qwen3 of a named size with a tied head."""
    layers, hidden, heads, kv_heads, head, ffn, vocab = SHAPES[size]
    torch.manual_seed(0)
    given: dict[str, Any] = {"attn_implementation": "sdpa"}  # which PreTrainedConfig takes and does not name
    config = transformers.Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, head_dim=head,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions,
        tie_word_embeddings=True, **given,
    )  # fmt: skip
    return torch.nn.Module.to(transformers.Qwen3ForCausalLM(config), dtype).eval()


def write_model(folder: Path, size: str, positions: int) -> None:
    """A model folder with random bfloat16 weights, and the project's small tokenizer."""
    from skyrl.text.tokenizer import tiny_tokenizer

    qwen3(size, torch.bfloat16, positions).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


class OperatorCounts(TorchDispatchMode):
    """Counts operators by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def synchronisations(self) -> int:
        """How often the host waited for one number of a device."""
        return self.counts["aten._local_scalar_dense.default"]


def processor() -> str:
    """The CPU's name, or the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware_name() -> str:
    """Folder of baselines/ for this machine: "cpu-2core", "nvidia-h100-80gb-hbm3"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{len(os.sched_getaffinity(0))}core"


def provenance() -> dict[str, Any]:
    """Where and when a figure was measured."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()

    return {
        "hardware": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", "skyrl", "benchmarks")),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "load_average": os.getloadavg()[0],
    }


def baseline(name: str) -> Path:
    """The path of baselines/<hardware>/<name>.json; its folder is there afterwards."""
    path = ROOT / "benchmarks" / "baselines" / hardware_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(name: str, figures: dict[str, Any]) -> Path:
    """Writes baselines/<hardware>/<name>.json and returns its path."""
    path = baseline(name)
    path.write_text(json.dumps({**provenance(), **figures}, indent=1) + "\n")
    return path
