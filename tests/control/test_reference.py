"""An update beside stable-baselines3's own code: the same batch, weights and order of steps, by both."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="the extra control is not installed")
sb3 = pytest.importorskip("stable_baselines3", reason="the extra benchmarks is not installed")

from walk import WALK, engine_of  # noqa: E402

from skyrl.planner.plan import make_plan  # noqa: E402
from skyrl.run import Step  # noqa: E402
from skyrl.trainers.control import train  # noqa: E402
from skyrl.trainers.control.normalize import CLIP  # noqa: E402
from skyrl.trainers.control.rollout import collect, score  # noqa: E402

T, N = 64, 4


def layers_of(*modules):
    return [one for module in modules for one in module.modules() if isinstance(one, torch.nn.Linear)]


def flat(layers, log_std, what):
    parts = [getattr(layer, name) for layer in layers for name in ("weight", "bias")] + [log_std]
    return torch.cat([what(part).flatten().clone() for part in parts])


@pytest.mark.parametrize(("size", "epochs"), [(T * N, 1), (64, 3)])
def test_an_update_is_the_one_of_stable_baselines3(monkeypatch, size, epochs):
    """Advantages with ends, limits and the end of the batch; losses, clipping of the gradient, Adam. The deviation of
    a minibatch's advantages is that of a population here and of a sample there: sqrt(n / (n - 1)) lies between."""
    engine = engine_of(*WALK, f"control.n_steps={T}", f"control.minibatch_size={size}", f"control.epochs={epochs}")
    cfg, norm = engine.cfg, 1e9 if epochs == 1 else 0.5
    object.__setattr__(cfg.optim, "grad_clip_norm", norm)
    env = sb3.common.env_util.make_vec_env(lambda: train.make_env(cfg, 0), N)
    options = {"batch_size": size, "n_epochs": epochs, "max_grad_norm": norm, "seed": 1, "device": "cpu"}
    theirs = sb3.PPO("MlpPolicy", env, n_steps=T, gae_lambda=0.95, **options)
    theirs.set_logger(sb3.common.logger.Logger(None, []))
    net, policy = theirs.policy.mlp_extractor, theirs.policy
    of_theirs = layers_of(net.policy_net, policy.action_net, net.value_net, policy.value_net)
    of_ours = layers_of(engine.module.policy, engine.module.critic)
    with torch.no_grad():
        policy.log_std.copy_(engine.module.log_std)
        for a, b in zip(of_theirs, of_ours, strict=True):
            a.weight.copy_(b.weight), a.bias.copy_(b.bias)

    step = Step(None, 0)
    batch = collect(engine, step)
    score(engine, batch)
    advantages = train.advantages_of(engine, batch)
    rewards = np.clip(batch.rewards / engine.return_moments.std, -CLIP, CLIP)
    after = np.where(batch.done, 0.99 * batch.last, 0.0)  # theirs are added to the reward where a limit cuts
    assert 0 < np.count_nonzero(after) < np.count_nonzero(batch.done) < T * N / 4
    theirs.rollout_buffer.reset()
    for t in range(T):
        row = (batch.values.view(T, N)[t], batch.logprobs.view(T, N)[t])
        seen, acted = batch.observations[t].numpy(), batch.actions[t].numpy()
        theirs.rollout_buffer.add(seen, acted, rewards[t] + after[t], batch.starts[t].numpy(), *row)
    last = torch.from_numpy(np.where(batch.done[-1], 0.0, batch.last[-1])).float()
    theirs.rollout_buffer.compute_returns_and_advantage(last, batch.done[-1])
    np.testing.assert_allclose(theirs.rollout_buffer.returns, batch.returns.view(T, N), rtol=1e-4, atol=1e-5)

    order = [np.concatenate(train.minibatches(cfg.seed, 0, epoch, T * N, size)) for epoch in range(epochs)]
    turns = iter([picked % N * T + picked // N for picked in order])  # theirs are numbered environment by environment
    monkeypatch.setattr(np.random, "permutation", lambda count: next(turns))
    before = flat(of_ours, engine.module.log_std, lambda p: p.detach())
    theirs.train()
    monkeypatch.setattr(train, "score", lambda *given: None)
    monkeypatch.setattr(train, "advantages_of", lambda *given: advantages)
    gradients, optim_step = [], engine.models["policy"].optim_step

    def kept(adam):
        gradients.append(flat(of_ours, engine.module.log_std, lambda p: p.grad))
        return optim_step(adam)

    monkeypatch.setattr(engine.models["policy"], "optim_step", kept)
    step.commit = step.log = lambda *given: None
    train.update(SimpleNamespace(cfg=cfg, world=engine.world, plan=make_plan(cfg, 1)), step, engine, batch)
    ours, found = (
        flat(of, std, lambda p: p.detach())
        for of, std in ((of_ours, engine.module.log_std), (of_theirs, policy.log_std))
    )
    assert len(gradients) == epochs * T * N // size
    assert (ours - found).norm() < 5e-3 * (ours - before).norm()
    if epochs == 1:  # the gradient itself, which Adam would hide a factor of
        mine, wanted = gradients[0], flat(of_theirs, policy.log_std, lambda p: p.grad)
        of_critic = torch.cat(
            [torch.full((p.numel(),), i >= 3) for i, layer in enumerate(of_ours) for p in (layer.weight, layer.bias)]
            + [torch.tensor([False])]
        )
        scale = torch.where(of_critic, 1.0, ((size - 1) / size) ** 0.5)
        assert (mine * scale - wanted).norm() < 1e-4 * wanted.norm() and wanted.norm() > 0.01
