"""Options of the server: composed by Hydra, refused in one line, and passed on to what the engine is built from."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.config.load import load_serve
from skyrl.config.options import all_options
from skyrl.config.schema import RunConfig, SamplerConfig
from skyrl.config.serve import (
    RUN_NAMES,
    ServeConfig,
    ServeSamplerConfig,
    check_serve,
    to_run_config,
)
from skyrl.planner.memory import adapter_parameters
from skyrl.planner.serve import dry_run_text, serve_plan
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]
# skyrl.service.server stands in: tells that it was called. What it is called with is the real thing.
SERVER = """
import sys, types
sys.modules["torch"] = None
run = types.ModuleType("skyrl.service.server")
run.serve = lambda cfg: print("SERVES", cfg.service.port, cfg.model.path, flush=True)
sys.modules["skyrl.service.server"] = run
from skyrl.serve import main
main()
"""


def run(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SKYRL_API_KEYS")}
    return subprocess.run(
        [sys.executable, "-c", SERVER, *args],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def value(cfg, path: str):
    for part in path.split("."):
        cfg = getattr(cfg, part)
    return cfg


def test_defaults_are_those_of_the_dataclasses():
    cfg = load_serve()
    assert cfg == ServeConfig() and cfg.model.path == "tiny" and cfg.service.host == "127.0.0.1"


def test_overrides_aliases_and_their_file(tmp_path):
    names = tmp_path / "names.yaml"
    names.write_text('"org/model:latest": ""\nQwen/Qwen3-8B: tiny\n')
    cfg = load_serve(
        [
            "service.port=0",
            "service.aliases={Qwen/Qwen3-4B: ''}",
            f"service.aliases_file={names}",
            "model.dtype=float64",
        ]
    )
    assert cfg.service.port == 0 and cfg.model.dtype == "float64"
    assert cfg.service.aliases == {"Qwen/Qwen3-4B": "", "org/model:latest": "", "Qwen/Qwen3-8B": "tiny"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("service.prot=1", "service.prot: no such option; did you mean service.port?"),
        ("optim.lr=1", "optim.lr: no such option; --help lists all options"),
        ("+service.x=1", "service.x: no such option"),
        ("service.port=many", "service.port=many: needs a value of type int"),
        ("service.port=70000", "service.port=70000: must be at most 65535"),
        ("service.mix_tenants=true", "choose one of: auto, always, never"),
        ("service.max_models=0", "service.max_models=0: must be at least 1"),
        ("service.gap_seconds=0", "service.gap_seconds=0.0: must be above 0"),
        ("service.slice_seconds=nan", "service.slice_seconds=nan: must be a finite number"),
        ("service.host=''", "service.host: empty; leave it out for '127.0.0.1'"),
        ("service.aliases={a: b}", "service.aliases: a is to be b, but this server has one model"),
        ("threads=-1", "threads=-1: must not be negative"),
        ("max_tokens_per_microbatch=0", "max_tokens_per_microbatch=0: must be at least 1"),
        ("max_row_tokens=1", "max_row_tokens=1: leaves no room"),
        ("model.dtype=int8", "model.dtype=int8: choose one of"),
        ("model.revision=abc", "model.revision=abc: has an effect only with a hub name"),
        ("model.tiny.num_kv_heads=3", "model.tiny.num_kv_heads=3: must divide"),
        ("model=hub", "model.path: empty"),
        ("model.lora.rank=4", "model.lora.rank=4: clients of a server ask for adapters themselves"),
        ("world_size=3", "world_size=3: only for a dry run"),
        ("service.aliases_file=nope.yaml", "service.aliases_file=nope.yaml: No such file"),
    ],
)
def test_a_mistake_is_one_line(override, told):
    with pytest.raises(UserError) as error:
        load_serve([override])
    assert told in str(error.value) and "\n" not in str(error.value) and "batch." not in str(error.value)


def test_aliases_file_that_is_no_mapping(tmp_path):
    names = tmp_path / "names.yaml"
    names.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="not a mapping of names to weights"):
        load_serve([f"service.aliases_file={names}"])
    names.write_text("a: other\n")
    with pytest.raises(UserError, match="names.yaml: a is to be other"):
        load_serve([f"service.aliases_file={names}"])


def test_every_option_of_a_server_reaches_the_run_or_is_the_service():
    """Each is changed alone and must be found in the RunConfig, at the same path or the one that RUN_NAMES says."""
    ours = {mine: theirs for theirs, mine in RUN_NAMES.items()}
    for option in all_options(ServeConfig):
        if option.path.startswith("service."):
            continue
        changed = (
            not option.default if isinstance(option.default, bool) else option.default * 2 + type(option.default)(1)
        )
        parts = option.path.split(".")
        replaced = changed
        for depth in range(len(parts) - 1, -1, -1):
            holder = value(ServeConfig(), ".".join(parts[:depth])) if depth else ServeConfig()
            replaced = dataclasses.replace(holder, **{parts[depth]: replaced})
        assert value(to_run_config(replaced), ours.get(option.path, option.path)) == changed, option.path
    assert to_run_config(dataclasses.replace(ServeConfig())).run.dir == "service"


def test_shared_options_have_the_defaults_of_a_run():
    run_defaults = {field.name: getattr(SamplerConfig(), field.name) for field in dataclasses.fields(SamplerConfig)}
    assert dataclasses.asdict(ServeSamplerConfig()).items() <= run_defaults.items()
    for theirs, ours in RUN_NAMES.items():
        if ours != "collective_timeout_seconds":  # ranks of a server wait for commands, not for each other's samples
            assert value(RunConfig(), theirs) == value(ServeConfig(), ours)


def test_plan_for_any_number_of_ranks():
    for size in (1, 2, 1000):
        plan = serve_plan(ServeConfig(), size)
        assert plan.strategy == ("single" if size == 1 else "ddp") and plan.world_size == size
    limited = dataclasses.replace(ServeConfig(), max_row_tokens=2)
    assert serve_plan(limited, 1).max_row_tokens == 2
    with pytest.raises(UserError, match=r"^strategy.name=single: for one process"):
        single = dataclasses.replace(ServeConfig().strategy, name="single")
        serve_plan(dataclasses.replace(ServeConfig(), strategy=single), 2)


def test_adapter_parameters_are_those_of_the_layers():
    from skyrl.models.tiny import tiny_config
    from skyrl.planner.memory import tiny_facts

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    facts = tiny_facts(ServeConfig().model.tiny)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_config(ServeConfig().model.tiny, facts.vocab_size))
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert adapter_parameters(facts, 8) == sum(8 * (m.in_features + m.out_features) for m in layers)


def test_dry_run_tells_memory_and_refuses_what_cannot_be():
    text = dry_run_text(ServeConfig(), 1)
    assert "http://127.0.0.1:8000" in text and "1 x cpu, single, float32" in text and "GiB" in text
    with pytest.raises(UserError, match=r"^max_row_tokens=5000: the model has 4096 positions"):
        dry_run_text(dataclasses.replace(ServeConfig(), max_row_tokens=5000), 1)
    huge = dataclasses.replace(ServeConfig().model.tiny, hidden_size=2**15, ffn_size=2**17, num_layers=200)
    with pytest.raises(UserError, match="needs about"):
        dry_run_text(dataclasses.replace(ServeConfig(), model=dataclasses.replace(ServeConfig().model, tiny=huge)), 1)


def test_check_serve_accepts_the_defaults():
    check_serve(ServeConfig())


def test_the_command_line_without_torch(tmp_path):
    done = run(tmp_path, "service.port=0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "SERVES 0 tiny\n", "")
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and "--multirun" not in done.stdout
    assert all(f" {option.path}=" in done.stdout for option in all_options(ServeConfig))
    done = run(tmp_path, "--dry-run", "world_size=4")
    assert done.returncode == 0 and "4 x cpu, ddp" in done.stdout
    done = run(tmp_path, "--cfg", "job")
    assert done.returncode == 0 and "mix_tenants: auto" in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["service.prot=1"], "skyrl: error: service.prot: no such option; did you mean service.port?"),
        (["-m", "seed=1,2"], "skyrl: error: -m: a server does not end by itself"),
        (["service.host=0.0.0.0"], "skyrl: error: service.host=0.0.0.0: others could use this server without a key"),
        (["service.keys_file=nope"], "skyrl: error: service.keys_file=nope: No such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(tmp_path, args, told):
    done = run(tmp_path, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(told)


def test_other_addresses_with_keys_or_on_purpose(tmp_path):
    assert run(tmp_path, "service.host=0.0.0.0", SKYRL_API_KEYS="ann:tml-abc").returncode == 0
    assert run(tmp_path, "service.host=0.0.0.0", "service.allow_anonymous=true").returncode == 0
