"""Options of the server: composed by Hydra, refused in one line, and passed on to what the engine is built from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.config import load
from skyrl.config.load import load_config
from skyrl.config.options import all_options, reads
from skyrl.config.schema import ModelConfig, RunConfig
from skyrl.planner.memory import adapter_parameters
from skyrl.planner.plan import make_plan
from skyrl.planner.serve import dry_run_text
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]
# skyrl.service.server stands in, behind no door: tells that it was called. What it is called with is the real thing.
SERVER = """
import sys, types
from concurrent.futures import Future
sys.modules["torch"] = None
run = types.ModuleType("skyrl.service.server")
run.serve = lambda cfg, door: print("SERVES", cfg.service.port, cfg.model.path, flush=True)
sys.modules["skyrl.service.server"] = run
frontend = types.ModuleType("skyrl.service.frontend")
frontend.open_door = lambda cfg: Future()
sys.modules["skyrl.service.frontend"] = frontend
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


def load_serve(*overrides: str) -> RunConfig:
    return load_config(overrides, mode="serve")


def test_defaults_are_those_of_the_dataclasses():
    cfg = load_serve()
    assert (cfg.model, cfg.strategy, cfg.service) == (RunConfig().model, RunConfig().strategy, RunConfig().service)
    assert cfg.model.path == "tiny" and cfg.service.host == "127.0.0.1" and cfg.run.dir == "service"
    # Ranks of a server wait for commands, not for each other's samples.
    assert cfg.run.collective_timeout_seconds == 300 < RunConfig().run.collective_timeout_seconds


def test_overrides_aliases_and_their_file(tmp_path):
    names = tmp_path / "names.yaml"
    names.write_text('"org/model:latest": ""\nQwen/Qwen3-8B: tiny\n')
    cfg = load_serve(
        "service.port=0",
        "service.aliases={Qwen/Qwen3-4B: ''}",
        f"service.aliases_file={names}",
        "model.dtype=float64",
    )
    assert cfg.service.port == 0 and cfg.model.dtype == "float64"
    assert cfg.service.aliases == {"Qwen/Qwen3-4B": "", "org/model:latest": "", "Qwen/Qwen3-8B": "tiny"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("service.prot=1", "service.prot: no such option; did you mean service.port?"),
        ("optim.lr=1", "optim.lr: skyrl.serve does not read it; leave it out"),
        ("+optim.lr=1", "optim: skyrl.serve does not read it; leave it out"),
        ("sampler.temperature=0.5", "sampler.temperature: skyrl.serve does not read it; leave it out"),
        ("optm.lr=1", "optm.lr: no such option; --help lists all options"),
        ("+service.x=1", "service.x: no such option"),
        ("service.port=many", "service.port=many: needs a value of type int"),
        ("service.port=70000", "service.port=70000: must be at most 65535"),
        ("service.mix_tenants=true", "choose one of: auto, always, never"),
        ("service.max_models=0", "service.max_models=0: must be at least 1"),
        ("service.gap_seconds=0", "service.gap_seconds=0.0: must be above 0"),
        ("service.slice_seconds=nan", "service.slice_seconds=nan: must be a finite number"),
        ("service.host=''", "service.host: empty; leave it out for '127.0.0.1'"),
        ("service.loss_substitutes={ppo: cispo}", "ppo: cispo: only stable_reinforce is computed as another loss"),
        (
            "service.loss_substitutes={stable_reinforce: dro}",
            "dro: choose one of: cispo, gspo, importance_sampling, ppo",
        ),
        ("service.aliases={a: b}", "service.aliases: a is to be b, but this server has one model"),
        ("run.threads=-1", "run.threads=-1: must not be negative"),
        ("model.compile=true", "model.compile=true: clients' adapters are hooks inside of the layers"),
        ("batch.max_tokens_per_microbatch=0", "batch.max_tokens_per_microbatch=0: must be at least 1"),
        ("batch.max_row_tokens=1", "batch.max_row_tokens=1: leaves no room"),
        ("model.dtype=int8", "model.dtype=int8: choose one of"),
        ("model.revision=abc", "model.revision=abc: has an effect only with a hub name"),
        ("model.tiny.num_kv_heads=3", "model.tiny.num_kv_heads=3: must divide"),
        ("model=hub", "model.path: no model is named"),
        ("model.lora.rank=4", "model.lora.rank: clients of a server ask for adapters themselves"),
        ("run.world_size=3", "run.world_size=3: only for a dry run"),
        ("service.aliases_file=nope.yaml", "service.aliases_file=nope.yaml: No such file"),
    ],
)
def test_a_mistake_is_one_line(override, told):
    with pytest.raises(UserError) as error:
        load_serve(override)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_aliases_file_that_is_no_mapping(tmp_path):
    names = tmp_path / "names.yaml"
    names.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="not a mapping of names to weights"):
        load_serve(f"service.aliases_file={names}")
    names.write_text("a: other\n")
    with pytest.raises(UserError, match="names.yaml: a is to be other"):
        load_serve(f"service.aliases_file={names}")


@pytest.mark.parametrize("option", ["batch.max_row_tokens", "run.world_size", "run.threads", "debug.deterministic"])
def test_an_option_without_its_group_is_refused_with_it(option):
    name = option.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"^{name}: no such option; did you mean {option}\?$"):
        load_serve(f"{name}=1")


def test_a_server_has_what_it_reads_and_a_run_does_not_have_the_service():
    paths = {option.path for option in all_options("serve")}
    assert {path.split(".")[0] for path in paths} == {
        "seed", "dry_run", "plugins", "model", "strategy", "sampler", "batch", "debug", "run", "service",
        "feedback", "dashboard", "chat",
    }  # fmt: skip
    assert not any(path.startswith("model.lora") for path in paths) and reads("train", "model.lora.rank")
    with pytest.raises(UserError, match=r"^service.max_models: skyrl.train does not read it; leave it out$"):
        load_config(["service.max_models=1"])
    with pytest.raises(UserError, match=r"^service.port=1: has an effect only with feedback.enabled=true, where "):
        load_config(["service.port=1"])
    with pytest.raises(UserError, match=r"^algorithm.kl.coef: skyrl.sft does not read it; leave it out$"):
        load_config(["algorithm.kl.coef=0.1"], mode="sft")
    for mode, theirs, own in (
        ("sft", "optim.lr", "warmup.lr"),
        ("sft", "batch.num_steps", "warmup.num_steps"),
        ("control", "batch.num_steps", "control.total_steps"),
    ):
        with pytest.raises(UserError, match=f"^{theirs}: skyrl.{mode} does not read it; its own is {own}$"):
            load_config([f"{theirs}=1"], mode=mode)
        assert reads(mode, own)
    assert "service" not in load.to_dict(load_config([])) and load_config(["warmup.num_steps=3"], mode="sft")


def test_plan_for_any_number_of_ranks():
    for size in (1, 2, 1000):
        plan = make_plan(load_serve(), size)
        assert plan.strategy == ("single" if size == 1 else "ddp") and plan.world_size == size
    assert make_plan(load_serve("batch.max_row_tokens=2"), 1).max_row_tokens == 2
    with pytest.raises(UserError, match=r"^strategy.name=single: for one process"):
        make_plan(load_serve("strategy.name=single"), 2)


def test_adapter_parameters_are_those_of_the_layers():
    from skyrl.planner.memory import tiny_sizes
    from skyrl.pretrained.tiny import tiny_config

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    sizes = tiny_sizes(RunConfig().model.tiny)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_config(RunConfig().model.tiny, sizes.vocab_size))
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert adapter_parameters(sizes, 8) == sum(8 * (m.in_features + m.out_features) for m in layers)


def test_adapter_parameters_of_experts_are_those_of_the_adapter(tmp_path):
    pytest.importorskip("torch")
    from skyrl.models.forward import CausalLM
    from skyrl.models.lora import Adapter
    from skyrl.planner.memory import model_sizes
    from skyrl.types import LoraSpec
    from tests.families import make_net

    net = make_net("qwen3_moe")
    net.config.save_pretrained(tmp_path)
    made = Adapter(CausalLM(net), LoraSpec(8), name="a", dtype=net.dtype)
    sizes = model_sizes(RunConfig(model=ModelConfig(path=str(tmp_path))))
    assert adapter_parameters(sizes, 8) == sum(p.numel() for p in made.parameters())


def test_dry_run_tells_memory_and_refuses_what_cannot_be():
    text = dry_run_text(load_serve(), 1)
    assert "http://127.0.0.1:8000" in text and "1 x cpu, single, float32" in text and "GiB" in text
    with pytest.raises(UserError, match=r"^batch.max_row_tokens=5000: the model has 4096 positions"):
        dry_run_text(load_serve("batch.max_row_tokens=5000"), 1)
    huge = [f"model.tiny.{size}" for size in ("hidden_size=32768", "ffn_size=131072", "num_layers=200")]
    with pytest.raises(UserError, match="parameters need about .* try fewer"):
        dry_run_text(load_serve(*huge), 1)


def test_the_command_line_without_torch(tmp_path):
    done = run(tmp_path, "service.port=0")
    told = "skyrl: stopped\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "SERVES 0 tiny\n", told)
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and "--multirun" not in done.stdout and "lora" not in done.stdout
    assert all(f" {option.path}=" in done.stdout for option in all_options("serve"))
    done = run(tmp_path, "--dry-run", "run.world_size=4")
    assert done.returncode == 0 and "4 x cpu, ddp" in done.stdout
    done = run(tmp_path, "--cfg", "job")
    assert (
        done.returncode == 0
        and "mix_tenants: auto" in done.stdout
        and "optim" not in done.stdout
        and list(tmp_path.iterdir()) == []
    )


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
