"""What each strategy can do, said before anything starts: refusals, the plan's words and its memory."""

import importlib.util

import pytest

from skyrl.config.load import config_dir, load_config
from skyrl.planner.memory import ModelSizes, estimate
from skyrl.planner.plan import describe, make_plan
from skyrl.types import UserError

BIG = ModelSizes("big", 4_000_000_000, 4_000_000_000, 36, 2560, 9728, 32, 8, 128, 151936, 40960)


@pytest.fixture(autouse=True)
def deepspeed_is_installed(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real("json" if name == "deepspeed" else name))


def line_of(options: str, world_size: int = 4) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(load_config(options.split()), world_size)
    text = str(caught.value)
    assert "\n" not in text
    return text


REFUSED = {
    "name=zero4": "strategy.name=zero4: choose one of: auto, single, ddp, fsdp, hsdp, zero1, zero2, zero3",
    "offload=disk": "strategy.offload=disk: choose one of: none, optimizer, all",
    "name=fsdp offload=optimizer": "strategy.offload=optimizer: strategy.name=fsdp cannot; zero1 or zero2 or zero3 "
    "can; for fsdp there is strategy.offload=all",
    "name=zero2 offload=all": "strategy.offload=all: strategy.name=zero2 cannot; fsdp or hsdp or zero3 can; for zero2 "
    "there is strategy.offload=optimizer",
    "offload=all": "strategy.offload=all: strategy.name=auto cannot; fsdp or hsdp or zero3 can; or leave it at none",
    "name=hsdp": "strategy.shard_size=0: strategy.name=hsdp needs to know how many ranks share one copy of the model; ",
    "name=hsdp shard_size=3": "strategy.shard_size=3: does not divide the 4 ranks; give a divisor of 4, or start a "
    "multiple of 3 processes",
    "name=hsdp shard_size=8": "strategy.shard_size=8: does not divide the 4 ranks",
    "name=fsdp shard_size=2": "strategy.shard_size=2: has an effect only with strategy.name=hsdp",
}


@pytest.mark.parametrize(("options", "start"), REFUSED.items())
def test_what_a_strategy_cannot_do_is_refused(options, start):
    assert line_of(" ".join(f"strategy.{option}" for option in options.split())).startswith(start)


def test_deepspeed_has_no_float64():
    line = line_of("strategy.name=zero3 model.dtype=float64")
    assert line.startswith("model.dtype=float64: DeepSpeed (strategy.name=zero3) has float32 and bfloat16; use fsdp")


def test_deepspeed_that_is_not_there_is_one_line_and_not_asked_of_another_machine(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name))
    line = line_of("strategy.name=zero1")
    assert (
        line.startswith("strategy.name=zero1: DeepSpeed is not installed")
        and "pip install 'skyrl-spmd[deepspeed]'" in line
    )
    make_plan(load_config(["strategy.name=zero1", "dry_run=true", "run.world_size=4"]), 4)
    make_plan(load_config(["strategy.name=fsdp"]), 4)


@pytest.mark.parametrize(
    ("option", "owner"),
    [("strategy.reshard_after_forward=false", "fsdp or hsdp"), ("debug.check_replicas_every=5", "ddp")],
)
def test_options_typed_for_another_strategy_are_refused(option, owner):
    with pytest.raises(UserError, match=f"has an effect only with strategy.name={owner}"):
        load_config(["strategy.name=zero3", option])
    for own in owner.split(" or "):
        load_config([f"strategy.name={own}", option])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("strategy.name=hsdp strategy.shard_size=2", "4 x cpu, hsdp (2 copies x 2 shards), float32"),
        (
            "strategy.name=hsdp strategy.shard_size=4 strategy.offload=all",
            "hsdp (1 copies x 4 shards), all in CPU memory",
        ),
        ("strategy.name=zero3 strategy.offload=optimizer", "4 x cpu, zero3, optimizer in CPU memory, float32"),
    ],
)
def test_the_plan_says_the_layout(options, text):
    cfg = load_config([*options.split(), "strategy.device=cpu"])
    assert text in describe(cfg, make_plan(cfg, 4))


@pytest.mark.parametrize(("name", "layout"), [
    ("auto", "16 x cpu, ddp, "),
    ("fsdp", "16 x cpu, fsdp, "),
    ("hsdp", "16 x cpu, hsdp (2 copies x 8 shards), "),
    ("zero3_offload", "16 x cpu, zero3, optimizer in CPU memory, "),
])  # fmt: skip
@pytest.mark.parametrize("recipe", ["arithmetic", "gsm8k"])
def test_a_layout_chosen_by_group_wins_over_the_recipes(recipe, name, layout):
    options = [f"experiment={recipe}", f"strategy={name}", "model.path=tiny", "strategy.device=cpu", "dry_run=true"]
    cfg = load_config([*options, "run.world_size=16"])
    assert layout in describe(cfg, make_plan(cfg, 16))


def test_every_group_of_layouts_is_tried_above():
    assert {path.stem for path in (config_dir() / "strategy").glob("*.yaml")} == {
        "auto", "fsdp", "hsdp", "zero3_offload"
    }  # fmt: skip


def test_deepspeed_with_adapters_is_told_as_what_it_is():
    cfg = load_config(["strategy.name=zero3", "model.lora.rank=4", "strategy.device=cpu"])
    assert "zero3 (the frozen base by fsdp), float32" in describe(cfg, make_plan(cfg, 4))


# GPU memory of a rank in bytes per parameter, all ranks together 8: by hand from who shards what.
@pytest.mark.parametrize(
    ("options", "bytes_each"),
    [
        ("strategy.name=ddp", 2 + 4 + 4 + 8),
        ("strategy.name=fsdp", 16 / 8),
        ("strategy.name=hsdp strategy.shard_size=4", 16 / 4),
        ("strategy.name=fsdp strategy.offload=all", 0),
        ("strategy.name=zero1", 2 + 4 / 8 + 4 + 8 / 8),
        ("strategy.name=zero2", 2 + (4 + 4 + 8) / 8),
        ("strategy.name=zero3", (2 + 4 + 4 + 8) / 8),
        ("strategy.name=zero1 strategy.offload=optimizer", 2 + 2),
        ("strategy.name=zero2 strategy.offload=optimizer", 2),
        ("strategy.name=zero3 strategy.offload=optimizer", 2 / 8),
        ("strategy.name=zero3 strategy.offload=all", 0),
    ],
)
def test_memory_on_a_gpu(options, bytes_each):
    cfg = load_config([*options.split(), "algorithm.kl.coef=0.1"])
    name = cfg.strategy.name
    found = estimate(cfg, BIG, world_size=8, dtype="bfloat16", strategy=name, device="cuda", row_tokens=2048)
    assert found.resident - found.reference == bytes_each * BIG.num_parameters
    assert found.gathered == (2 * BIG.num_parameters if name in ("fsdp", "hsdp", "zero3") else 0)
    shards = {"ddp": 2, "hsdp": 4 / 4}.get(name, 4 / 8)
    assert found.reference == (0 if cfg.strategy.offload == "all" else shards * BIG.num_parameters)


def test_offloaded_memory_of_a_cpu_rank_is_its_memory():
    plain, offloaded = (
        estimate(
            load_config(["strategy.name=fsdp", f"strategy.offload={offload}"]),
            BIG,
            world_size=8,
            dtype="float32",
            strategy="fsdp",
            device="cpu",
            row_tokens=2048,
        )
        for offload in ("none", "all")
    )
    assert plain.resident == offloaded.resident > 0
