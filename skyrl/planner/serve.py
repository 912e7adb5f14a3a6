"""The plan of a server: device, strategy and memory for its options, and the text of its dry run."""

from __future__ import annotations

import dataclasses

from skyrl.config.load import TYPICAL_ROW
from skyrl.config.schema import RunConfig
from skyrl.planner.memory import (
    GIB,
    adapter_parameters,
    available,
    check_fits,
    estimate,
    model_sizes,
)
from skyrl.planner.plan import describe_turns, make_plan, max_row_tokens


def dry_run_text(cfg: RunConfig, world_size: int) -> str:
    """Checks everything that can be checked without building, and returns the plan as text. Raises UserError."""
    size = cfg.run.world_size or world_size
    plan, sizes = make_plan(cfg, size), model_sizes(cfg)
    limit = max_row_tokens(cfg, sizes)
    need = estimate(
        cfg, sizes, world_size=size, dtype=plan.dtype, strategy=plan.strategy, device=plan.device,
        row_tokens=min(TYPICAL_ROW, limit),
    )  # fmt: skip
    each = 16 * adapter_parameters(sizes, 32)  # weights, gradients and two moments, float32
    if not cfg.service.full_parameters:  # the base is frozen: adapters alone have gradients and moments
        need = dataclasses.replace(need, masters=0, gradients=0, optimizer=0, adapter=each)
    service = cfg.service
    lines = [
        ("server", f"http://{service.host}:{service.port}, state in {service.folder}"),
        ("ranks", f"{size} x {plan.device}, {plan.strategy}, {plan.dtype}"),
        ("model", f"{sizes.name}, {sizes.num_parameters / 1e6:,.1f}M parameters, rows of at most {limit} tokens"),
        *describe_turns(cfg),
    ]
    if service.full_parameters:
        lines.append(("training", "all parameters, one model at a time"))
    else:
        resident = min(service.max_models, service.max_resident_models)
        lines.append(
            (
                "training",
                f"LoRA up to rank {service.max_rank}; rank 32 on all layers needs {each / 2**20:,.1f} MiB a model",
            )
        )
        lines.append(("", f"{resident} of them on the device: {resident * each / GIB:.3f} GiB"))
    lines.append(("memory", f"{need.peak / GIB:.3f} GiB on each rank with one model open (estimate)"))
    room = available(plan.device)
    if cfg.run.world_size or room is None:
        lines.append(("", "not compared with this machine"))
    else:
        check_fits(cfg, sizes, need, plan.device, may_free=False)
        lines.append(("", f"{room[0] / GIB:.3f} GiB available: {room[1]}"))
    return "\n".join(f"{name:<12}{text}" for name, text in lines)
