"""trainer=control: learning, resume, ranks, statistics, and what is refused before the first step."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skyrl.checkpoint.folder import latest
from skyrl.config.load import config_dir, load_config
from skyrl.planner.plan import describe, dry_run, make_plan
from skyrl.run_dir import read_metrics
from skyrl.types import StopRun, UserError

gym = pytest.importorskip("gymnasium", reason="the extra `control` is not installed")

from walk import SMALL, WALK, Stopped, Walk, engine_of  # noqa: E402

from skyrl.run import Step  # noqa: E402
from skyrl.trainers.control import control, load_policy  # noqa: E402
from skyrl.trainers.control.environments import KeyedEnv, make_env, make_envs  # noqa: E402
from skyrl.trainers.control.normalize import RunningMoments, discounted_sums  # noqa: E402
from skyrl.trainers.control.policies import make_actor_critic  # noqa: E402
from skyrl.trainers.control.rollout import ControlBatch, advantages_of, collect  # noqa: E402
from skyrl.trainers.control.train import measure, minibatches  # noqa: E402

FILES = {path.stem: path.read_text(encoding="utf-8") for path in (config_dir() / "experiment").glob("*.yaml")}
RECIPES = sorted(name for name, text in FILES.items() if re.search("^(trainer: control|control:)$", text, re.M))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Their picture at the end costs as much as all else of these runs; test_games.py has it drawn."""
    monkeypatch.setattr("skyrl.loop.write_curves", lambda *given: None)


def run(folder, *options, mode="control"):
    cfg = load_config([*SMALL, f"run.dir={folder}", *options], mode=mode)
    told = control(cfg)
    return told, read_metrics(folder / "metrics.jsonl")


def weights(folder):
    """The weights and statistics of the newest checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = latest(folder / "checkpoints").path
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in known.items()
        if isinstance(one, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return found


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name, one in a.items():
        gap = float((one.double() - b[name].double()).abs().max()) if one.numel() else 0.0
        assert gap <= tolerance, (name, gap)


def test_cartpole_is_learned(tmp_path):
    """Training episodes grow from 20 steps to more than 60 within 6,144 steps of environments."""
    _, records = run(
        tmp_path, "env=CartPole-v1", "control.n_envs=32", "control.n_steps=32", "control.minibatch_size=128",
        "control.epochs=5", "optim.lr=2e-3", "control.total_steps=6_144",
    )  # fmt: skip
    assert records[1]["reward:mean"] < 35 and records[-1]["reward:mean"] > 60
    assert sum(record.get("env_steps:sum", 0) for record in records) == 6_144


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    """Statistics, episodes under way, what a policy remembers of them, and draws: bit for bit. (Without a memory:
    test_a_step_that_a_signal_takes_back_leaves_no_trace.) The export plays on its own."""
    more = [
        *WALK, "control.squash=true", "algorithm.loss.entropy_coef=0.01", "control.policy=recurrent",
        "control.policy_options.hidden=8", "control.n_steps=10", "control.minibatch_size=20",
    ]  # fmt: skip
    _, whole = run(tmp_path / "whole", *more, "control.total_steps=120", "checkpoint.export=true")
    run(tmp_path / "parts", *more, "control.total_steps=80")
    _, parts = run(tmp_path / "parts", *more, "control.total_steps=120")
    found = weights(tmp_path / "whole")
    same(found, weights(tmp_path / "parts"))
    assert whole[-1]["grad_norm:mean"] == parts[-1]["grad_norm:mean"] > 0 and found["episodes/hidden"].abs().max() > 0
    assert float((found["statistics/observations_mean"] - 100).abs().max()) < 20  # places begin at 100
    play, env = load_policy(tmp_path / "whole" / "export"), Walk()
    action = play(env.reset(seed=1)[0])
    assert action.shape == (1,) and action.dtype == np.float32 and np.isfinite(action).all()
    with pytest.raises(UserError, match="give the folder `export` of a run"):
        load_policy(tmp_path / "nowhere")


def test_statistics_of_another_environment_are_refused():
    gym.register("skyrl-test/Other-v0", Walk, max_episode_steps=7)
    walk, other = engine_of(*WALK, "seed=2"), engine_of(*WALK, "env=skyrl-test/Other-v0")
    with pytest.raises(UserError, match="the running statistics of another environment; set control.normalize_obs"):
        other.load_state(walk.state(optimizer=True), optimizer=True)
    plain = engine_of("env=skyrl-test/Other-v0")  # without normalisation it begins with the weights
    before = [p.detach().clone() for p in plain.module.parameters()]
    plain.load_state(walk.state(optimizer=True), optimizer=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), walk.module.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), before, strict=True))


def test_advantages_are_gae_with_the_value_of_what_was_cut():
    """Against the recursion written step by step: done without a value after it, cut and end of the batch with one."""
    cfg = load_config([*SMALL, *WALK, "control.normalize_rewards=false"], mode="control")
    rng, T, places = np.random.default_rng(0), 12, [0, 3]
    done, last = np.zeros((T, 2), bool), np.zeros((T, 2))
    done[[3, 7, 11], [0, 1, 1]], last[[7, 11], [1, 0]] = True, (5.0, -2.0)  # an end, a cut, an end at the last step
    rewards, values = rng.normal(size=(T, 2)), rng.normal(size=(T, 2))
    batch = ControlBatch(*[torch.zeros(T, 2)] * 4, rewards, done, last, values=torch.from_numpy(values).flatten())
    engine = SimpleNamespace(cfg=cfg, places=places, all_sum=lambda x: x)
    found = advantages_of(engine, batch)
    wanted, gamma, lam = np.zeros((T, 2)), 0.99, 0.95
    for n in range(2):
        later = 0.0
        for t in reversed(range(T)):
            ends = done[t, n] or t == T - 1
            following = last[t, n] if ends else values[t + 1, n]
            later = rewards[t, n] + gamma * following - values[t, n] + (0.0 if ends else gamma * lam * later)
            wanted[t, n] = later
    np.testing.assert_allclose(batch.returns.view(T, 2).numpy(), wanted + values, rtol=1e-12)
    np.testing.assert_allclose(found[:, places], (wanted - wanted.mean()) / wanted.std(), rtol=1e-4)
    assert not found[:, [1, 2]].any()  # other ranks' environments


def test_minibatches_are_disjoint_and_keyed():
    parts = minibatches(1, 2, 3, 24, 6)
    assert sorted(np.concatenate(parts).tolist()) == list(range(24)) and len(parts) == 4
    again = minibatches(1, 2, 3, 24, 6)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert any((a != b).any() for a, b in zip(parts, minibatches(1, 2, 4, 24, 6), strict=True))
    whole = minibatches(1, 2, 3, 24, 12, unit=6)  # 6 steps of 4 environments: two environments in each
    assert all(len(set((part % 4).tolist())) == 2 and len(part) == 12 for part in whole)


def test_moments_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    values = rng.normal(1e4, 0.1, (300, 3))
    parts = RunningMoments((3,))
    for part in np.split(values, [7, 50, 51]):
        parts.update(part, lambda x: x)
    np.testing.assert_allclose(parts.std, values.std(0), rtol=1e-3)
    np.testing.assert_allclose(parts.mean, values.mean(0), rtol=1e-6)
    done = np.array([[False], [True], [False]])
    sums = discounted_sums(np.ones((3, 1)), done, np.array([2.0]), 0.5)
    assert sums.ravel().tolist() == [2.0, 2.0, 1.0]


def test_an_episode_follows_from_its_key_and_its_actions_alone():
    cfg = load_config([*SMALL, *WALK], mode="control")
    envs, alone = make_envs(cfg, [0, 3]), make_env(cfg, 3)
    first, _ = envs.reset()
    assert (alone.reset()[0] == first[1]).all()
    for _ in range(10):  # an episode ends after 7
        action = np.full((2, 1), 0.5, np.float32)
        seen = envs.step(action)[0]
    episode, taken = envs.call("progress")[1]
    assert episode >= 1
    back = KeyedEnv(Walk(), alone.key)
    assert (back.reset(options={"progress": {3: (episode, taken)}})[0] == seen[1]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["env=CartPole-v9"], "control.env_id=CartPole-v9: no environment of this id is registered; did you mean"),
        (["control.total_steps=9"], "control.env_id: no environment is named"),
        (["env=nowhere:Walk-v0"], "control.env_id=nowhere:Walk-v0: nowhere cannot be imported"),
        (["env=CartPole-v1", "control.minibatch_size=48"], "does not divide control.n_envs * control.n_steps"),
        (["env=CartPole-v1", "control.n_envs=1", "world=2"], "control.n_envs=1: fewer than the 2 ranks"),
        (["env=CartPole-v1", "algorithm.advantage.params.bootstrap=0"], "would count as ended"),
        (["env=CartPole-v1", "algorithm.loss.name=reinforce"], "has no ratio"),
        (["env=CartPole-v1", "algorithm.loss.name=clip_cov"], "needs selected"),
        (["env=CartPole-v1", "strategy.name=fsdp"], "whole on every rank"),
    ],
)  # fmt: skip
def test_the_plan_refuses(options, said):
    ranks = 2 if "world=2" in options else 1
    with pytest.raises(UserError) as error:
        make_plan(load_config([*SMALL, *(one for one in options if one != "world=2")], mode="control"), ranks)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["env=skyrl-test/Pair-v0"], "observations are a Dict, and a policy reads one array"),
        (["env=skyrl-test/Told-v0"], "its action space is Text"),
        ([*WALK, "control.env_kwargs.odd=broken"], "environment 0 gave an observation that is not finite"),
        ([*WALK, "control.env_kwargs.odd=raises"], "step() of environment 0 raised OSError: the motor is gone at "),
        ([*WALK, "control.env_kwargs.odd=longer"], "observed an array of shape (3,); its space says (2,)"),
        ([*WALK, "control.env_kwargs.even=1"], "control.env_kwargs={'even': 1}"),
        (["env=CartPole-v1", "control.squash=true"], "control.squash=true: the action space Discrete(2)"),
        (["env=CartPole-v1", "control.policy=mpl"], "control.policy: no policy called 'mpl'; choose one of"),
        (["env=CartPole-v1", "control.policy_options.width=3"], "control.policy_options.width: mlp has no such option"),
        (["env=CartPole-v1", "control.policy_options.activation=x"], "activation=x: choose one of: tanh"),
    ],
)  # fmt: skip
def test_a_run_refuses_before_its_first_step(options, said):
    with pytest.raises(UserError) as error:
        collect(engine_of(*options), Step(None, 0))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_evaluation_without_an_end_is_told(monkeypatch):
    monkeypatch.setattr("skyrl.trainers.control.train.ENDLESS", 3)
    engine = engine_of(*WALK, "control.max_episode_steps=9")
    run = SimpleNamespace(engine=engine, world=engine.world, cfg=engine.cfg)
    with pytest.raises(UserError, match="has not ended after 3 steps; set control.max_episode_steps"):
        measure(run)


def test_a_recipe_of_language_models_is_no_beginning():
    cfg = load_config(["trainer=control", "control.env_id=CartPole-v1"])
    with pytest.raises(UserError, match="experiment=arithmetic: is a recipe for language models"):
        make_plan(cfg, 1)


def test_a_missing_package_names_its_extra(monkeypatch):
    cfg = load_config([*SMALL, "env=CartPole-v1"], mode="control")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r"gymnasium is not installed; install the extra with .*skyrl-spmd\[control\]"):
        make_plan(cfg, 1)


def test_the_command_line_without_gymnasium_ends_in_one_line():
    """In a process of its own: this one has imported what needs it."""
    start = "import sys; sys.modules['gymnasium'] = None; from skyrl.main import run_entry; run_entry('control')"
    done = subprocess.run([sys.executable, "-c", start, "env=CartPole-v1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("skyrl: error: trainer=control: gymnasium is not installed; install the extra with")


def test_a_policy_that_does_not_fit_is_told_what_is_needed():
    import skyrl

    @skyrl.register_policy("three")
    class Three(torch.nn.Module):
        def __init__(self, observation_space, action_space):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, observations):
            return self.layer(observations)

    spaces = (gym.spaces.Box(-1, 1, (4,), np.float32), gym.spaces.Discrete(2))
    with pytest.raises(
        UserError, match=r"control.policy=three: returns \[2, 3\] for 2 observations; .* needs \[2, 2\]"
    ):
        make_actor_critic("three", {}, "", *spaces, seed=0)
    with pytest.raises(UserError, match=r"control.critic=three: returns \[2, 3\] for 2 observations, but a value is"):
        make_actor_critic("three", {}, "", spaces[0], gym.spaces.Discrete(3), seed=0)
    made = make_actor_critic("three", {}, "mlp", spaces[0], gym.spaces.Discrete(3), seed=0)
    parameters, values = made(torch.zeros(5, 4))
    assert parameters.shape == (5, 3) and values.shape == (5,) and made.initial_state(1) is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_dry_run(recipe):
    cfg = load_config(
        [f"experiment={recipe}", "dry_run=true", "run.world_size=2", *["env=CartPole-v1"] * (recipe == "control")],
        mode="control",
    )
    text = describe(cfg, dry_run(cfg, 2))
    assert "2 x" in text and cfg.control.env_id in text and cfg.run.name.startswith(recipe)


@pytest.mark.slow
def test_a_step_that_a_signal_takes_back_leaves_no_trace(tmp_path, monkeypatch):
    """Stopped in the middle of the second step's episodes, the run goes on from the first, bit for bit."""
    options = ["env=skyrl-test/Stopped-v0", *WALK[1:], "control.total_steps=384"]
    run(tmp_path / "whole", *options)
    monkeypatch.setattr(Stopped, "steps", 0)
    monkeypatch.setattr(Stopped, "at", 188)
    with pytest.raises(StopRun):
        run(tmp_path / "parts", *options)
    assert latest(tmp_path / "parts" / "checkpoints").tag == "000001"
    monkeypatch.setattr(Stopped, "at", -1)
    run(tmp_path / "parts", *options)
    same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_processes_for_environments_change_nothing(tmp_path):
    run(tmp_path / "sync", *WALK, "control.total_steps=256")
    run(tmp_path / "async", *WALK, "control.total_steps=256", "control.vectorization=async")
    same(weights(tmp_path / "sync"), weights(tmp_path / "async"))


def _on_rank(folder, options):
    control(load_config([*SMALL, *WALK, "model.dtype=float64", f"run.dir={folder}", *options], mode="control"))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["control.squash=true"],
        ["control.target_kl=0.01", "control.n_envs=5", "control.minibatch_size=40"],
        ["control.policy=recurrent", "control.minibatch_size=64"],
    ],
)
def test_ranks_change_rounding_and_nothing_else(tmp_path, more):
    from gloo import run_ranks

    options = ["control.total_steps=640", *more]
    for size in (1, 2, 3):
        run_ranks(size, _on_rank, str(tmp_path / f"{size}"), options)
    one = weights(tmp_path / "1")
    for size in (2, 3):
        same(one, weights(tmp_path / f"{size}"), 1e-9)
    records = [read_metrics(tmp_path / f"{size}" / "metrics.jsonl") for size in (1, 2)]
    assert [r["reward:mean"] for r in records[0][1:]] == pytest.approx([r["reward:mean"] for r in records[1][1:]])
