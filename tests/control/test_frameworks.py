"""The examples of Keras on torch and TensorFlow over DLPack, with the real packages."""

import importlib

import numpy as np
import pytest
import torch

from skyrl.types import AdamParams, UserError

spaces = pytest.importorskip("gymnasium.spaces", reason="the extra control is not installed")

from skyrl.distributed.init import World  # noqa: E402
from skyrl.strategies.replicated import ReplicatedStrategy  # noqa: E402
from skyrl.trainers.control.policies import make_actor_critic, register_policy  # noqa: E402

SEEN, ACTS = spaces.Box(-1, 1, (4,)), spaces.Discrete(3)


def learns_a_rule(name, **options):
    """Cross-entropy on one rule, through the strategy that training uses; returns losses and the module."""
    module = make_actor_critic(name, options, "", SEEN, ACTS, seed=0)
    strategy = ReplicatedStrategy(module, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    torch.manual_seed(0)
    observations, losses = torch.randn(64, 4), []
    right = observations[:, :3].argmax(-1, keepdim=True).float()
    for _ in range(60):
        loss = -module.distribution(module(observations)[0]).log_prob(right).mean()
        losses.append(loss.item())
        strategy.backward(loss)
        strategy.optim_step(AdamParams(lr=1e-2))
    return losses, module


def test_keras_on_torch(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="the extra keras is not installed")
    importlib.import_module("examples.keras_policy")
    losses, module = learns_a_rule("keras_mlp", units=4)
    assert isinstance(module.policy.call.__self__, keras.Model) and losses[0] == pytest.approx(np.log(3), abs=0.02)
    assert losses[-1] < 0.5
    # as in a process that has made other models before: dense_10 is sorted before dense_9
    keras.utils.clear_session()
    for _ in range(9):
        keras.layers.Dense(3)
    again = make_actor_critic("keras_mlp", {"units": 4}, "", SEEN, ACTS, seed=1)
    assert {"dense_9", "dense_10"} <= {layer.name for layer in again.policy.call.__self__.layers}
    again.load_state_dict(module.state_dict())
    given = torch.randn(5, 4)
    # not to the bit: MKL's product depends on where its inputs lie in memory
    torch.testing.assert_close(again(given), module(given), rtol=1e-6, atol=1e-6)


def test_keras_layers_that_keep_more_than_weights_are_refused(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="the extra keras is not installed")
    register_policy("forgets")(
        lambda seen, acts: keras.Sequential(
            [keras.Input(seen.shape), keras.layers.Dropout(0.1), keras.layers.Dense(3)], name="m"
        )
    )
    with pytest.raises(UserError, match="^control.policy=forgets: keeps .*seed_generator_state beside trainable"):
        make_actor_critic("forgets", {}, "mlp", SEEN, ACTS, seed=0)


def test_tensorflow_over_dlpack():
    tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed (262 MB): pip install tensorflow-cpu")
    importlib.import_module("examples.tensorflow_policy")
    losses, module = learns_a_rule("tensorflow_mlp", units=16)
    assert losses[-1] < 0.3 < losses[0]
    # the tape's gradient against torch's own of the same function
    given, weights = torch.randn(5, 4), [one.detach().clone().requires_grad_() for one in module.policy.weights]
    ours = module.policy(given)
    module.policy.zero_grad(set_to_none=False)
    (ours * torch.arange(15.0).view(5, 3)).sum().backward()
    x = given
    for number in range(0, len(weights), 2):
        x = x @ weights[number] + weights[number + 1]
        x = x.tanh() if number + 2 < len(weights) else x
    (x * torch.arange(15.0).view(5, 3)).sum().backward()
    assert torch.allclose(x, ours, atol=1e-5)
    for mine, reference in zip(module.policy.weights, weights, strict=True):
        assert torch.allclose(mine.grad, reference.grad, rtol=1e-4, atol=1e-4)
    assert all(isinstance(one, tf.Variable) for one in module.policy.model.trainable_variables)
