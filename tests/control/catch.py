"""A small game of pixels: a ball falls, a paddle of one pixel below catches it."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Catch(gymnasium.Env):
    """Reward 1 for a ball that is caught, -1 for one that is not; an episode is one ball, a step for each row below.

    `hidden`: the ball is seen in its first row alone, so that it has to be remembered."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, side=8, hidden=False, render_mode=None):
        self.side = side
        self.observation_space = Box(0, 255, (side, side), np.uint8)
        self.action_space = Discrete(3)
        self.hidden, self.render_mode = hidden, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(self.side)), self.side // 2
        return self.pixels(), {}

    def pixels(self):
        board = np.zeros((self.side, self.side), np.uint8)
        if self.row == 0 or not self.hidden:
            board[self.row, self.column] = 255
        board[-1, self.paddle] = 255
        return board

    def step(self, action):
        self.row += 1
        self.paddle = int(np.clip(self.paddle + int(action) - 1, 0, self.side - 1))
        over = self.row == self.side - 1
        reward = (1.0 if self.paddle == self.column else -1.0) if over else 0.0
        return self.pixels(), reward, over, False, {}

    def render(self):
        return np.repeat(np.kron(self.pixels(), np.ones((30, 30), np.uint8))[..., None], 3, -1)


gymnasium.register("Catch-v0", entry_point=Catch)
