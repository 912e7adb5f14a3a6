"""The guard against environments that raise, hang or return nonsense. The hangs are real ones."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from skyrl.config.load import load_config
from skyrl.config.schema import EnvConfig
from skyrl.config.validation import check as check_config
from skyrl.envs import clock
from skyrl.envs.base import Environment, StepResult
from skyrl.envs.guard import Guard
from skyrl.types import Prompt, UserError

REPO = Path(__file__).parents[2]
PROMPT = Prompt("play/train/7", "play", [{"role": "user", "content": "?"}], {"source": "rows.jsonl:8"})


class Play(Environment):
    """Does in step() what it was made with."""

    name = "play"

    def __init__(self, action):
        self.action = action

    def step(self, text):
        result = self.action(text)
        return result if isinstance(result, StepResult) or result is None else StepResult(result, True)


def guard(on_error="mask", timeout_seconds=0.3):
    return Guard(EnvConfig(name="play", timeout_seconds=timeout_seconds, on_error=on_error))


def invalid(action, timeout_seconds=5.0):
    outcome = guard(timeout_seconds=timeout_seconds).call(Play(action).step, "x", prompt=PROMPT)
    assert outcome.value is None and "\n" not in outcome.invalid
    return outcome.invalid


def loop(text):
    while True:
        pass


def test_good_result_passes_and_becomes_floats():
    import numpy as np

    result = StepResult(np.float32(0.5), np.bool_(True), metrics={"correct:mean": True})
    value = guard().call(Play(lambda text: result).step, "x", prompt=PROMPT).value
    assert (value.reward, value.done, value.metrics) == (0.5, True, {"correct:mean": 1.0})
    assert type(value.reward) is float and type(value.done) is bool and type(value.metrics["correct:mean"]) is float


@pytest.mark.parametrize(
    "make, value",
    [
        (lambda np, torch: np.float16(0.5), 0.5),
        (lambda np, torch: np.longdouble("0.5"), 0.5),
        (lambda np, torch: np.float32(10.1), 10.1),
        (lambda np, torch: np.array(0.3, np.float16), 0.3),
        (lambda np, torch: torch.tensor(0.7), 0.7),
        (lambda np, torch: torch.tensor(-0.1, dtype=torch.bfloat16), -0.1),
        (lambda np, torch: np.float32(16777217), 16777216.0),
        (lambda np, torch: np.float64(0.1) + np.float64(0.2), 0.1 + 0.2),
        (lambda np, torch: np.int8(-1), -1.0),
        (lambda np, torch: np.bool_(True), 1.0),
        (lambda np, torch: np.array(0.5), 0.5),
        (lambda np, torch: torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (lambda np, torch: torch.tensor(True), 1.0),
        (lambda np, torch: torch.tensor(3), 3.0),
        (lambda np, torch: Decimal("0.25"), 0.25),
        (lambda np, torch: Fraction(1, 4), 0.25),
        (lambda np, torch: True, 1.0),
        (lambda np, torch: 3, 3.0),
    ],
)
def test_scalars_of_all_kinds_are_numbers(make, value):
    import numpy as np
    import torch

    given = make(np, torch)
    result = guard().call(Play(lambda text: StepResult(given, True, [], {"a:sum": given})).step, "x", prompt=PROMPT)
    assert result.value is not None, result.invalid
    assert (result.value.reward, result.value.metrics) == (value, {"a:sum": value})
    assert type(result.value.reward) is type(result.value.metrics["a:sum"]) is float


@pytest.mark.parametrize("done", [True, 0 == 0, "numpy", "torch"])
def test_done_of_numpy_and_torch(done):
    import numpy as np
    import torch

    given = {"numpy": np.bool_(True), "torch": torch.tensor(True)}.get(done, done)
    assert guard().call(Play(lambda text: StepResult(0.0, given)).step, "x", prompt=PROMPT).value.done is True


def test_what_only_looks_like_a_number_is_refused():
    import numpy as np
    import torch

    nonsense = [np.array([1.0]), torch.tensor([1.0]), np.str_("1"), np.complex64(1), np.datetime64("2020-01-01"), None]
    nonsense += [Decimal("NaN"), Decimal("sNaN"), Decimal("1e999"), np.float32("inf"), torch.tensor(float("nan"))]
    nonsense += [1.1e30, -1e300, 10**31, np.float32(2e30), Decimal("-1e31"), torch.tensor(1e300, dtype=torch.float64)]
    nonsense += [Fraction(10**400), torch.empty((), device="meta"), b"1"]
    for reward in nonsense:
        assert "as reward, wanted a" in invalid(lambda text, reward=reward: StepResult(reward, True)), reward


def test_stop_raises_one_line_that_names_everything():
    def bad(text):
        return 1 / 0

    with pytest.raises(UserError) as caught:
        env = Play(bad)
        env.reward_name = "mine"
        guard("stop").call(env.step, "x", prompt=PROMPT)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("environment play.step", "(reward mine)", "play/train/7", "rows.jsonl:8", "ZeroDivisionError"):
        assert part in line
    here = bad.__code__
    assert f"{here.co_filename}:{here.co_firstlineno + 1}" in line and "env.on_error=mask" in line
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_place_is_the_users_line_not_the_librarys():
    import json

    def bad(text):
        return json.loads("{")

    assert f"test_guard.py:{bad.__code__.co_firstlineno + 1}" in invalid(bad)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), "1", [1.0], 10**400, 1j])
def test_reward_that_is_no_finite_number_is_no_score(reward):
    assert "as reward, wanted a" in invalid(lambda text: StepResult(reward, True))


def test_other_bad_results():
    assert "wanted a StepResult" in invalid(lambda text: None)
    assert "as done" in invalid(lambda text: StepResult(0.0, "no"))
    assert "as observation" in invalid(lambda text: StepResult(0.0, False))
    assert "as observation" in invalid(lambda text: StepResult(0.0, False, [{"role": "user", "content": 3}]))
    assert "role 'uesr'" in invalid(lambda text: StepResult(0.0, False, [{"role": "uesr", "content": "3"}]))
    for name in ("correct", ":mean", 3):
        assert "ends in one of" in invalid(lambda text, name=name: StepResult(0.0, True, metrics={name: 1.0}))
    assert "metric 'a:sum'" in invalid(lambda text: StepResult(0.0, True, metrics={"a:sum": float("nan")}))
    assert "raised SystemExit" in invalid(lambda text: sys.exit(0))
    assert "raised RecursionError" in invalid(lambda text: (lambda f: f(f))(lambda f: f(f)))
    assert "raised ValueError: two lines" in invalid(lambda text: int([].append(1) or "", 10) if 0 else _raise())


def _raise():
    raise ValueError("two\nlines")


def test_reset_must_give_messages():
    class Silent(Environment):
        def reset(self, prompt):
            return []

    outcome = guard().call(Silent().reset, PROMPT, prompt=PROMPT)
    assert "Silent.reset" in outcome.invalid and "at least one message" in outcome.invalid
    assert guard().call(Environment().reset, PROMPT, prompt=PROMPT).value == PROMPT.messages
    assert guard().call(Environment().close, prompt=PROMPT).invalid == ""


def catastrophic_regex(text):
    import re

    re.match(r"(a+)+$", "a" * 40 + "b")


@pytest.mark.parametrize(
    "hang", [loop, lambda text: time.sleep(60), catastrophic_regex, lambda text: threading.Event().wait()]
)
def test_hang_is_interrupted(hang):
    start = time.monotonic()
    assert "took longer than env.timeout_seconds=0.3 at " in invalid(hang, timeout_seconds=0.3)
    assert 0.25 < time.monotonic() - start < 3.0


def test_interrupt_is_not_swallowed_by_except_exception_and_late_returns_fail():
    def stubborn(text):
        try:
            time.sleep(60)
        except Exception:
            return 1.0

    def deaf(text):
        try:
            time.sleep(60)
        except BaseException:
            return 1.0

    assert "took longer" in invalid(stubborn, 0.3)
    assert "took longer" in invalid(deaf, 0.3)


def test_late_result_off_the_main_thread_fails():
    found = []
    thread = threading.Thread(target=lambda: found.append(invalid(lambda text: time.sleep(0.3), 0.1)))
    thread.start()
    thread.join()
    assert "took longer than env.timeout_seconds=0.1, 0.3 s" in found[0]


def test_handler_and_running_timer_are_restored():
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    mine = signal.getsignal(signal.SIGALRM)
    old = signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.monotonic()
    try:
        invalid(loop, 0.2)
        guard().call(Play(lambda text: 1.0).step, "x", prompt=PROMPT)
        assert signal.getsignal(signal.SIGALRM) is mine and not fired
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.35
        while not fired and time.monotonic() < start + 5:
            time.sleep(0.01)
        assert 0.45 < fired[0] - start < 1.5
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)
    assert invalid(loop, 0.2)  # and again, after everything


def test_no_alarm_is_left_behind():
    signal_before, timer = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        invalid(loop, 0.1)
        assert signal.getsignal(signal.SIGALRM) is signal_before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)


def cleared_alarm():
    """As math-verify and timeout decorators do it."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def alarm_that_raises():
    def rings(*_):
        raise TimeoutError("the verifier's own")

    before = signal.signal(signal.SIGALRM, rings)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except TimeoutError:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)


ALARMS = [
    cleared_alarm,
    alarm_that_raises,
    lambda: signal.setitimer(signal.ITIMER_REAL, 0.0),
    lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
    lambda: (signal.signal(signal.SIGALRM, lambda *_: None), signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)),
    lambda: (signal.signal(signal.SIGALRM, lambda *_: None), signal.alarm(60)),
]


@pytest.mark.parametrize("own", ALARMS)
@pytest.mark.parametrize("hang", [loop, catastrophic_regex, lambda text: time.sleep(60)])
def test_a_verifier_with_an_alarm_of_its_own_does_not_disarm_the_deadline(own, hang):
    before, timer = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0.0)

    def verifier(text):
        own()
        hang(text)

    try:
        start = time.monotonic()
        assert "took longer than env.timeout_seconds=0.2 at " in invalid(verifier, 0.2)
        assert time.monotonic() - start < 2.5
        assert signal.getsignal(signal.SIGALRM) is before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # nothing rings in the middle of training
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_an_alarm_of_a_verifiers_own_is_said_once(caplog):
    class Alarms(Play):
        name = "alarms"

    def leaves(text):
        signal.alarm(60)
        return 1.0

    one = guard(timeout_seconds=20.0)
    for _ in range(2):
        assert one.call(Alarms(leaves).step, "x", prompt=PROMPT).value.reward == 1.0
        assert one.call(Play(lambda text: 1.0).step, "x", prompt=PROMPT).value.reward == 1.0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "environment alarms.step: sets an alarm" in lines[0] and "cleared" in lines[0]


def test_keyboard_interrupt_passes():
    def press(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard().call(Play(press).step, "x", prompt=PROMPT)


def test_interrupts_at_every_moment_lose_nothing():
    """Calls that last just about as long as the deadline: a result or a time-out, never a stray interrupt."""
    tight = guard(timeout_seconds=0.002)
    outcomes = {True: 0, False: 0}

    def busy(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return 1.0

    for i in range(300):
        env = Play(lambda text, i=i: busy(0.0017 + i % 30 * 2e-5))
        outcomes[bool(tight.call(env.step, "x", prompt=PROMPT).invalid)] += 1
    time.sleep(0.01)
    assert outcomes[True] > 0 and sum(outcomes.values()) == 300


def test_overhead_is_microseconds():
    env, cheap = Play(lambda text: 1.0), guard(timeout_seconds=20.0)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(500):
            cheap.call(env.step, "x", prompt=PROMPT)
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 200e-6  # about 9e-6 on a quiet machine; the bound only catches a thread or a process per call


@pytest.mark.parametrize("option", ["env.timeout_seconds=0", "env.timeout_seconds=-1", "env.on_error=ignore"])
def test_bad_settings_are_refused(option):
    with pytest.raises(UserError, match=option):
        check_config(load_config(["model=tiny", option]))


def start(body, **constants):
    """A Python process that plays one step of an environment with this body of step(); quick nets."""
    script = """
        import collections, ctypes, itertools, os, signal, sys, threading, time
        import skyrl.envs.guard as g
        from skyrl.api import *
        from skyrl.config.schema import EnvConfig
        {constants}
        class Stuck(Environment):
            name = "stuck"
            def step(self, text):
                {body}
        def play():
            messages = [{{"role": "user", "content": "?"}}]
            prompt = Prompt("stuck/train/3", "stuck", messages, {{"source": "rows.jsonl:4"}})
            guard = g.Guard(EnvConfig(timeout_seconds=0.3, on_error="mask"))
            print(guard.call(Stuck().step, "x", prompt=prompt))
            guard.rest()
        {call}
    """
    call = constants.pop("call", "play()")
    lines = "; ".join(f"g.{key} = {value}" for key, value in constants.items()) or "pass"
    code = textwrap.dedent(script).format(body=body, constants=lines, call=call)
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_watchdog_ends_the_process_with_one_line():
    """Signals blocked for the thread, as C code does it: the interrupt cannot arrive. The real 5 s of grace."""
    begin = time.monotonic()
    process = start("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF]); time.sleep(60)")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 70 and out == ""
    assert 5.0 < time.monotonic() - begin < 25
    assert err.count("\n") == 1 and "environment stuck.step, prompt stuck/train/3 (rows.jsonl:4): hangs" in err


def test_watchdog_off_the_main_thread():
    call = "t = threading.Thread(target=play); t.start(); t.join()"
    process = start("time.sleep(60)", GRACE_SECONDS=0.5, call=call)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 70 and err.count("\n") == 1 and "stuck/train/3" in err


def test_watchdog_works_in_a_forked_child():
    call = (
        "g.Guard(EnvConfig()).call(len, '', prompt=None); pid = os.fork(); "
        "play() if pid == 0 else sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    body = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF]); time.sleep(60)"
    process = start(body, GRACE_SECONDS=0.5, call=call)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 70 and "stuck/train/3" in err


def test_code_that_never_lets_go_of_the_interpreter_ends_the_process():
    process = start("collections.deque(itertools.repeat(None), maxlen=0)", LAST_RESORT_SECONDS=1.0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGVTALRM and "in step" in err and "Fatal Python error" not in err


def test_last_resort_is_off_between_batches():
    """A process that is busy with other things after its batch must not be ended."""
    call = "play(); collections.deque(itertools.repeat(None, 4 * 10**8), maxlen=0); time.sleep(1); print('alive')"
    process = start("return StepResult(1.0, True)", LAST_RESORT_SECONDS=0.4, call=call)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("alive\n"), err


@pytest.mark.parametrize("where", ["play()", "thread = threading.Thread(target=play); thread.start(); thread.join()"])
def test_a_pause_of_the_process_is_no_overlong_call(where):
    """scontrol suspend, SIGSTOP, a debugger: none of the nets counts the time for which the process stood still."""
    nets = {"GRACE_SECONDS": 0.5, "LAST_RESORT_SECONDS": 1.0}
    process = start("print('in', flush=True); time.sleep(0.1); return StepResult(1.0, True)", call=where, **nets)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "reward=1.0" in out and "invalid=''" in out, err


def test_the_clock_leaves_pauses_out(monkeypatch):
    before = clock.now()
    at, _, paused = clock._turn
    monkeypatch.setattr(clock, "_turn", (at - 1000, clock._waits(), paused))  # as if the last turn were long ago
    assert clock.now() < before  # a thread that asks before the clock's own has had its turn
    time.sleep(3 * clock.TICK_SECONDS)
    assert clock._turn[2] - paused == pytest.approx(1000, abs=2)
    assert time.monotonic() - clock.now() == pytest.approx(clock._turn[2], abs=1)
    monkeypatch.setattr(clock, "_turn", (at - 1000, clock._waits() - 1100 * clock.WAITS, paused))
    assert clock.now() == pytest.approx(
        time.monotonic() - paused, abs=1
    )  # a thread asked for the interpreter: it counts


def test_code_that_waits_with_the_interpreter_locked_is_no_pause():
    """It uses no processor either, but our threads go on asking for the interpreter."""
    process = start("ctypes.PyDLL(None).usleep(3_000_000); return StepResult(1.0, True)")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "took longer than env.timeout_seconds=0.3" in out, (out, err)
