"""An episode as an animated GIF in the run folder. `skyrl-tx report` shows it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.files import disk_reason, write_atomic
from skyrl.types import UserError

SIDE, FRAMES = 160, 150  # pixels of the longer side, frames: some hundred kB
SHORTEST = 20  # milliseconds of a frame; viewers show shorter ones at a tenth of the speed


def render_problem(env: Any) -> str:
    """Why `env` cannot be recorded, as the end of a sentence; "" where it can. Resets it and draws one frame."""
    modes = env.metadata.get("render_modes", [])
    if env.render_mode != "rgb_array":
        return f"it draws no frames (render_mode {env.render_mode}; it has: {', '.join(map(str, modes)) or 'none'})"
    try:
        env.reset(seed=0)
        frame = env.render()
    except Exception as error:  # whatever a renderer of somebody else's does without a screen or a driver
        return f"drawing it raised {type(error).__name__}: {' '.join(str(error).split())}"
    return "" if np.ndim(frame) == 3 else f"its render() returned {type(frame).__name__}, not a picture [H, W, 3]"


def record_episode(env: Any, act: Callable[[Any], Any], path: Path, *, max_steps: int = 27_000) -> float:
    """Plays one episode of `env` (made with render_mode="rgb_array"), writes it to `path` as a GIF and returns its
    return.

    `act`: from an observation to an action; it keeps the state of a policy that has one. A long episode is shown by
    every second, fourth, ... frame, so that the file has at most FRAMES and lasts as long as the episode.
    Raises UserError when the file cannot be written.
    """
    observation, _ = env.reset()
    frames, every, total, over = [shrink(env.render())], 1, 0.0, False
    for step in range(1, max_steps + 1):
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        total, over = total + float(reward), terminated or truncated
        if step % every == 0 or over:
            frames.append(shrink(env.render()))
        if len(frames) > FRAMES:
            frames, every = frames[::2], 2 * every
        if over:
            break
    fps = float(env.metadata.get("render_fps") or 30)
    data = io.BytesIO()
    milliseconds = max(SHORTEST, round(1000 * every / fps))
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data.getvalue())
    except OSError as problem:
        raise UserError(f"{path}: cannot be written ({disk_reason(problem, path)})") from None
    return total


def shrink(frame: Any) -> Any:
    """A rendered frame [H, W, 3] as a picture of at most 64 colours and SIDE pixels on its longer side."""
    from PIL import Image  # comes with matplotlib

    picture = Image.fromarray(np.asarray(frame, np.uint8))
    picture.thumbnail((SIDE, SIDE))
    return picture.quantize(64)
