"""What the dashboard's tests share: a run as the real writers leave it, and an app that lets everyone in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from starlette.testclient import TestClient

from skyrl.config.load import load_config, to_dict
from skyrl.config.schema import DashboardConfig
from skyrl.dashboard.app import create_app
from skyrl.dashboard.index import RunIndex
from skyrl.run_dir import RunFolder
from skyrl.tracking.jsonl import JsonlSink
from skyrl.tracking.rollouts import write_rollouts, write_trained
from skyrl.types import Datum, Episode, Prompt, Sample, Turn

HTML = "<script>alert('x')</script><img src=x onerror=alert(1)>"
PAGE = {"accept": "text/html,*/*"}


@dataclass
class Anyone:
    """skyrl.dashboard.auth.Viewer, as far as pages read it."""

    name: str = "me"
    role: str = "admin"
    run: str | None = None


class OpenDoor:
    """skyrl.dashboard.auth.Auth without the login, which has tests of its own."""

    def __init__(self, viewer: Anyone | None = None) -> None:
        self.viewer, self.routes = viewer or Anyone(), []

    def csrf_token(self, request):
        return "token"

    def is_logged_in(self, request):
        return True

    def middleware(self, app):
        async def guarded(scope, receive, send):
            if scope["type"] == "http":
                scope.setdefault("state", {})["viewer"] = self.viewer
            await app(scope, receive, send)

        return guarded


class Letters:
    def decode(self, token_ids, **options):
        return "".join(chr(token) for token in token_ids)


def played(uid: str, index: int, answer: str, reward: float, *, asked: str = "1+1=", stop: str = "stop", **metrics):
    """An episode of one turn, a token a letter."""
    tokens = np.array([ord(letter) for letter in answer])
    logprobs = np.linspace(-0.1, -3.0, len(tokens)).astype(np.float32)
    turn = Turn(np.array([ord(letter) for letter in asked]), Sample(uid, tokens, logprobs, stop, 1), reward)
    return Episode(Prompt(uid, "toy", [], {"answer": "2"}), index, [turn], reward, stop=stop, metrics=metrics)


def trained_row(episode: Episode, advantage: float) -> Datum:
    """What the loop trains on of an episode of one turn."""
    (turn,) = episode.turns
    ids, first = np.concatenate([turn.context, turn.sample.tokens]), len(turn.context) - 1
    weights = (np.arange(len(ids) - 1) >= first).astype(np.float64)
    name = f"{episode.prompt.uid}/{episode.index}/0"
    return Datum(ids[:-1], ids[1:], weights, advantages=advantage * weights, name=name)


def record(step: int, value: float = 0.5, **more) -> dict:
    """A line of metrics.jsonl."""
    return {"step": step, "phase": "rl", "reward:mean": value, "time/step_seconds:sum": 2.0, **more}


def make_run(runs: Path, name: str, *options: str, steps: int = 5, slope: float = 0.1) -> Path:
    """A run of `steps` steps whose reward grows by `slope`, with an evaluation in the last one."""
    cfg = load_config([f"run.dir={runs / name}", *options])
    folder = RunFolder(runs / name, 0)
    folder.open(to_dict(cfg), command=["skyrl-tx", *options])
    sink = JsonlSink(folder.metrics)
    for step in range(1, steps + 1):
        tested = {"eval/accuracy:mean": 0.25, "eval/episodes:sum": 100.0} if step == steps else {}
        sink.write(record(step, slope * step, **{"sampled_tokens:sum": 100.0, "reward_std:mean": 0.1}, **tested))
    sink.close()
    folder.close()
    return folder.path


def add_rollouts(run: Path) -> None:
    """Two training steps and an evaluation, with answers that are markup, cut, paid wrongly and repetitive."""
    right = played("p<1>", 0, "2", 1.0)
    right.metrics = {"correct:mean": 1.0}
    group = [right, played("p<1>", 1, HTML, 0.0, asked=HTML)]
    other = [played("p2", 0, "ab" * 300, 0.0, stop="length"), played("p2", 1, "four words are here", 3.0, correct=0.0)]
    for episode in other:
        episode.metrics = {"correct:mean": 0.0}
    for name in ("000001", "000005", "eval-000005"):
        write_rollouts(run / "rollouts", name, [group, other], Letters(), rank=0)
    write_trained(
        run / "rollouts",
        5,
        [(trained_row(one, sign), None) for one, sign in zip(group, (1.0, -1.0), strict=True)],
        rank=0,
    )


def add_system(run: Path, steps: int = 5) -> None:
    """Two ranks, as tracking/system.py writes them; the clock jumps back an hour after the second step."""
    (run / "system").mkdir()
    for rank in range(2):
        lines = []
        for step in range(1, steps + 1):
            at = 1e9 + 10 * step - (3600 if step > 2 else 0)
            spans = [["generation", at, at + 4], ["train", at + 4, at + 9]]
            line = {"step": step, "phase": "rl", "time": at + 9, "spans": spans, "cpu": 90.0, "memory_gib": 1.5}
            lines.append(line | {"interfaces": {"eth0": [1, 2]}, "gpus": [{"util": 50 + rank, "memory_gib": 3.0}]})
        (run / "system" / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{to")


def client_of(index: RunIndex, viewer: Anyone | None = None, **settings) -> TestClient:
    """A browser that is let in, over runs that are read to their ends."""
    app, _ = create_app(DashboardConfig(**settings), OpenDoor(viewer), index)
    for entry in index._scan():
        index._refresh(entry)
    return TestClient(app, headers=PAGE)
