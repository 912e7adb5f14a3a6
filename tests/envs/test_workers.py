"""Calls in worker processes: what hangs, dies or waits there costs its own episode at most, and says so."""

import dataclasses
import functools
import json
import os
import re
import signal
import threading

import numpy as np
import pytest
import troubled  # noqa: F401  (registers what is played here)
import yaml
from small import make_engine

from skyrl.config.load import load_config, to_dict
from skyrl.config.schema import EnvConfig
from skyrl.data import make_prompts
from skyrl.distributed.collectives import MetricSums
from skyrl.envs.base import ENVIRONMENTS, Environment, StepResult, register_environment
from skyrl.envs.rewards import REWARDS, register_reward
from skyrl.launch.play import play as play_again
from skyrl.rollout import RolloutConfig, episode_metrics, rollout
from skyrl.types import Prompt, SamplingParams, UserError
from skyrl.workers import pool
from skyrl.workers.calls import LocalCalls, decode, encode

HERE = dict(name="troubled", on_error="mask", max_turns=9, worker_memory_gib=1.0)


@pytest.fixture(scope="module", autouse=True)
def no_pool_is_left():
    yield
    pool.shut_pool()


def config(**options):
    return EnvConfig(**{**HERE, **options})


def prompt(number, name="troubled"):
    return Prompt(
        f"{name}/train/{number}", name, [{"role": "user", "content": "?"}], {"source": f"rows.jsonl:{number}"}
    )


def play(texts, cfg, plugins=("troubled",), first=0):
    """Each list of texts is an episode, by turns; returns the last outcome of each, all rewards, and the counts."""
    turns, outcomes, rewards, counts = {}, {}, {}, {}
    with pool.open_calls(cfg, plugins) as calls:
        for key in range(first, first + len(texts)):
            calls.open(key, prompt(key - first, cfg.name), seed=key - first)
        while calls.waiting:
            for answer in calls.poll(wait=True):
                key, number = answer.key, answer.key - first
                outcomes[number] = answer.outcome
                for name, value in answer.counts.items():
                    name = name.removeprefix("workers/").removesuffix(":sum")
                    counts.setdefault(number, {}).setdefault(name, 0.0)
                    counts[number][name] += value
                turn = turns[key] = turns.get(key, -1) + 1
                if turn and not answer.outcome.invalid:
                    rewards.setdefault(number, []).append(answer.outcome.value.reward)
                if answer.outcome.invalid or turn == len(texts[number]):
                    calls.close(key)
                else:
                    calls.step(key, texts[number][turn])
        while calls._played if isinstance(calls, pool.WorkerPool) else ():
            calls.poll(wait=True)
    return outcomes, rewards, counts


BAD = {
    "raise": ("error", "environment troubled.step, prompt troubled/train/{n} (rows.jsonl:{n}): raised ValueError: not"),
    "none": ("error", "returned None as reward, wanted a number"),
    "nan": ("error", "returned nan as reward, wanted a finite number"),
    "stdin": ("error", "raised EOFError"),
    "sysexit": ("error", "raised SystemExit: 0 at "),
    "object": ("error", "returned what JSON cannot hold (Object of type object"),
    "other": ("error", "as content of entry 0, wanted a string"),
    "metric": ("error", "metric 'a': it must be a name that ends in one of"),
    "exit": ("infrastructure", "prompt troubled/train/{n} (rows.jsonl:{n}): its worker process ended itself with exit"),
    "segfault": ("infrastructure", "was ended by SIGSEGV at "),
    "memory": ("infrastructure", "env.worker_memory_gib=1"),
    "closed": ("infrastructure", "its worker process "),
    "busy": ("infrastructure", "raised RetryableError: the server is busy at "),
}


def test_what_goes_wrong_in_a_worker_is_named_and_costs_nobody_else():
    texts = [["1", word, "done"] for word in BAD] + [["1", "2", str(n), "done"] for n in range(6)]
    outcomes, rewards, counts = play(texts, config())
    for number, (word, (kind, said)) in enumerate(BAD.items()):
        outcome = outcomes[number]
        assert (outcome.kind, outcome.value) == (kind, None) and "\n" not in outcome.invalid, (word, outcome)
        assert said.format(n=number) in outcome.invalid, (word, outcome)
        assert counts.get(number, {}).get("masked", 0.0) == (kind == "infrastructure"), word
    for number in range(len(BAD), len(texts)):
        assert rewards[number] == [1.0, 2.0, float(number - len(BAD)), 1.0] and outcomes[number].value.done
    assert "troubled.py:" in outcomes[list(BAD).index("segfault")].invalid
    assert counts[list(BAD).index("exit")]["died"] == 2.0 and counts[list(BAD).index("busy")]["retries"] == 2.0


def test_what_a_call_leaves_behind_is_put_right(capfd):
    before = os.getcwd()
    pool.shut_pool()  # the next one writes to the stderr of this test
    words = ["fork", "cwd", "print", "torch", "twice"]
    outcomes, rewards, counts = play([[word, "done"] for word in words], config(), first=100)
    assert all(outcome.value.done for outcome in outcomes.values())
    assert rewards[words.index("torch")][0] == 0.0, "a worker has torch, which nothing asked for"
    assert [rewards[number][0] for number in range(5)] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert counts == {words.index("twice"): {"retries": 2.0}} and os.getcwd() == before
    assert "environment troubled.step, prompt troubled/train/1 (rows.jsonl:1): changed the working directory" in (
        capfd.readouterr().err
    )


def test_a_hang_ends_its_worker_and_the_others_in_it_are_played_again(monkeypatch):
    monkeypatch.setattr(pool, "KILL_SECONDS", 1.0)  # a busy machine interrupts late
    texts = [["1", "2", "3", "4", "done"], ["1", "random", "2", "3", "4", "done"], ["1", "hang"], ["sleep"]]
    outcomes, rewards, counts = play(texts, config(workers=1, timeout_seconds=1.5), first=200)
    assert outcomes[2].kind == outcomes[3].kind == "late"
    assert "troubled.py:" in outcomes[2].invalid and "cannot be interrupted" in outcomes[2].invalid
    assert (
        "cannot be" not in outcomes[3].invalid and "took longer than env.timeout_seconds=1.5 at " in outcomes[3].invalid
    )
    assert counts[2] == {"killed": 1.0}
    assert rewards[0] == [1.0, 2.0, 3.0, 4.0, 1.0] and outcomes[0].value.observation[0]["content"] == "turn 5"
    assert counts[0] == {"replays": 1.0}
    if counts[1].get("replays"):  # it had got as far as its random turn when the worker ended
        assert outcomes[1].kind == "infrastructure" and "gave something else at turn 2" in outcomes[1].invalid


def test_a_worker_that_leaks_is_replaced():
    texts = [["leak"], ["leak"], ["leak"], ["leak"], ["leak"], ["leak"]]
    outcomes, rewards, _ = play(texts, config(workers=1, worker_memory_gib=0.5), first=300)
    assert all(reward == [1.0] for reward in rewards.values()), outcomes
    with pytest.raises(UserError, match="env.worker_memory_gib=0.01: .* are used at the start; .* env.workers=0"):
        play([["1"]], config(worker_memory_gib=0.01), first=400)


def test_stop_raises_the_one_line_and_only_for_what_is_somebodys_fault():
    outcomes, _, _ = play([["1"], ["exit"]], config(on_error="stop"), first=500)
    assert outcomes[0].value.reward == 1.0 and outcomes[1].kind == "infrastructure"
    with pytest.raises(UserError, match=r"environment troubled.step, prompt troubled/train/0 .*ValueError.* fix"):
        play([["raise"]], config(on_error="stop"), first=600)
    assert not pool._POOL, "the next rollout has a new one"


def test_async_methods_share_a_worker_up_to_the_limit(monkeypatch):
    cfg = config(name="waits", workers=1, options={"wanted": 6}, max_concurrent=6)
    _, rewards, _ = play([["go"]] * 15, cfg, first=700)
    assert max(reward for (reward,) in rewards.values()) == 6.0
    monkeypatch.setattr(pool, "KILL_SECONDS", 1.0)  # a busy machine interrupts late
    texts = [["quick", "quick", "done"], ["forever"], ["raise"], ["quick", "block"]]
    cfg = config(name="waits", workers=1, timeout_seconds=1.5)
    outcomes, rewards, counts = play(texts, cfg, first=900)
    assert outcomes[1].kind == "late" and "troubled.py:" in outcomes[1].invalid
    assert "raised SystemExit: 3" in outcomes[2].invalid
    assert outcomes[3].kind == "late" and counts[3]["killed"] == 1.0
    assert outcomes[0].value.done


def test_flaky_classes_are_called_again_in_process_as_well(monkeypatch):
    monkeypatch.setattr("skyrl.workers.calls.BACKOFF_SECONDS", 0.001)
    for workers in (0, 1):
        outcomes, _, counts = play([["x"], ["x"]], config(name="flaky", workers=workers), first=1000)
        assert all(outcome.value.reward == 1.0 for outcome in outcomes.values())
        assert counts == {0: {"retries": 1.0}, 1: {"retries": 1.0}}
    outcomes, _, counts = play([["busy"], ["twice"]], config(workers=0), first=1100)
    assert outcomes[0].kind == "infrastructure" and "in each of 3 attempts" in outcomes[0].invalid
    assert counts[0]["retries"] == 2.0 and outcomes[1].value.reward == 1.0


def test_async_methods_are_awaited_in_process_as_well():
    cfg = config(name="waits", workers=0, timeout_seconds=0.3)
    outcomes, rewards, _ = play([["go", "forever"], ["go", "done"]], cfg, first=1200)
    assert rewards == {0: [1.0], 1: [1.0, 1.0]} and outcomes[0].kind == "late" and outcomes[1].value.done


def test_classes_and_rewards_of_a_script_go_by_value():
    factor = 3.0

    class Scripted(Environment):
        def step(self, text):
            return StepResult(REWARDS.get("counted")(text, self.prompt), True)

    try:
        register_environment("scripted")(Scripted)
        register_reward("counted")(lambda text, prompt: factor * len(text))
        _, rewards, _ = play([["ab"]], config(name="scripted"), plugins=(), first=1300)
        assert rewards == {0: [6.0]}
        Scripted.lock = threading.Lock()
        with pytest.raises(UserError, match="environment scripted: cannot be sent to a worker process .*env.workers=0"):
            play([["ab"]], config(name="scripted", max_turns=2), plugins=(), first=1500)
    finally:
        del ENVIRONMENTS._things["scripted"], REWARDS._things["counted"]


def test_our_own_stay_in_the_rank_and_a_users_reward_does_not():
    assert isinstance(pool.open_calls(config(name="guess_number")), LocalCalls)
    assert isinstance(pool.open_calls(config(name="single_turn", options={"reward": "math"})), LocalCalls)
    for name in ("arithmetic", "gsm8k", "gsm8k_expressions"):
        assert isinstance(pool.open_calls(config(name=name)), LocalCalls)
        cls = ENVIRONMENTS.get(name)
        assert not cls.plays_in_process({"reward": "troubled"})
        assert not type("Mine", (cls,), {}).plays_in_process({}), "a subclass says it for itself"
    assert isinstance(pool.open_calls(config(name="single_turn", options={"reward": "troubled"})), pool.WorkerPool)


def test_what_a_worker_cannot_import_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "starts_threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    _, rewards, _ = play([["2"]], config(), plugins=("troubled", "starts_threads"), first=1700)
    assert rewards == {0: [2.0]}, "each worker imports for itself what a fork of the template would lack"
    with pytest.raises(UserError, match=r"plugins=\[absent\]: no module 'absent'; .*env.workers=0"):
        play([["2"]], config(), plugins=("absent",), first=1800)


def test_torch_in_workers_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brings_torch.py").write_text("import torch\n")
    for first, plugins in (
        (1900, ("troubled", "brings_torch")),
        (1950, ("troubled",)),
        (1970, ("troubled", "brings_torch")),
    ):
        assert play([["2"]], config(), plugins=plugins, first=first)[1] == {0: [2.0]}
    (line,) = [one.getMessage() for one in caplog.records if "torch" in one.getMessage()]
    assert re.fullmatch(
        r"environment troubled: imports torch, for which the process that workers are forked from pays on every rank: "
        r"\d+\.\d s at the start and \d+ MiB; import it in the function that needs it, .*",
        line,
    )


def test_stop_requests_are_heard_while_calls_are_out():
    with pool.open_calls(config(workers=2), ("troubled",)) as calls:
        for key in range(2000, 2010):
            calls.open(key, prompt(key), seed=0)
        asked = 0
        while asked < 10:
            for answer in calls.poll(wait=True):
                calls.step(answer.key, "sleep" if answer.key < 2002 else "1")
                asked += 1
        calls.poll(wait=True)
        calls.drop()
        assert calls.waiting == 0
    _, rewards, _ = play([["5"]], config(workers=2), first=2100)
    assert rewards == {0: [5.0]}
    pids = [worker.pid for worker in pool._POOL[0][1]._workers]
    template = pool._POOL[0][1]._template._process
    os.kill(template.pid, signal.SIGKILL)  # and with it its workers
    template.wait()
    _, rewards, _ = play([["6"], ["7"]], config(workers=2), first=2200)
    assert rewards == {0: [6.0], 1: [7.0]}
    assert not set(pids) & {worker.pid for worker in pool._POOL[0][1]._workers}


# ---- with the sampler


@pytest.fixture(scope="module")
def engine():
    return make_engine("auto", "float32", "model.tiny.vocab_size=104", row_tokens=96)


def episodes(engine, env, prompts, **more):
    params = SamplingParams(6)
    with engine.sampling() as sampler:
        found = rollout(
            sampler, prompts, RolloutConfig(env, params, 3, 96, (1, "train"), ("troubled",), **more), engine.chat
        )
    return [episode for group in found for episode in group]


def bits(episode):
    turns = [
        (t.context.tolist(), t.sample.tokens.tolist(), t.sample.logprobs.tobytes(), t.reward, t.text)
        for t in episode.turns
    ]
    return episode.prompt.uid, episode.index, episode.seed, episode.reward, episode.stop, episode.metrics, turns


def test_delays_and_the_number_of_workers_change_no_bit(engine):
    prompts = [(number, prompt(number, "letters_slowly")) for number in range(6)]
    found = {}
    for workers in (0, 1, 3):
        env = EnvConfig("letters_slowly", {"delay": 0.01 if workers else 0.0}, max_turns=3, workers=workers)
        found[workers] = [bits(episode) for episode in episodes(engine, env, prompts)]
    assert found[0] == found[1] == found[3]
    assert len({seed for _, _, seed, *_ in found[0]}) == 18 and all(len(one[-1]) == 3 for one in found[0])


def test_masked_episodes_and_what_they_cost_are_counted(engine):
    env = EnvConfig("single_turn", {"reward": "troubled"}, on_error="stop", timeout_seconds=20.0)
    prompts = [(number, prompt(number, "single_turn")) for number in range(2)]
    chat, engine.chat.read = engine.chat.read, lambda tokens, last: "exit" if tokens[0] % 2 else "1"
    try:
        found = episodes(engine, env, prompts)
    finally:
        engine.chat.read = chat
    died = [episode for episode in found if episode.invalid]
    assert "environment single_turn.step (reward troubled), prompt single_turn/train/" in died[0].invalid
    assert 0 < len(died) < 6 and all(np.isfinite(episode.reward) for episode in found)
    sums = MetricSums()
    episode_metrics(sums, [found], prefix="")
    metrics = sums.merged()
    assert metrics["invalid:sum"] == metrics["workers/masked:sum"] == len(died) and metrics["reward:mean"] == 1.0


def test_an_episode_has_a_budget_of_tokens(engine):
    env = EnvConfig("letters_slowly", max_turns=3, workers=0, max_episode_tokens=8)
    found = episodes(engine, env, [(number, prompt(number, "letters_slowly")) for number in range(3)])
    for episode in found:
        drawn = [len(turn.sample.tokens) for turn in episode.turns]
        assert sum(drawn) <= 8 and (episode.stop == "length" or len(drawn) == 3)
    assert any(sum(len(turn.sample.tokens) for turn in episode.turns) == 8 for episode in found)


def test_play_shows_an_episode_of_a_run_again(tmp_path, capsys, monkeypatch):
    cfg = load_config([f"run.dir={tmp_path}", "experiment=guess_number"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    (tmp_path / "rollouts").mkdir()
    secret = make_prompts(cfg, "train")[1].extra["secret"]
    turns = [{"read": "0", "reward": 0.0}, {"read": f"It is {secret}", "reward": 0.5}]
    episode = {"uid": "guess_number/train/1", "index": 2, "seed": 7, "turns": turns}
    (tmp_path / "rollouts" / "000003-r0.jsonl").write_text(json.dumps(episode) + "\n")
    play_again([str(tmp_path), "--uid", "guess_number/train/1", "--index", "2"])
    said = capsys.readouterr().out
    assert "000003\n" in said and "seed 7" in said and "--- user\nhigher\n" in said
    assert "--- reward 1 (in the run 0.5), correct:mean 1, done\n======== reward 1\n" in said
    play_again([str(tmp_path), "--uid", "guess_number/train/1", "--answer", "none"])
    assert "--- turn 1: the model\nnone\n--- reward 0\n--- user\nnot a number\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="no dump of guess_number/train/1 sample 0; skyrl-tx rollouts .* --answer TEXT"):
        play_again([str(tmp_path), "--uid", "guess_number/train/1"])
    with pytest.raises(UserError, match="has no prompt guess_number/train/x any more"):
        play_again([str(tmp_path), "--uid", "guess_number/train/x", "--answer", "1"])


@pytest.mark.parametrize("replaced", ["decorated", "in the instance", "partial"])
def test_a_method_is_checked_whatever_stands_in_its_place(replaced):
    class Scripted(Environment):
        def __init__(self):
            if replaced == "in the instance":
                self.step = lambda text: StepResult(None, True)

        if replaced == "decorated":
            step = lambda self, text: StepResult(None, True)  # noqa: E731
        elif replaced == "partial":
            step = functools.partial(lambda text: StepResult(None, True))

    @dataclasses.dataclass
    class Own(StepResult):
        note: str = "of its own"

    register_environment("scripted")(Scripted)
    try:
        for workers in (0, 1):
            outcomes, _, _ = play([["ab"]], config(name="scripted", workers=workers), plugins=())
            assert "environment scripted.step, prompt scripted/train/0" in outcomes[0].invalid
            assert "returned None as reward, wanted a number" in outcomes[0].invalid
        assert decode("step", encode(Own(np.float64(1.0), True))) == StepResult(1.0, True)
    finally:
        del ENVIRONMENTS._things["scripted"]
