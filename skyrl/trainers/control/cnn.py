"""The policy `cnn`: convolutions over images, with policy and value on one trunk.

Frames of 64 pixels and more go through the network of Mnih et al. 2015, Human-level control through deep
reinforcement learning (Nature 518). Its first kernel of 8 pixels would leave nothing of smaller ones, so these go by
kernels of 3 pixels at stride 2 until 6 pixels or fewer are left on the shorter side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skyrl.trainers.control.distributions import parameters_of
from skyrl.trainers.control.policies import initialised, register_policy
from skyrl.types import UserError

NATURE = ((1, 8, 4), (2, 4, 2), (2, 3, 1))  # channels in those of the first layer, kernel, stride
SMALLEST, LEFT = 64, 6  # pixels on a side: below which the small network is taken, and what it leaves


class ImageEncoder(nn.Module):
    """Images to `features` numbers each. uint8 is divided by 255; floats are taken as they are.

    `width`: channels of the first layer. `shape` of one observation: [H, W], [C, H, W], [H, W, C], or a stack of such
    ([N, C, H, W] or [N, H, W, C]), whose frames count as channels. The axis of channels is the shorter of the first and
    the last. Raises UserError for another number of axes.
    """

    def __init__(self, shape: tuple[int, ...], features: int = 512, width: int = 32) -> None:
        super().__init__()
        if not 2 <= len(shape) <= 4:
            raise UserError(
                f"control.policy: cnn reads images, these observations have the shape {shape}; choose mlp or recurrent"
            )
        frame = torch.Size(shape[1:] if len(shape) == 4 else shape)
        self.channels_last = len(frame) == 3 and frame[2] < frame[0]
        sides = frame[:2] if self.channels_last else frame[-2:]
        channels = int(torch.Size(shape).numel() // sides.numel())
        self.size = (channels, *sides)
        layers: list[nn.Module] = []
        for times, kernel, stride in self._plan(min(self.size[1:])):
            pad = int(min(self.size[1:]) < SMALLEST)
            layers += [initialised(nn.Conv2d(channels, times * width, kernel, stride, pad)), nn.ReLU()]
            channels = times * width
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *self.size)).shape[1]
        self.project = nn.Sequential(initialised(nn.Linear(flat, features)), nn.ReLU())

    @staticmethod
    def _plan(side: int) -> tuple[tuple[int, int, int], ...]:
        if side >= SMALLEST:
            return NATURE
        layers = 1
        while (side := (side + 1) // 2) > LEFT:
            layers += 1
        return ((1, 3, 2),) * layers

    def forward(self, observations: Tensor) -> Tensor:
        """[B, *shape] to [B, features]."""
        if self.channels_last:
            observations = observations.movedim(-1, -3)
        images = observations.reshape(-1, *self.size)
        dtype = next(self.project.parameters()).dtype
        images = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        return self.project(self.convolutions(images))


@register_policy("cnn")
class CNN(nn.Module):
    """Action parameters [B, P] and values [B] from one trunk of convolutions, over which is a layer of `features`.
    `channels`: of the first convolution. Raises UserError for observations that are no images."""

    def __init__(self, observation_space: Any, action_space: Any, *, features: int = 512, channels: int = 32) -> None:
        super().__init__()
        self.encoder = ImageEncoder(tuple(observation_space.shape), features, channels)
        self.policy = initialised(nn.Linear(features, parameters_of(action_space)), 0.01)
        self.value = initialised(nn.Linear(features, 1), 1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """[B, *shape] to ([B, P], [B])."""
        features = self.encoder(observations)
        return self.policy(features), self.value(features)[:, 0]
