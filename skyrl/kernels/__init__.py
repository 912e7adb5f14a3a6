"""What a CPU computes in C++: the sampler's forward pass, and the same operations for training, which so rounds alike.

Built on first use with the machine's C++ compiler, as plain C functions that depend neither on torch's nor on Python's
version; kept in the user's cache folder under a name made of source, compiler and processor. Optional: without a
compiler, on another architecture or with SKYRL_CPU_KERNELS=0 everything runs in torch operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
MULTIPLE = 16  # of which sizes have to be, for norms and attention; vectors are this long or shorter
PANEL = 2 * MULTIPLE  # columns of packed weights come in panels of this many or fewer
LONGEST = 1024  # tokens that are attended one by one; where a row is longer, torch's tiled attention is faster
MAX_CHANNELS, MAX_GROUP = 1024, 64  # of a head; queries of a key/value head
KEEP_SCORES = 1 << 24  # of attention, that a layer may keep for its backward pass: 64 MiB in float32
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "skyrl_packed_size": [_INT, _LONG, _LONG],
    "skyrl_pack": [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT],
    "skyrl_sample": [_POINTER, _INT, _INT, *[_POINTER] * 4, _INT],
    "skyrl_product": [_POINTER, _LONG, _LONG, _POINTER, _INT, _POINTER, _POINTER, _LONG, _POINTER, _INT],
    "skyrl_norm": [*[_POINTER] * 4, _LONG, _INT, _FLOAT, _INT],
    "skyrl_norm_half": [*[_POINTER] * 4, _LONG, _INT, _FLOAT, _INT],
    "skyrl_norm_half_gradient": [*[_POINTER] * 6, _LONG, _INT, _INT],
    "skyrl_gated_half": [*[_POINTER] * 3, _LONG, _INT],
    "skyrl_gated_half_gradient": [*[_POINTER] * 5, _LONG, _INT],
    "skyrl_rotate_half": [*[_POINTER] * 4, _LONG, _INT, _INT, _LONG, _LONG, _INT, _INT],
    "skyrl_causal_softmax_half": [_POINTER, _LONG, _INT, _FLOAT, _INT],
    "skyrl_causal_softmax_half_gradient": [*[_POINTER] * 3, _LONG, _INT, _FLOAT, _INT],
    "skyrl_log_probs": [_POINTER, _LONG, _INT, _POINTER, _INT, _FLOAT, _POINTER, _POINTER, _INT],
    "skyrl_logit_sums": [_INT, _POINTER, _LONG, _INT, _FLOAT, _POINTER, _LONG, *[_POINTER] * 4, _INT],
    "skyrl_logit_gradient": [_INT, _POINTER, _LONG, _INT, _FLOAT, _POINTER, _LONG, *[_POINTER] * 4, _INT],
    "skyrl_sum_rows": [_INT, _POINTER, _LONG, _INT, _INT, _LONG, _LONG, _POINTER, _POINTER, _LONG, _INT],
    "skyrl_silu": [_POINTER, _POINTER, _LONG, _INT],
    "skyrl_attend": [*[_POINTER] * 5, _LONG, _INT, _INT, _INT, _FLOAT, _INT],
}


@lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """The built library, or None and why there is none. Builds it at most once per machine and source."""
    if (wanted := os.environ.get("SKYRL_CPU_KERNELS", "1")).lower() in ("0", "false", "no", "off"):
        return None, f"SKYRL_CPU_KERNELS={wanted}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)
    if compiler is None:
        return None, "no C++ compiler"
    if platform.system() != "Linux":
        return None, f"not tried on {platform.system()}"
    try:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrl" / "kernels"
            loaded = ctypes.CDLL(str(_build(compiler, cache)))
        except (OSError, RuntimeError):  # no home, or one that is full, cannot be written to or runs no programs
            with tempfile.TemporaryDirectory(prefix="skyrl-kernels-", ignore_cleanup_errors=True) as own:
                loaded = ctypes.CDLL(str(_build(compiler, Path(own))))  # stays in memory when the file has gone
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} failed: {str(getattr(error, 'stderr', '') or error).strip().splitlines()[-1:]}"
    for name, arguments in _ARGUMENTS.items():
        getattr(loaded, name).argtypes = arguments
    loaded.skyrl_packed_size.restype = _LONG
    return loaded, ""


def _build(compiler: str, folder: Path) -> Path:
    """Path of the library in `folder`. Ranks wait for the one that builds; a half-written file never has the final
    name, so where a file system has no locks several build, and nothing else changes. Raises OSError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    flags = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), platform.machine())
    parts = [*(path.read_text() for path in sorted(FOLDER.glob("*.[ch]*"))), version, flags, " ".join(FLAGS)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    target = folder / f"decode-{name}.so"
    if target.exists():  # also where nothing can be written
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = folder / f"{target.name}.{secrets.token_hex(4)}"
            command = [compiler, *FLAGS, "-o", str(part), str(FOLDER / "decode.cpp")]
            # torch's own OpenMP, already loaded, is the one this resolves to: no second pool of threads
            if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
                subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(part, target)
    return target
