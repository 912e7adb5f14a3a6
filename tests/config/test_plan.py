"""Numbers of the plan: shares of ranks, schedules, what is due, memory, dry runs of every recipe."""

import json
import math
import re
from dataclasses import replace

import pytest
import transformers as tf

from skyrl.config.load import config_diff, config_digest, config_dir, load_config, to_dict
from skyrl.config.schema import TinyModelConfig
from skyrl.planner import plan
from skyrl.planner.device import VARLEN_RELEASE, DeviceChoice, DeviceFacts, torch_release
from skyrl.planner.memory import (
    GIB,
    SPARE,
    ModelSizes,
    available,
    check_fits,
    estimate,
    kept_scores,
    model_sizes,
    tiny_sizes,
    with_room,
)
from skyrl.planner.plan import compiler_problem, describe, dry_run, make_plan
from skyrl.sampler.cache_size import gpu_blocks
from skyrl.types import UserError
from tests.families import make_net

FILES = {path.stem: path.read_text(encoding="utf-8") for path in (config_dir() / "experiment").glob("*.yaml")}
# those of trainer=control have no language model: tests/control/test_control.py
RECIPES = sorted(name for name, text in FILES.items() if not re.search("^(trainer: control|control:)$", text, re.M))
ASKED = {
    "custom": ["sampler.max_new_tokens=64"],
    "distill": ["distill.teacher=tiny"],
    "gsm8k_moe": ["model.tokenizer=tiny"],
}  # what a recipe has no default for
ALGORITHMS = sorted(path.stem for path in (config_dir() / "algorithm").glob("*.yaml"))


def plan_of(*overrides: str, world_size: int = 1, **kwargs):
    return make_plan(load_config(overrides), world_size, **kwargs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_prompt_is_played_by_one_rank(world_size):
    plan = plan_of("batch.prompts_per_step=8", world_size=world_size)
    shares = [plan.prompts_on_rank(rank) for rank in range(world_size)]
    assert sum(shares) == 8
    assert max(shares) - min(shares) <= 1 and max(shares) == shares[0]


def test_learning_rate_rises_falls_and_ends_where_it_should():
    plan = plan_of("batch.num_steps=21", "optim.lr=1", "optim.warmup_steps=4", "optim.schedule=linear")
    assert [plan.lr_at(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert plan.lr_at(12) == pytest.approx(1 - 0.9 * 0.5)
    assert plan.lr_at(20) == pytest.approx(0.1)
    cosine = plan_of("batch.num_steps=21", "optim.lr=1", "optim.warmup_steps=4", "optim.schedule=cosine")
    assert cosine.lr_at(4) == 1.0 and cosine.lr_at(20) == pytest.approx(0.1)
    assert cosine.lr_at(8) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    rates = [cosine.lr_at(s) for s in range(4, 21)]
    assert rates == sorted(rates, reverse=True)
    constant = plan_of("batch.num_steps=3", "optim.lr=0.5", "optim.schedule=constant")
    assert {constant.lr_at(s) for s in range(3)} == {0.5}


def test_adam_of_policy_critic_and_warmup():
    plan = plan_of(
        "algorithm=ppo", "optim.lr=0.1", "algorithm.critic.lr=0.2", "warmup.lr=0.3", "warmup.num_steps=20",
        "optim.beta1=0.8", "optim.beta2=0.7", "optim.eps=1e-5", "optim.weight_decay=0.01", "optim.grad_clip_norm=2",
        "optim.warmup_steps=2", "algorithm.critic.warmup_steps=3",
    )  # fmt: skip
    assert plan.adam_at(0).lr == pytest.approx(0.05) and plan.adam_at(1).lr == pytest.approx(0.1)
    assert plan.critic_adam_at(0).lr == pytest.approx(0.1) and plan.critic_adam_at(1).lr == pytest.approx(0.2)
    assert [plan.warmup_adam_at(s).lr for s in range(3)] == pytest.approx([0.15, 0.3, 0.3])
    for adam in (plan.adam_at(5), plan.critic_adam_at(5), plan.warmup_adam_at(5)):
        rest = (adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.grad_clip_norm)
        assert rest == (0.8, 0.7, 1e-5, 0.01, 2.0)
    assert [plan.policy_learns(s) for s in range(5)] == [False, False, False, True, True]


def test_what_is_due_when():
    plan = plan_of("batch.num_steps=7", "tracking.rollouts_every=2", "debug.check_replicas_every=0")
    due = {kind: [s for s in range(8) if plan.due(kind, s)] for kind in ("rollouts", "replicas")}
    assert due == {"rollouts": [2, 4, 6], "replicas": []}


def test_automatic_choices_are_resolved():
    assert (plan_of(device="cpu").dtype, plan_of(device="cpu").strategy) == ("float32", "single")
    gpu = plan_of(world_size=2, device="cuda")
    assert (gpu.dtype, gpu.strategy) == ("bfloat16", "ddp")
    assert plan_of("strategy.name=fsdp", "model.dtype=float64").dtype == "float64"
    assert not plan_of().needs_reference and plan_of("algorithm.kl.coef=0.1").needs_reference
    assert not plan_of().needs_critic and plan_of("algorithm=ppo").needs_critic


def test_a_plan_for_a_gpu_of_this_machine_is_for_what_it_can(monkeypatch):
    """strategy.device=cuda is planned for what is here; where no GPU is, and with run.world_size, for a newer one."""
    t4 = DeviceFacts("2.13.0", cuda="13.0", count=1, name="Tesla T4", capability=(7, 5))
    facts = {"here": t4}
    monkeypatch.setattr(plan, "look", lambda device, rank: facts["here"])
    monkeypatch.setattr(plan, "check_fits", lambda *args: None)
    assert plan_of("strategy.device=cuda", "dry_run=true").dtype == "float32"
    assert plan_of("strategy.device=cuda", "dry_run=true", "run.world_size=1").dtype == "bfloat16"
    facts["here"] = DeviceFacts("2.13.0+cpu")
    assert plan_of("strategy.device=cuda", "dry_run=true").dtype == "bfloat16"
    facts["here"] = DeviceFacts("2.13.0+cpu", nvidia=("/dev/nvidia0",))
    with pytest.raises(UserError, match="built for the CPU alone"):
        plan_of("strategy.device=cuda", "dry_run=true")


def test_a_policy_of_a_control_run_is_in_float32_on_a_gpu_too():
    pytest.importorskip("gymnasium")
    given = "experiment=control", "control.env_id=CartPole-v1"
    gpu = DeviceChoice("cuda", "bfloat16")
    assert plan_of(*given, device=gpu).dtype == "float32"
    assert plan_of(*given, "model.dtype=bfloat16", device=gpu).dtype == "bfloat16"


def test_sampling_parameters_reach_both_kinds():
    plan = plan_of("sampler.max_new_tokens=5", "sampler.stop=[x]", "sampler.stop_token_ids=[3]", "eval.temperature=0.5")
    for params, temperature in ((plan.sampling, 1.0), (plan.eval_sampling, 0.5)):
        assert (params.max_tokens, params.stop, params.stop_token_ids) == (5, ("x",), (3,))
        assert params.temperature == temperature


@pytest.mark.parametrize(
    ("recipe", "size"),
    [*((recipe, 8) for recipe in RECIPES), ("arithmetic", 1), ("gsm8k", 64), ("smollm2_arithmetic", 12)],
)
def test_every_recipe_dry_runs(recipe, size, tmp_path):
    model = "tiny"
    if "replay: true" in FILES[recipe]:  # for mixtures alone
        with pytest.raises(UserError, match="algorithm.router: tiny has no experts"):
            dry_run(load_config([f"experiment={recipe}", "model.path=tiny", *ASKED.get(recipe, ())]), size)
        make_net("qwen3_moe", max_position_embeddings=4096).config.save_pretrained(model := tmp_path)
    overrides = [f"experiment={recipe}", f"model.path={model}", "dry_run=true", f"run.world_size={size}"]
    cfg = load_config([*overrides, *ASKED.get(recipe, ())])
    text = describe(cfg, dry_run(cfg, size))
    assert cfg.experiment == recipe and cfg.run.name.startswith(recipe)
    assert f"{size} x" in text and "peak" in text


WITH_ALL = ("arithmetic", "arithmetic_lora", "gsm8k")  # of each kind one; the others in turn with one algorithm each


@pytest.mark.parametrize(
    ("recipe", "algorithm"),
    [(recipe, algorithm) for recipe in WITH_ALL for algorithm in ALGORITHMS]
    + [
        (recipe, ALGORITHMS[number % len(ALGORITHMS)])
        for number, recipe in enumerate(RECIPES)
        if recipe not in (*WITH_ALL, "ppo_critic", "live_feedback")  # which are about their algorithms
        and recipe not in ("sft_chat", "dpo", "reward_model", "distill")  # which have none
    ],
)
def test_every_algorithm_fits_every_kind_of_recipe(recipe, algorithm):
    overrides = [f"experiment={recipe}", "model.path=tiny", f"algorithm={algorithm}", *ASKED.get(recipe, ())]
    if algorithm in ("rloo", "opo", "maxrl", "vtrace", "remax"):  # without a ratio
        overrides.append("batch.optim_steps_per_batch=1")
    if algorithm in ("ppo", "vapo", "vtrace") and "lora" in recipe:  # which is refused: tests/config/test_rules.py
        overrides.append("model.lora.rank=0")
    make_plan(load_config(overrides), 2, device="cpu")


def test_row_limit_comes_from_the_model_and_is_checked_against_it():
    sizes = tiny_sizes(TinyModelConfig())
    assert plan_of().max_row_tokens == 0
    assert plan_of(model_sizes=sizes).max_row_tokens == sizes.max_positions
    assert plan_of("batch.max_row_tokens=99", model_sizes=sizes).max_row_tokens == 99
    with pytest.raises(UserError, match="batch.max_row_tokens=9999: the model has 4096 positions"):
        plan_of("batch.max_row_tokens=9999", model_sizes=sizes)
    with pytest.raises(UserError, match="sampler.max_new_tokens=4096: leaves no room"):
        plan_of("sampler.max_new_tokens=4096", model_sizes=sizes)


# ---- memory


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 1, "vocab_size": 300}])
def test_sizes_of_tiny_equal_the_built_model(shape):
    import torch
    from transformers import AutoModelForCausalLM

    from skyrl.pretrained.tiny import tiny_config
    from skyrl.text.tokenizer import tiny_tokenizer

    tiny = TinyModelConfig(**shape)
    sizes = tiny_sizes(tiny)
    config = tiny_config(tiny, len(tiny_tokenizer()))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert sizes.num_parameters == sum(p.numel() for p in module.parameters())
    assert sizes.vocab_size == config.vocab_size and sizes.max_positions == config.max_position_embeddings
    assert sizes.head_size == config.head_dim and sizes.num_kv_heads == config.num_key_value_heads


def test_sizes_of_a_folder_equal_its_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=77, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    sizes = model_sizes(load_config([f"model.path='{tmp_path}'"]))
    assert sizes.num_parameters == LlamaForCausalLM(config).num_parameters()
    assert sizes.matmul_parameters == sizes.num_parameters - 50 * 32  # the input embedding is a look-up
    assert (sizes.num_layers, sizes.hidden_size, sizes.ffn_size, sizes.head_size) == (3, 32, 48, 8)
    assert (sizes.num_kv_heads, sizes.vocab_size, sizes.max_positions) == (2, 50, 77)


@pytest.mark.parametrize(
    ("kind", "options", "ffn", "kv_heads", "positions"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 128, 4, 64),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}, 48, 4, 1024),
        ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 128, 1, 64),
        (
            "OPTConfig",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
            48,
            4,
            2048,
        ),
    ],
)
def test_sizes_of_families_with_names_of_their_own(kind, options, ffn, kv_heads, positions, tmp_path):
    import transformers

    getattr(transformers, kind)(vocab_size=50, **options).save_pretrained(tmp_path)
    sizes = model_sizes(load_config([f"model.path='{tmp_path}'"]))
    assert (sizes.num_layers, sizes.hidden_size, sizes.head_size, sizes.ffn_size) == (2, 32, 8, ffn)
    assert (sizes.num_kv_heads, sizes.max_positions) == (kv_heads, positions)


@pytest.mark.parametrize(("family", "plain"), [("gpt_oss", False), ("deepseek_v3", False), ("qwen3", True)])
def test_heads_that_flash_attention_does_not_take_are_known(family, plain, tmp_path):
    """Sinks; queries and values of other sizes: what their layers keep of attention is in the plan."""
    make_net(family).config.save_pretrained(tmp_path)
    sizes = model_sizes(load_config([f"model.path='{tmp_path}'"]))
    assert sizes.plain_heads is plain
    assert (kept_scores(sizes, 64, 32, dtype="bfloat16") == 0) is (plain and torch_release() >= VARLEN_RELEASE)


def test_a_token_goes_through_the_experts_it_visits_only(tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=77, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    sizes = model_sizes(load_config([f"model.path='{tmp_path}'"]))
    assert sizes.num_parameters - sizes.matmul_parameters == 2 * (8 - 2) * 3 * 32 * 16


def test_a_missing_model_is_one_line(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError) as error:
            model_sizes(load_config([f"model.path='{path}'"]))
        assert str(error.value).startswith(f"model.path={path}:") and "\n" not in str(error.value)


ODD = {
    "auto": {"torch_dtype": "auto"},
    "a text where a number belongs": {"hidden_size": "64"},
    "no number at all": {"num_hidden_layers": None},
    "a list": {"intermediate_size": [128]},
    "a number where a table belongs": {"rope_parameters": 3},
    "heads that are none": {"num_attention_heads": 0},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_config_with_odd_values_is_one_line_or_a_model(odd, tmp_path):
    """Whatever the class makes of them, TypeError and AttributeError too."""
    values = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 512, **odd}))
    cfg = load_config([f"model.path={tmp_path}"])
    if "torch_dtype" in odd:
        assert model_sizes(cfg).num_layers == 2
        return
    with pytest.raises(UserError, match=f"^model.path={tmp_path}: ") as error:
        model_sizes(cfg)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# What a block keeps is counted as today's kernels do it.
@pytest.mark.skipif(torch_release() < VARLEN_RELEASE, reason="an older torch keeps other tensors, and less")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(256, 704, 4, 2), (256, 768, 16, 8)])
def test_activations_are_what_autograd_keeps(dtype, shape):
    import torch
    from transformers import AutoModelForCausalLM

    from skyrl.pretrained.tiny import tiny_config

    hidden, ffn, heads, kv_heads = shape
    tiny = TinyModelConfig(hidden_size=hidden, ffn_size=ffn, num_heads=heads, num_kv_heads=kv_heads, num_layers=3)
    module = AutoModelForCausalLM.from_config(tiny_config(tiny, 100)).to(getattr(torch, dtype)).model
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 512
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    cfg = load_config([f"batch.max_tokens_per_microbatch={tokens}"])
    need = estimate(
        cfg, tiny_sizes(tiny), world_size=1, dtype=dtype, strategy="single", device="cpu", row_tokens=tokens
    )  # fmt: skip
    assert out.requires_grad
    assert need.activations == pytest.approx(sum(kept.values()), rel=0.1)


BIG = ModelSizes("big", 4_000_000_000, 4_000_000_000, 36, 2560, 9728, 32, 8, 128, 151936, 40960)


def memory_of(*overrides: str, world_size: int = 8, dtype: str = "bfloat16", strategy: str = "fsdp"):
    cfg = load_config(overrides)
    return estimate(
        cfg, BIG, world_size=world_size, dtype=dtype, strategy=strategy, device="cuda", row_tokens=2048
    )  # fmt: skip


def test_memory_of_weights_and_states():
    ddp, one = memory_of(strategy="ddp"), memory_of(strategy="single", world_size=1)
    assert ddp.resident == one.resident == 18 * BIG.num_parameters  # 2 + 4 masters + 4 gradients + 8 Adam
    assert memory_of(strategy="ddp", dtype="float32").resident == 16 * BIG.num_parameters
    assert memory_of(strategy="ddp", dtype="float64").resident == 32 * BIG.num_parameters
    fsdp = memory_of()
    assert fsdp.resident == 16 * BIG.num_parameters // 8 and fsdp.gathered == 2 * BIG.num_parameters
    assert ddp.gathered == 0
    assert memory_of("algorithm.kl.coef=0.1", strategy="ddp").reference == 2 * BIG.num_parameters
    assert memory_of("algorithm=ppo").critic == 16 * BIG.num_parameters // 8


def test_what_is_whole_for_a_moment_and_the_sums():
    ddp, fsdp = memory_of(strategy="ddp"), memory_of()
    embedding, share = 151936 * 2560, 4_000_000_000 // 8
    layer = (4_000_000_000 - embedding) // 36
    assert ddp.transient == 2 * embedding
    assert fsdp.transient == 2 * (2 * layer + embedding) + (2 + 4) * embedding
    assert (
        memory_of("strategy.name=fsdp", "strategy.reshard_after_forward=false").transient > fsdp.transient + 60 * layer
    )
    assert ddp.update == fsdp.update == 0
    cpu = estimate(load_config([]), BIG, world_size=8, dtype="float32", strategy="fsdp", device="cpu", row_tokens=9)
    assert cpu.update == 4 * share
    lora = memory_of("model.lora.rank=8", strategy="ddp")
    assert lora.transient == 0
    assert fsdp.training == fsdp.resident + fsdp.activations + fsdp.logits + fsdp.transient
    assert fsdp.peak == fsdp.training + fsdp.gathered + fsdp.cache
    freed = replace(fsdp, keeps_sampling=False)
    assert freed.beside_cache == fsdp.resident + fsdp.gathered + fsdp.drawing
    assert freed.peak == max(freed.training, freed.beside_cache + fsdp.cache) < fsdp.peak


def test_what_sampling_holds_stays_where_it_fits(monkeypatch):
    room = [0]
    monkeypatch.setattr("skyrl.planner.memory.available", lambda device: (room[0], "a test"))
    cfgs = {keep: load_config([f"sampler.keep_memory={keep}"]) for keep in ("auto", "always", "never")}
    need = memory_of()
    half = need.beside_cache + need.cache // 2
    for keep, kept, factor in (("auto", True, 1.01), ("auto", False, 0.99), ("always", True, 0.99)):
        room[0] = GIB + int(factor * half / (1 - SPARE))  # the context, and what an allocator cannot use
        assert with_room(cfgs[keep], need, "cuda").keeps_sampling == kept, (keep, factor)
    assert not memory_of("sampler.keep_memory=never").keeps_sampling
    room[0] = int(0.99 * need.least)
    with pytest.raises(UserError, match="try sampler.keep_memory=never, fewer batch.max_tokens_per_microbatch"):
        check_fits(cfgs["always"], BIG, need, "cuda")
    check_fits(cfgs["auto"], BIG, replace(need, keeps_sampling=False), "cuda")
    idle = replace(need, activations=0, logits=0, transient=0, update=0)  # training takes less than a draw
    assert with_room(cfgs["auto"], idle, "cuda").keeps_sampling
    room[0] = GIB + int(1.01 * half / (1 - SPARE))
    assert not with_room(load_config(["sampler.kv_cache_gib=9"]), need, "cuda").keeps_sampling  # all of it, as asked


def test_the_cache_is_not_kept_where_training_leaves_a_few_rows(monkeypatch):
    """1.5B on one GPU of 30 to 48 GiB: rows of 2,048 that are drawn at once, of the 256 wanted."""
    cfg = load_config(["experiment=gsm8k", "model.path=/x", "data.path=/x"])
    sizes = ModelSizes("1.5B", 1_540_000_000, 1_540_000_000, 28, 1536, 8960, 12, 2, 128, 151936, 32768)
    need = estimate(cfg, sizes, world_size=1, dtype="bfloat16", strategy="single", device="cuda", row_tokens=2048)
    each, rows, said = 256 * sizes.cache_bytes_per_token("bfloat16"), {}, []
    for total in (31.1, 32, 36, 40, 44, 48):
        monkeypatch.setattr("skyrl.planner.memory.available", lambda device, total=total: (int(total * GIB), "a test"))
        ours, plan = int((total - 1) * GIB), with_room(cfg, need, "cuda")
        rows[total] = (
            gpu_blocks(ours, ours - plan.resident, each, 256, 2048, plan, said.append) // 8,
            plan.keeps_sampling,
        )
    assert all(count >= (128 if kept else 40) for count, kept in rows.values()) and said == [], rows
    assert not rows[31.1][1] and not rows[32][1] and rows[44][1] and rows[48] == (256, True), rows


def test_memory_of_an_adapter_over_a_frozen_model():
    lora = ("model.lora.rank=8", "algorithm.kl.coef=0.1")
    layer = 2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)
    numbers = 8 * (36 * layer + 2560 + 151936)
    ddp, fsdp, zero = (memory_of(*lora, strategy=name) for name in ("ddp", "fsdp", "zero1"))
    for need in (ddp, fsdp, zero):
        assert need.adapter == numbers * (2 + 4 + 4 + 8)
        assert need.masters == need.gradients == need.optimizer == need.reference == need.critic == 0
    assert ddp.weights == 2 * BIG.num_parameters and ddp.gathered == 0
    assert fsdp == zero and fsdp.weights == 4 * BIG.num_parameters // 8 and fsdp.gathered == 2 * BIG.num_parameters
    few = memory_of(*lora, "model.lora.train_mlp=false", "model.lora.train_unembed=false", dtype="float32")
    assert few.adapter == 8 * 36 * (2 * (2560 + 4096) + 2 * (2560 + 1024)) * 16
    text = describe(load_config(lora), plan_of(*lora, model_sizes=tiny_sizes(TinyModelConfig())))
    assert (
        "rank 8, alpha 32 on attention, feed-forward, output" in text and "adapter  " in text and "masters" not in text
    )


def test_memory_of_activations_and_cache_follows_the_options():
    plain, checkpointed = memory_of(), memory_of("model.activation_checkpointing=true")
    assert checkpointed.activations < plain.activations / 5
    double = memory_of("batch.max_tokens_per_microbatch=16384")
    if torch_release() >= VARLEN_RELEASE:  # before, scores of padded rows count as well
        assert double.activations == 2 * plain.activations
    assert memory_of("sampler.kv_cache_gib=2").cache == 2 * GIB
    per_token = 2 * 36 * 8 * 128 * 2
    assert memory_of("batch.prompts_per_step=8", "batch.samples_per_prompt=2").cache == 2 * 2048 * per_token
    assert plain.least_cache == 2048 * per_token and plain.least < plain.peak
    chunk = 100 * BIG.vocab_size * 4
    assert memory_of("model.logits_chunk_tokens=100").logits == 2 * chunk
    wide = memory_of("model.head_dtype=float32").logits - plain.logits  # hidden states and their gradient in float32
    assert 0 < wide - 2 * 8192 * BIG.hidden_size * 4 < 0.2 * wide


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("skyrl.planner.memory.available", lambda device: (8 * GIB, "a small machine"))
    cfg = load_config([])
    with pytest.raises(UserError, match=r"4.00G parameters need about .* GiB on each rank, there are 8.0 GiB"):
        make_plan(cfg, 1, model_sizes=BIG, device="cpu")
    make_plan(cfg, 1, model_sizes=tiny_sizes(TinyModelConfig()), device="cpu")
    other = load_config(["dry_run=true", "run.world_size=64"])
    make_plan(other, 64 // 2, model_sizes=BIG, device="cpu")  # another machine: told, not refused


def test_available_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = available("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = available("cpu")
    assert alone is not None and shared is not None and alone[0] // 4 == shared[0]
    need = memory_of(strategy="single", world_size=1)
    assert (need.least > shared[0]) == _refuses(need)


def _refuses(need) -> bool:
    try:
        check_fits(load_config([]), BIG, need, "cpu")
    except UserError:
        return True
    return False


def test_describe_says_that_shares_are_uneven():
    cfg = load_config(["batch.prompts_per_step=8", "algorithm.kl.coef=0.1"])
    text = describe(cfg, make_plan(cfg, 3))
    assert "2 or 3 prompts on a rank" in text and "KL 0.1 in the loss" in text and "memory" not in text


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("batch.share_prefixes=true", "training    beginnings that rows share computed once"),
        ("batch.share_prefixes=false", "training    rows apart (batch.share_prefixes=false)"),
        ("batch.packing=false", "training    rows apart (batch.packing=false)"),
    ],
)
def test_describe_says_how_rows_are_computed(option, told):
    cfg = load_config([option])
    assert told in describe(cfg, make_plan(cfg, 1)).splitlines()


def test_layers_are_compiled_where_there_is_a_compiler(monkeypatch, tmp_path):
    cfg = load_config(["model.compile=true"])
    if compiler_problem("cpu"):
        pytest.skip(compiler_problem("cpu"))
    assert "; layers compiled by torch" in describe(cfg, make_plan(cfg, 1, device="cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="^model.compile=true: no C.. compiler here; install g.., or leave it out$"):
        make_plan(cfg, 1, device="cpu")
    elsewhere = replace(cfg, dry_run=True, run=replace(cfg.run, world_size=2))  # where there may be one
    make_plan(elsewhere, 2, device="cpu")


# ---- what may change on resume


def test_diff_tells_what_changes_results_and_nothing_else():
    before = load_config(["optim.schedule=constant"])
    free = load_config(
        "run.threads=2 tracking.tensorboard=true checkpoint.every_steps=3 strategy.name=fsdp eval.every_steps=7 "
        "batch.max_tokens_per_microbatch=99 batch.packing=false sampler.max_running=3 sampler.backend=module "
        "batch.num_steps=500 optim.schedule=constant".split()
    )
    assert config_diff(before, free) == [] and config_digest(before) == config_digest(free)
    changed = load_config(["optim.schedule=constant", "optim.lr=0.5", "env.options.max_digits=4"])
    assert f"optim.lr: {before.optim.lr} -> 0.5" in config_diff(before, changed)
    assert any(line.startswith("env.options.max_digits: ") for line in config_diff(before, changed))
    assert config_digest(before) != config_digest(changed)
    assert config_diff(to_dict(before), to_dict(changed)) == config_diff(before, changed)


def test_more_steps_change_results_only_under_a_decaying_rate():
    linear, longer = (
        load_config(["optim.schedule=linear"]),
        load_config(["optim.schedule=linear", "batch.num_steps=999"]),
    )
    assert [line.split(":")[0] for line in config_diff(linear, longer)] == ["batch.num_steps"]


def test_a_hub_name_that_begins_like_a_folder_here_is_read_from_the_hubs_cache(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    held = tmp_path / "hub" / "models--org--cached"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("0" * 40)
    tf.Qwen3Config(num_hidden_layers=3).save_pretrained(held / "snapshots" / ("0" * 40))
    assert model_sizes(load_config(["model.path=org/cached"])).num_layers == 3
    known = r"no such folder.*or a hub name \(org/name\), fetched before \(hf download org/typo\)"
    with pytest.raises(UserError, match=known):
        model_sizes(load_config(["model.path=org/typo"]))
