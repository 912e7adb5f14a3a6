"""Peak memory of log-probabilities at a large vocabulary, forward and backward: in blocks (ours) against whole logits.

    python benchmarks/logits_memory.py --out benchmarks/baselines/cpu-2core/logits_memory.json

Both methods run at 2048 tokens, where whole logits already take gigabytes (they grow with the tokens; --whole-tokens
for more), and blocks at 8192 as well. Each setting runs in a process of its own. On a CPU the number is the growth of
the process's largest resident size from before the computation (inputs exist by then); on CUDA it is torch's peak of
allocated memory, likewise less what was there before. Both include the gradients of hidden states and weight.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MIB = 1 << 20
METHODS = ("blocks", "whole")
DTYPES = ("bfloat16", "float32")


def measure(method: str, dtype: str, device: str, vocab: int, tokens: int, channels: int) -> dict[str, Any]:
    """One setting in this process: peak MiB over the inputs, seconds, and a checksum of values and gradients."""
    import torch

    from skyrl.models.logprobs import log_probs

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, channels).to(device, kind).requires_grad_()
    weight = (torch.randn(vocab, channels) * 0.05).to(device, kind).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def run(rows: int) -> torch.Tensor:
        h, t = hidden[:rows], targets[:rows]
        if method == "blocks":
            logp, _ = log_probs(h, weight, t)
        else:
            logits = torch.nn.functional.linear(h, weight).float()
            logp = torch.log_softmax(logits, -1).gather(1, t[:, None])[:, 0]
        logp.sum().backward()
        return logp.detach()

    run(2)  # libraries are loaded and their scratch memory is taken before the count begins
    hidden.grad = weight.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident()
        peak_reset()
    start = time.perf_counter()
    logp = run(tokens)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "method": method,
        "dtype": dtype,
        "tokens": tokens,
        "peak_mib": round((peak - before) / MIB, 1),
        "seconds": round(seconds, 2),
        "logprob_mean": float(logp.double().mean()),
        "hidden_grad_norm": float(hidden.grad.double().norm()),
        "weight_grad_norm": float(weight.grad.double().norm()),
    }


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident_peak()


def peak_reset() -> None:
    """Starts the kernel's peak anew where it can (Linux); elsewhere the peak since start is taken."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not allowed here: the warm-up is small, so the peak since start is the same within its size


def resident_peak() -> int:
    """Largest resident size of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def hardware(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    out: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--whole-tokens", type=int, default=2048, help="tokens of the setting that both methods run")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--out", type=Path, help="JSON file to write; default: standard output only")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "DTYPE", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, dtype, tokens = args.one
        print(json.dumps(measure(method, dtype, args.device, args.vocab, int(tokens), args.channels)))
        return
    flags = [f"--vocab={args.vocab}", f"--channels={args.channels}", f"--device={args.device}"]
    settings = [(m, d, args.whole_tokens) for d in args.dtypes for m in METHODS]
    settings += [("blocks", d, args.tokens) for d in args.dtypes if args.tokens != args.whole_tokens]
    results = []
    for method, dtype, tokens in settings:
        command = [sys.executable, __file__, *flags, "--one", method, dtype, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:  # whole logits may not fit where blocks do: that is a result too
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            failed = f"exit {done.returncode}: {last[:200]}"
            results.append({"method": method, "dtype": dtype, "tokens": tokens, "failed": failed})
        else:
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(results[-1]), file=sys.stderr)
    report = {
        "what": "peak memory of log-probs, forward + backward, over the inputs",
        "vocab": args.vocab,
        "channels": args.channels,
        "device": args.device,
        "hardware": hardware(args.device),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "skyrl/models", "benchmarks/logits_memory.py")),
        "command": "python benchmarks/logits_memory.py " + " ".join(sys.argv[1:]),
        "versions": {"torch": __import__("torch").__version__, "python": platform.python_version()},
        "loadavg": os.getloadavg(),
        "results": results,
    }
    text = json.dumps(report, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


def git(*words: str) -> str:
    """Output of a git command in this repository; "" where there is none."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
