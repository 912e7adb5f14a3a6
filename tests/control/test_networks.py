"""The policies for images and with a state, as modules: shapes, layouts, and the replay of sequences."""

import numpy as np
import pytest
import torch
from torch import nn

from skyrl.types import UserError

spaces = pytest.importorskip("gymnasium.spaces", reason="the extra control is not installed")

from skyrl.trainers.control.cnn import CNN, ImageEncoder  # noqa: E402
from skyrl.trainers.control.recurrent import Recurrent, replay  # noqa: E402


def images(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


def test_cnn_at_84_pixels_is_the_network_of_the_paper():
    policy = CNN(images(4, 84, 84), spaces.Discrete(6))
    convolutions = sum(p.numel() for p in policy.encoder.convolutions.parameters())
    assert convolutions == (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64
    assert sum(p.numel() for p in policy.encoder.project.parameters()) == (7 * 7 * 64 + 1) * 512
    parameters, values = policy(torch.zeros(3, 4, 84, 84, dtype=torch.uint8))
    assert parameters.shape == (3, 6) and values.shape == (3,) and parameters.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((8, 8), (1, 8, 8)),
        ((4, 42, 42), (4, 42, 42)),
        ((42, 36, 3), (3, 42, 36)),
        ((4, 84, 84, 3), (12, 84, 84)),
        ((4, 3, 84, 84), (12, 84, 84)),
        ((1, 5, 64), (1, 5, 64)),
    ],
)
def test_layouts_of_images(shape, size):
    policy = CNN(images(*shape), spaces.MultiBinary(5), features=16)
    assert policy.encoder.size == size
    assert policy(torch.randint(0, 256, (2, *shape), dtype=torch.uint8))[0].shape == (2, 5)


def test_axes_and_scale_of_pixels_change_nothing():
    torch.manual_seed(0)
    last, first = ImageEncoder((12, 10, 3), 8), ImageEncoder((3, 12, 10), 8)
    first.load_state_dict(last.state_dict())
    pixels = torch.randint(0, 256, (2, 12, 10, 3), dtype=torch.uint8)
    found = last(pixels)
    assert torch.equal(found, first(pixels.permute(0, 3, 1, 2)))
    assert torch.allclose(found, last(pixels.float() / 255)) and found.abs().max() > 0


def test_vectors_are_no_images():
    with pytest.raises(UserError, match=r"cnn reads images, these observations have the shape \(4,\); choose mlp"):
        CNN(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
    Recurrent(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))


class Running(nn.Module):
    """A foreign policy with a state and no `sequence`: its state is a sum, and does not begin at 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def initial_state(self, n):
        return torch.full((n, 1), 7.0)

    def forward(self, observations, state):
        state = state + self.scale * observations.sum(1, keepdim=True)
        return torch.cat([state, -state], 1), state[:, 0], state


@pytest.mark.parametrize("kind", ["vectors", "images", "foreign"])
def test_replay_is_what_sampling_computed(kind):
    torch.manual_seed(1)
    space = images(8, 8) if kind == "images" else spaces.Box(-1, 1, (3,))
    policy = Running() if kind == "foreign" else Recurrent(space, spaces.Discrete(2), hidden=8)
    steps, count = 5, 3
    seen = torch.randint(0, 256, (steps, count, 8, 8), dtype=torch.uint8) if kind == "images" else None
    seen = torch.randn(steps, count, 3) if seen is None else seen
    starts = torch.zeros(steps, count, dtype=torch.bool)
    starts[0, 0] = starts[3, 1] = True
    first = torch.randn(count, policy.initial_state(1).shape[1])
    state, wanted = first, []
    for t in range(steps):
        state = torch.stack([policy.initial_state(1)[0] if starts[t, n] else state[n] for n in range(count)])
        parameters, values, state = policy(seen[t], state)
        wanted.append((parameters, values))
    parameters, values = replay(policy, seen, first, starts)
    assert torch.allclose(parameters, torch.stack([p for p, _ in wanted]), atol=1e-6)
    assert torch.allclose(values, torch.stack([v for _, v in wanted]), atol=1e-6)


def test_no_gradient_goes_over_the_border_of_an_episode():
    policy = Recurrent(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), hidden=8)
    seen = torch.randn(4, 2, 3, requires_grad=True)
    starts = torch.zeros(4, 2, dtype=torch.bool)
    starts[2, 1] = True
    _, values = replay(policy, seen, policy.initial_state(2), starts)
    values[3].sum().backward()
    reached = seen.grad.abs().sum(-1) > 0
    assert reached.T.tolist() == [[True, True, True, True], [False, False, True, True]]
