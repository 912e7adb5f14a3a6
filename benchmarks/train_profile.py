"""Where the training part of a step goes: the operators of forward_backward and optim_step by kind and by phase.

Rows as `benchmarks/rl_step.py` has them (8 prompts x 8 samples, 48 prompt and 64 new tokens on 2 ranks: half of them on
this one). torch's profiler counts each operator's own CPU time; what it costs itself is in there, so times without it
are given beside. Phases: the layers' forward pass, attention and the head in it, everything in the backward pass.

    python benchmarks/train_profile.py --model folder/of/SmolLM2-135M --dtype bfloat16 --write
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

from common import write
from shared_prefixes import rows_of
from torch.profiler import ProfilerActivity, profile, record_function

from skyrl.config.load import load_config
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.types import AdamParams, LossSpec

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn", "matmul", "dot"),
    "copies": ("copy_", "cat", "index", "clone", "_to_copy", "fill_", "zero_", "gather", "scatter", "contiguous"),
    "softmax and losses": ("softmax", "exp", "log", "amax", "max", "sum", "mean", "silu", "rsqrt", "pow"),
    "elementwise": ("mul", "add", "sub", "div", "neg", "where", "sigmoid"),
    "optimizer": ("adam", "foreach", "norm", "aminmax"),
}


def kind_of(name: str) -> str:
    """Which of KINDS an operator is."""
    plain = name.removeprefix("aten::")
    for kind, words in KINDS.items():
        if any(plain.startswith(word) or (len(word) > 4 and word in plain) for word in words):
            return kind
    return "others"


def main() -> None:
    """Profiles one call of each after warm-up, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--apart", action="store_true", help="batch.share_prefixes=false")
    parser.add_argument("--compile", action="store_true", help="model.compile=true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    options = [f"model.path={args.model}", f"model.dtype={args.dtype}", f"run.threads={args.threads}"]
    options += [f"batch.share_prefixes={str(not args.apart).lower()}", f"model.compile={str(args.compile).lower()}"]
    cfg = load_config(options)
    length = args.prompt_tokens + args.new_tokens
    engine = Engine(cfg, init_distributed(cfg), dtype=args.dtype, strategy="single", max_row_tokens=length + 1)
    engine.create("policy", ModelSpec())
    policy = engine.models["policy"]
    rows = rows_of(args.prompts, args.samples, args.prompt_tokens, length, policy.strategy.module.vocab_size)
    spec, adam = LossSpec("ppo", {"clip_low": 0.2, "clip_high": 0.2}), AdamParams(lr=1e-6)

    def step() -> dict[str, float]:
        start = time.process_time()
        engine.forward_backward(rows, spec)
        middle = time.process_time()
        engine.optim_step("policy", adam)
        return {"forward_backward": middle - start, "optim_step": time.process_time() - middle}

    step()
    plain = [step() for _ in range(args.rounds)]
    seconds = {key: sorted(one[key] for one in plain)[len(plain) // 2] for key in plain[0]}
    name_parts(policy)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    kinds: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = {}
    operators = []
    for event in found.key_averages():
        if event.key.startswith("part: "):
            phases[event.key.removeprefix("part: ")] = event.cpu_time_total / 1e6
            continue
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        operators.append((event.self_cpu_time_total / 1e6, event.key, event.count))
    print("processor seconds without the profiler:", {key: round(value, 3) for key, value in seconds.items()})
    for title, table in (("phases (wall)", phases), ("kinds (own time)", kinds)):
        print(title, {key: round(value, 3) for key, value in sorted(table.items(), key=lambda pair: -pair[1])})
    slowest = sorted(operators)[::-1][: args.top]
    top = [{"operator": key, "seconds": round(own, 4), "calls": n} for own, key, n in slowest]
    for one in top:
        print(one)
    if args.write:
        shape = {key: value for key, value in vars(args).items() if key not in ("write", "top", "model")}
        name = "train_profile" + "_apart" * args.apart + "_compiled" * args.compile
        figures = {"shape": shape, "seconds": seconds, "phases": phases, "kinds": kinds, "operators": top}
        print(write(name, figures))


def name_parts(policy: Any) -> None:
    """Marks parts of a step for the profiler."""
    from skyrl.models import logprobs, packed

    def named(owner: Any, name: str, part: str, kind: Any = None) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            with record_function(f"part: {part}"):
                return real(*given, **more)

        setattr(owner, name, kind(call) if kind else call)

    module = type(policy.strategy.module)
    named(module, "hidden", "forward of the layers")
    named(packed.PackedAttention, "attend", "forward of attention")
    named(logprobs._LogProbs, "forward", "forward of the head", staticmethod)
    named(logprobs._LogProbs, "backward", "backward of the head", staticmethod)
    named(type(policy.strategy), "backward", "backward of everything")
    named(type(policy.strategy), "optim_step", "optimizer")


if __name__ == "__main__":
    main()
