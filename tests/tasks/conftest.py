"""Tasks as a run has them: prompts of rows or made, and one episode played with given answers."""

import asyncio
import inspect
import itertools
import json
import os
from pathlib import Path

import pytest

import skyrl.tasks  # noqa: F401
from skyrl.config.schema import DataConfig, EnvConfig, RunConfig
from skyrl.data import make_prompts
from skyrl.envs import make_environment


@pytest.fixture
def rows(tmp_path):
    """Prompts of an environment: of the rows that are given, else made."""

    def read(env, *given, split="train", seed=0, options=None):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        data = DataConfig(path=str(path) if given else "", eval_path=str(path) if given else "")
        return make_prompts(RunConfig(env=EnvConfig(name=env, options=options or {}), data=data, seed=seed), split)

    return read


@pytest.fixture
def play():
    """The last step's result of an episode, and all that was said to the model. Answers are texts, or one function of
    what was said last."""

    def episode(prompt, *answers, max_turns=None, seed=0, **options):
        player = answers[0] if callable(answers[0]) else None
        cfg = EnvConfig(name=prompt.env, options=options, max_turns=max_turns or len(answers))
        env = make_environment(cfg)
        takes_seed = "seed" in inspect.signature(env.reset).parameters
        opening = env.reset(prompt, seed) if takes_seed else env.reset(prompt)
        heard = [opening[-1]["content"]]
        for answer in itertools.repeat(player) if player else answers:
            result = env.step(player(heard[-1]) if player else answer)
            result = asyncio.run(result) if inspect.iscoroutine(result) else result
            if result.done:
                return result, heard
            heard.append(result.observation[0]["content"])
        raise AssertionError("the episode goes on")

    return episode


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder with GSM8K's train.jsonl and test.jsonl, or the test is skipped."""
    root = Path(os.environ.get("SKYRL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data") / "gsm8k"
    if not (root / "train.jsonl").is_file() or not (root / "test.jsonl").is_file():
        pytest.skip("GSM8K not here: set SKYRL_TEST_DATA to the folder that holds gsm8k/train.jsonl and test.jsonl")
    return root
