"""Every rule between options refuses what it should, in one line."""

import pytest

from skyrl.algorithms import losses
from skyrl.config import validation
from skyrl.config.load import from_dict, load_config, to_dict
from skyrl.config.options import RENAMED, all_options, parameters
from skyrl.planner.memory import tiny_sizes
from skyrl.planner.plan import make_plan, make_spec
from skyrl.types import UserError


def line_of(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as error:
        cfg = load_config(overrides)
        make_plan(cfg, world_size, model_sizes=tiny_sizes(cfg.model.tiny) if cfg.model.path == "tiny" else None)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tables_name_only_options_that_exist():
    known = {option.path for option in all_options()}
    names = "CHOICES AT_LEAST_ONE ABOVE_ZERO LEAST PARTS BELOW_ONE RESUME_OPTIONS REGISTERED APPLIES APPLIES_TYPED"
    paths = {path for name in names.split() for path in getattr(validation, name)}
    assert {path for path in paths - known if not any(one.startswith(f"{path}.") for one in known)} == set()


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ("model.dtype=int8", "model.dtype=int8: choose one of: auto"),
        ("algorithm.loss.name=sum", "algorithm.loss.name=sum: choose one of: cispo, clip_cov, dppo_kl"),
        ("optim.lr=inf", "optim.lr=inf: must be a finite number"),
        ("optim.lr=-1", "optim.lr=-1.0: must not be negative"),
        ("optim.lr=0", "optim.lr=0.0: must be above 0"),
        ("optim.beta2=1", "optim.beta2=1.0: must be at least 0 and below 1"),
        ("batch.num_steps=0", "batch.num_steps=0: must be at least 1"),
        ("sampler.top_p=1.5", "sampler.top_p=1.5: must lie between 0 and 1"),
        ("algorithm.loss.params.clip_low=1.5", "algorithm.loss.params.clip_low=1.5: ppo allows 0 to 1 (default 0.2)"),
        ("algorithm.loss.params.clip_low=nan", "algorithm.loss.params.clip_low=nan: ppo allows 0 to 1"),
        (
            "algorithm.loss.params.clip_lo=0.1",
            "algorithm.loss.params.clip_lo=0.1: ppo has no such parameter; did you mean clip_low?",
        ),
        (
            "algorithm.loss.params.x=1",
            "algorithm.loss.params.x=1.0: ppo has no such parameter; its parameters are: clip_low, clip_high",
        ),
        ("algorithm.loss.params.beta=abc", "algorithm.loss.params.beta=abc: needs a number"),
        (
            "algorithm.loss.name=dro algorithm.loss.params.beta=-1",
            "algorithm.loss.params.beta=-1.0: dro allows 0 or more",
        ),
        ("sampler.stop=['']", "sampler.stop: an empty string"),
        ("algorithm.advantage.params.gamma=0.9", "algorithm.advantage.params.gamma=0.9: has an effect only with"),
        ("algorithm.advantage.params.lam=0.9", "algorithm.advantage.params.lam=0.9: has an effect only with"),
        (
            "algorithm=dr_grpo algorithm.advantage.params.eps=1",
            "algorithm.advantage.params.eps=1.0: has an effect only with",
        ),
        (
            "algorithm=rloo algorithm.loss.params.clip_low=0.1",
            "algorithm.loss.params.clip_low=0.1: has an effect only with",
        ),
        ("algorithm.loss.correction_cap=3", "algorithm.loss.correction_cap=3.0: has an effect only with"),
        (
            "algorithm=rloo algorithm.loss.recompute_old_logprobs=true",
            "algorithm.loss.recompute_old_logprobs=True: has an effect",
        ),
        ("algorithm.kl.estimator=k2", "algorithm.kl.estimator=k2: has an effect only with"),
        ("algorithm.kl.target=0.1", "algorithm.kl.target=0.1: has an effect only with"),
        ("algorithm.kl.coef=0.1 algorithm.kl.horizon=999", "algorithm.kl.horizon=999.0: has an effect only with"),
        ("algorithm.filters.refill=true", "algorithm.filters.refill=True: has an effect only with"),
        ("algorithm.filters.max_refill_rounds=2", "algorithm.filters.max_refill_rounds=2: has an effect only with"),
        ("algorithm.critic.lr=1e-3", "algorithm.critic.lr=0.001: has an effect only with"),
        ("optim.schedule=constant optim.final_lr_ratio=0.5", "optim.final_lr_ratio=0.5: has an effect only with"),
        ("model.lora.alpha=8", "model.lora.alpha=8.0: has an effect only with model.lora.rank above 0"),
        ("model.lora.train_mlp=false", "model.lora.train_mlp=False: has an effect only with model.lora.rank above 0"),
        ("model.lora.rank=4 model.lora.alpha=0", "model.lora.alpha=0.0: must be above 0"),
        ("model.lora.rank=-1", "model.lora.rank=-1: must not be negative"),
        (
            "model.lora.rank=4 model.lora.train_mlp=false model.lora.train_attn=false model.lora.train_unembed=false",
            "model.lora.rank=4: model.lora.train_mlp, train_attn and train_unembed are all false",
        ),
        (
            "model.lora.rank=4 algorithm=ppo",
            "algorithm.advantage.name=gae: its critic is a second model that is trained whole, which "
            "model.lora.rank=4 is there to avoid; use grpo, dr_grpo, rloo or reinforce++, or model.lora.rank=0",
        ),
        (
            "model.lora.rank=4 strategy.name=zero2 strategy.offload=optimizer",
            "strategy.offload=optimizer: with model.lora.rank=4 the frozen model has no optimizer that could move",
        ),
        ("model.compile=true model.lora.rank=4", "model.compile=true: model.lora.rank=4 adds adapters by hooks"),
        ("model.compile=true model.dtype=float64", "model.compile=true: model.dtype=float64 is computed without any"),
        ("model.compile=true strategy.name=zero2", "model.compile=true: strategy.name=zero2 gathers weights by hooks"),
        ("model.revision=main", "model.revision=main: has an effect only with"),
        ("model.path=x model.tiny.num_layers=2", "model.tiny.num_layers=2: has an effect only with"),
        ("warmup.num_steps=0 warmup.lr=1e-4", "warmup.lr=0.0001: has an effect only with"),
        ("sampler.temperature=0", "sampler.temperature=0: greedy samples have no policy gradient"),
        ("sampler.top_k=1", "sampler.top_k=1: leaves one token to draw"),
        (
            "algorithm.kl.coef=0.1 algorithm.reference.sync_every=2 model.lora.rank=4",
            "algorithm.reference.sync_every=2: with model.lora.rank=4 the reference is the frozen model",
        ),
        (
            "algorithm.reference.sync_every=2",
            "algorithm.reference.sync_every=2: has an effect only with algorithm.kl",
        ),
        (
            "algorithm.kl.coef=0.1 algorithm.reference.sync_every=100 batch.num_steps=100",
            "algorithm.reference.sync_every=100: the reference would never be used",
        ),
        (
            "algorithm.kl.coef=0.1 algorithm.reference.ema=0.5",
            "algorithm.reference.ema=0.5: has an effect only with algorithm.ref",
        ),
        (
            "algorithm.kl.coef=0.1 algorithm.reference.models={a:0.7,b:0.6} algorithm.kl.estimator=k2",
            "algorithm.reference.models={'a': 0.7, 'b': 0.6}: the weights are above 1 together",
        ),
        (
            "algorithm.kl.coef=0.1 algorithm.reference.models={a:0.5}",
            "algorithm.kl.estimator=k3: with algorithm.reference.models only k2 and k1+ have the gradient",
        ),
        (
            "algorithm.advantage.name=remax algorithm.objectives.normalise=true",
            "algorithm.advantage.name=remax: its baseline is one reward",
        ),
        ("algorithm.self_imitation.size=9", "algorithm.self_imitation.size=9: has an effect only with"),
        (
            "algorithm.self_imitation.coef=1 algorithm.self_imitation.size=9",
            "algorithm.self_imitation.rows_per_step=32: above algorithm.self_imitation.size=9",
        ),
        ("optim.name=lion", "optim.name=lion: choose one of: adamw, muon, adamw8bit"),
        ("optim.momentum=0.9", "optim.momentum=0.9: has an effect only with optim.name=muon"),
        ("optim.name=muon optim.momentum=1", "optim.momentum=1.0: must be at least 0 and below 1"),
        ("optim.name=muon model.lora.rank=4", "optim.name=muon: with model.lora.rank=4 adapters are stepped by AdamW"),
        ("optim.name=muon strategy.name=zero2", "optim.name=muon: strategy.name=zero2 steps flat parts of matrices"),
        (
            "optim.name=adamw8bit strategy.name=fsdp",
            "optim.name=adamw8bit: strategy.name=fsdp has its masters in shards",
        ),
        ("optim.name=adamw8bit model.dtype=float64", "optim.name=adamw8bit: bitsandbytes has no float64"),
        (
            "warmup.num_steps=0 warmup.schedule=linear",
            "warmup.schedule=linear: has an effect only with warmup.num_steps",
        ),
        ("sampler.min_p=1", "sampler.min_p=1.0: leaves one token to draw"),
        (
            "feedback.enabled=true env.name=feedback sampler.top_p=0.9",
            "sampler.top_p=0.9: with feedback.enabled=true answers are drawn as clients ask",
        ),
        ("eval.samples_per_prompt=4 eval.temperature=0", "eval.samples_per_prompt=4: greedy episodes"),
        ("batch.max_row_tokens=4 sampler.max_new_tokens=8", "batch.max_row_tokens=4: leaves no room"),
        (
            "batch.max_row_tokens=40 sampler.max_new_tokens=20 data.max_prompt_tokens=30",
            "data.max_prompt_tokens=30: with sampler.max_new_tokens=20 above batch.max_row_tokens=40",
        ),
        (
            "batch.prompts_per_step=32 batch.optim_steps_per_batch=5",
            "batch.optim_steps_per_batch=5: does not divide batch.prompts_per_step=32; near ones that do: 2, 4, 8",
        ),
        ("batch.num_steps=10 optim.warmup_steps=11", "optim.warmup_steps=11: above batch.num_steps=10"),
        ("batch.samples_per_prompt=1", "batch.samples_per_prompt=1: algorithm.advantage.name=grpo compares"),
        (
            "algorithm=reinforce_pp batch.samples_per_prompt=1 algorithm.filters.zero_variance=true",
            "batch.samples_per_prompt=1: filters.zero_variance compares",
        ),
        ("algorithm=rloo batch.epochs_per_batch=2", "algorithm.loss.name=reinforce: has no ratio"),
        (
            "algorithm.loss.correction=token_truncate batch.epochs_per_batch=2",
            "algorithm.loss.correction=token_truncate: with 2 updates",
        ),
        ("algorithm.kl.coef=0.1 algorithm.kl.placement=reward", "algorithm.kl.placement=reward: rewards per token"),
        ("algorithm.kl.coef=0.1 algorithm.kl.estimator=k1", "algorithm.kl.estimator=k1: as a term of the loss"),
        (
            "algorithm.kl.coef=0.1 algorithm.kl.target=0.1 algorithm.kl.horizon=10",
            "algorithm.kl.horizon=10: below the",
        ),
        ("run.world_size=4", "run.world_size=4: only for a dry run"),
        ("sampler.temperature=1e-7", "sampler.temperature=1e-07: must be at least 1e-06: logits divided by less"),
        ("eval.temperature=1e-9", "eval.temperature=1e-09: must be at least 1e-06"),
        ("optim.eps=1e-40", "optim.eps=1e-40: must be at least 1e-30: a smaller one is 0 in float32"),
        ("env.timeout_seconds=1e-6", "env.timeout_seconds=1e-06: must be at least 0.001"),
        ("run.hang_seconds=0.01", "run.hang_seconds=0.01: must be at least 0.5"),
        (
            "algorithm.loss.correction=token_mask algorithm.loss.correction_cap=1",
            "algorithm.loss.correction_cap=1: token_mask keeps ratios between 1 / cap and cap",
        ),
        (
            "algorithm.loss.correction=token_truncate algorithm.loss.correction_cap=0.5",
            "algorithm.loss.correction_cap=0.5: below 1 it shrinks every weight",
        ),
        (
            "algorithm.loss.correction=token_mask algorithm.loss.correction_low=1.2",
            "algorithm.loss.correction_low=1.2: allowed are 0 (no bound) or more, and below 1",
        ),
        ("algorithm.loss.correction_low=0.5", "algorithm.loss.correction_low=0.5: has an effect only with"),
        ("algorithm.loss.rejected=dropped", "algorithm.loss.rejected=dropped: has an effect only with"),
        (
            "algorithm.loss.correction=geometric_mask algorithm.loss.correction_normalise=true",
            "algorithm.loss.correction_normalise=True: has an effect only with",
        ),
        (
            "algorithm.loss.correction=token_mask algorithm.loss.rejected=dropped",
            "algorithm.loss.rejected=dropped: needs the weights of a whole optimizer step before it begins; set",
        ),
        (
            "algorithm.loss.correction=token_truncate algorithm.loss.correction_normalise=true",
            "algorithm.loss.correction_normalise=true: needs the weights of a whole optimizer step",
        ),
        ("algorithm.loss.top_entropy=0", "algorithm.loss.top_entropy=0.0: must be above 0"),
        ("algorithm.filters.overlong_buffer=1.5", "algorithm.filters.overlong_buffer=1.5: must lie between 0 and 1"),
        (
            "algorithm=gdpo algorithm.filters.overlong_buffer=0.2",
            "algorithm.filters.overlong_buffer=0.2: with algorithm.objectives.normalise=true",
        ),
        (
            "algorithm=maxrl algorithm.filters.overlong_buffer=0.2",
            "algorithm.filters.overlong_buffer=0.2: its penalty makes scores below 0, and maxrl divides by their mean",
        ),
        (
            "algorithm=vapo algorithm.advantage.params.alpha=0.05",
            "algorithm.advantage.params.alpha=0.05: lambda is 0 up to 1 / alpha tokens, and an episode has at most 16",
        ),
        (
            "algorithm=pass_at_k batch.samples_per_prompt=4",
            "algorithm.advantage.params.k=4: has to be below batch.samples_per_prompt=4",
        ),
        (
            "algorithm=pass_at_k algorithm.advantage.params.k=2.5",
            "algorithm.advantage.params.k=2.5: pass_at_k allows whole numbers, 1 or more (default 4)",
        ),
        ("algorithm.advantage.params.ddof=2", "algorithm.advantage.params.ddof=2.0: grpo allows whole numbers, 0 to 1"),
        (
            "algorithm=vtrace algorithm.advantage.params.c_max=2",
            "algorithm.advantage.params.c_max=2: must be at most params.rho_max=1",
        ),
        (
            "algorithm=vtrace algorithm.loss.recompute_old_logprobs=false",
            "algorithm.advantage.name=vtrace: weighs by the policy's probabilities over the sampler's",
        ),
        (
            "algorithm=vtrace algorithm.loss.correction=token_mask",
            "algorithm.loss.correction=token_mask: vtrace has these weights in its advantages",
        ),
        (
            "algorithm=opo batch.samples_per_prompt=1",
            "batch.samples_per_prompt=1: algorithm.advantage.name=opo compares",
        ),
        ("algorithm=opo batch.epochs_per_batch=2", "algorithm.loss.name=reinforce: has no ratio"),
        ("algorithm=clip_cov algorithm.loss.params.cov_low=9", "algorithm.loss.params.cov_low=9: must be below"),
        (
            "algorithm=dual_clip algorithm.loss.params.dual_clip=1.1",
            "algorithm.loss.params.dual_clip=1.1: must be above",
        ),
        (
            "algorithm=sapo algorithm.loss.params.tau_neg=0",
            "algorithm.loss.params.tau_neg=0.0: sapo allows 0.001 or more",
        ),
        (
            "algorithm.kl.coef=0.1 algorithm.kl.estimator=k1",
            "algorithm.kl.estimator=k1: as a term of the loss its expected gradient is 0; use k2, k3 or k1+",
        ),
        ("algorithm=vapo model.lora.rank=4", "algorithm.advantage.name=vapo: its critic is a second model"),
        (
            "algorithm.advantage.params.eps=0",
            "algorithm.advantage.params.eps=0.0: grpo allows 1e-12 or more (default 1e-06)",
        ),
        (
            "algorithm=ppo algorithm.advantage.params.eps=1e-20",
            "algorithm.advantage.params.eps=1e-20: gae allows 1e-12",
        ),
        ("optim.weight_decay=100 optim.lr=0.01", "optim.weight_decay=100: times optim.lr=0.01 it takes 1 of every"),
        ("sampler.stop_token_ids=[3,-1]", "sampler.stop_token_ids=[3, -1]: -1 is no token id"),
        ("sampler.stop_token_ids=[500]", "sampler.stop_token_ids=[500]: 500 is never drawn, the model has 100 tokens"),
        ("sampler.kv_cache_gib=1e-5", "sampler.kv_cache_gib=1e-05: one answer of sampler.max_new_tokens="),
        ("model.tiny.vocab_size=50", "model.tiny.vocab_size=50: its tokenizer has 100 entries"),
        ("model.tiny.num_heads=3", "model.tiny.hidden_size=256: must give an even number"),
        ("model.tiny.num_kv_heads=3", "model.tiny.num_kv_heads=3: must divide"),
        ("model.path=", "model.path: no model is named"),
    ],
)
def test_each_rule_refuses_with_place_and_remedy(overrides, start):
    assert line_of(*overrides.split(" ")).startswith(start)


@pytest.mark.parametrize(
    ("overrides", "world_size", "start"),
    [
        ("strategy.name=single", 2, "strategy.name=single: for one process, but there are 2"),
        ("batch.prompts_per_step=4", 8, "batch.prompts_per_step=4: fewer than the 8 ranks"),
    ],
)
def test_rules_about_the_number_of_ranks(overrides, world_size, start):
    make_plan(load_config(overrides.split(" ")), 1)
    assert line_of(*overrides.split(" "), world_size=world_size).startswith(start)


@pytest.mark.parametrize(
    "overrides",
    [
        "algorithm=reinforce_pp batch.samples_per_prompt=1 algorithm.kl.coef=0.01 algorithm.kl.placement=reward",
        "algorithm=rloo batch.epochs_per_batch=2 algorithm.loss.correction=token_truncate",
        "algorithm.loss.correction=token_mask algorithm.loss.recompute_old_logprobs=true batch.optim_steps_per_batch=4",
        "algorithm.kl.coef=0.1 algorithm.kl.target=0.1 algorithm.kl.estimator=k2",
        "algorithm=ppo algorithm.advantage.params.gamma=0.99 algorithm.critic.warmup_steps=3",
        "strategy.name=fsdp",
        "optim.schedule=cosine optim.final_lr_ratio=0",
        "warmup.num_steps=0",
        "sampler.temperature=1e-6 eval.temperature=0 run.hang_seconds=0 optim.eps=1e-15 optim.weight_decay=0.1",
        "algorithm.loss.correction=token_mask algorithm.loss.correction_cap=1.5 algorithm.advantage.params.eps=1e-8",
        "algorithm.loss.correction=token_truncate algorithm.loss.correction_cap=1",
        "algorithm.loss.correction=token_mask algorithm.loss.correction_low=0.5 algorithm.loss.correction_cap=5",
        "algorithm=icepop algorithm.loss.rejected=dropped algorithm.loss.correction_normalise=true",
        "algorithm.loss.top_entropy=0.2 algorithm.loss.rejected=dropped",
        "algorithm.kl.coef=0.1 algorithm.kl.estimator=k3_ratio",
        "algorithm=mt_grpo algorithm.kl.coef=0.1 algorithm.kl.estimator=k1 algorithm.kl.placement=reward",
        "algorithm=gmpo batch.epochs_per_batch=2",
    ],
)
def test_what_fits_together_is_accepted(overrides):
    make_plan(load_config(overrides.split(" ")), 1)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_are_refused_with_the_new_one(old, new):
    assert line_of(f"{old}=1") == f"{old}: no such option; did you mean {new}?"
    assert new in {option.path for option in (*all_options(), *parameters())}


def test_the_loss_has_its_own_defaults_and_a_config_saved_by_an_earlier_release_is_read():
    assert load_config(["algorithm.loss.name=dro"]).algorithm.loss.params == {"beta": 0.05}
    cfg = load_config(["algorithm=ppo", "algorithm.loss.params.clip_high=0.3"])
    old = to_dict(cfg)
    loss, advantage = old["algorithm"]["loss"], old["algorithm"]["advantage"]
    del loss["params"], loss["recompute_old_logprobs"], advantage["params"]
    loss |= {"clip_low": 0.2, "clip_high": 0.3, "recompute_anchor": False}
    advantage |= {"gamma": 1.0, "lam": 0.95, "eps": 1e-6}
    assert from_dict(old) == cfg and "clip_low" in loss
    loss["name"], advantage["name"] = "reinforce", "rloo"  # they had the options, which had no effect
    assert from_dict(old).algorithm.loss.params == from_dict(old).algorithm.advantage.params == {}


PLUGIN = """
from skyrl.algorithms.declare import LOSSES, Loss, Param

SCALED = Loss("test_plugin_loss", needs=("advantages",), params={"scale": Param(2.0, "Times the loss", high=9)})

@SCALED
def test_plugin_loss(outputs, rows, *, scale):
    return -scale * rows.advantages_T * outputs.logprobs_T, {}
"""


def test_a_plugin_may_bring_a_loss_with_a_parameter(tmp_path, monkeypatch):
    (tmp_path / "skyrl_test_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "choose one of" in line_of("algorithm.loss.name=test_plugin_loss")
    mine = ["algorithm.loss.name=test_plugin_loss", "plugins=[skyrl_test_plugin]"]
    try:
        cfg = load_config([*mine, "algorithm.loss.params.scale=3"])
        make_plan(cfg, 1)
        assert make_spec(cfg.algorithm, 1.0).params == {"scale": 3.0}
        assert load_config(mine).algorithm.loss.params == {"scale": 2.0}
        assert line_of(*mine, "algorithm.loss.params.scale=10").startswith(
            "algorithm.loss.params.scale=10.0: test_plugin_loss allows 0 to 9 (default 2)"
        )
    finally:
        losses.LOSSES._things.pop("test_plugin_loss", None)
