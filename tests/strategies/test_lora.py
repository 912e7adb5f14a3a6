"""LoRA tenants over a base that is laid out in other ways than ddp and fsdp, which tests/test_engine_tenants.py has."""

import pytest
from gloo import run_ranks
from kinds import needs_deepspeed, needs_hsdp, options_of
from small import ADAM, SPEC, dealt, distance, make_rows, small_config

from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.types import LoraSpec

pytestmark = pytest.mark.ranks


def tenant_body(kinds):
    """kind -> the adapters after three steps, and the norms."""
    found = {}
    for kind in kinds:
        cfg = small_config(*options_of(kind), "batch.max_tokens_per_microbatch=60")
        world = init_distributed(cfg)
        name = ("single" if world.size == 1 else "ddp") if cfg.strategy.name == "auto" else cfg.strategy.name
        engine = Engine(cfg, world, dtype="float32", strategy=name, max_row_tokens=64)
        engine.create("base", ModelSpec(trainable=False))
        engine.create("tenant", ModelSpec(lora=LoraSpec(rank=4), base="base"))
        norms = []
        for n in range(3):
            engine.forward_backward(dealt(make_rows(n), engine), SPEC, model="tenant")
            norms.append(engine.optim_step("tenant", ADAM)["grad_norm:mean"])
        found[kind] = (engine.model_state("tenant")["weights"], norms)
    return found


def hold_equal(found):
    want, want_norms = tenant_body(["single"])["single"]
    assert min(want_norms) > 0
    for ranks in found:
        for kind, (weights, norms) in ranks.items():
            assert norms == pytest.approx(want_norms, rel=1e-5), kind
            assert distance(weights, want) < 1e-5, kind


@needs_hsdp
def test_a_tenant_over_hsdp_and_over_shards_in_cpu_memory():
    hold_equal(run_ranks(2, tenant_body, ["hsdp/1", "fsdp+all"]))


@needs_deepspeed
@pytest.mark.slow
def test_beside_deepspeed_the_base_is_fsdps():
    hold_equal(run_ranks(2, tenant_body, ["zero1", "zero3+all"]))
