"""What a person sees: aligned plain lines, one live line, time left."""

import io
import os
import pty
import subprocess
import sys
import threading

from skyrl.tracking.console import ConsoleSink, duration


def record(step, phase="rl", **extra):
    metrics = {"loss:sum": -0.01234, "reward:mean": 0.5, "entropy:mean": 1.25, "logprob_gap:mean": 2.5e-7}
    metrics |= {"length:mean": 12.5, "cut_by_length:mean": 0.25, "approx_kl:mean": 1e-4, "grad_norm:mean": 0.314}
    speed = {"speed/tokens_per_second:mean": 4321.7, "time/step_seconds:sum": 3.0}
    return {"step": step, "phase": phase, **metrics, **speed, **extra}


def test_plain_lines_are_aligned_under_one_header():
    stream = io.StringIO()
    sink = ConsoleSink({"rl": 100}, stream=stream, live=False)
    sink.write({"step": 0, "phase": "rl", "eval/accuracy:mean": 0.25, "time/step_seconds:sum": 9.0})
    for step in range(1, 51):
        sink.write(record(step, **({"eval/accuracy:mean": 0.75} if step % 25 == 0 else {})))
    sink.say("saved")
    sink.close()
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    header, zero, *rows, said = lines
    titles = "step reward held-out entropy length trunc KL grad norm gap tokens/s left"
    assert header.split() == titles.split() and said == "saved" and "loss" not in header
    assert sum("reward" in line for line in lines) == 1
    assert len({len(line) for line in lines[:-1]}) == 1
    assert zero.split() == ["rl", "0/100", "-", "0.250", *"-------", "-"]
    # fast steps are not all printed, evaluations always are
    assert [row.split()[1] for row in rows] == ["25/100", "50/100"]
    numbers = ["0.500", "0.750", "1.250", "12.5", "25%", "1.0e-04", "0.31", "2.5e-07", "4,322", "2m", "30s"]
    assert rows[-1].split() == ["rl", "50/100", *numbers]


def test_accuracy_stays_between_evaluations_and_the_end_of_a_phase_is_shown():
    stream = io.StringIO()
    sink = ConsoleSink({"warmup": 2, "rl": 5}, stream=stream, live=False)
    for step in (1, 2):
        sink.write(record(step, "warmup", **({"eval/accuracy:mean": 0.4} if step == 2 else {})))
    for step in (3, 4, 5):
        sink.write(record(step))
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert [row[1] for row in rows if "/" in row[1]] == ["1/2", "2/2", "5/5"]
    assert rows[-1][:2] == ["rl", "5/5"] and rows[-1][3] == "0.400" and rows[-1][-1] == "0s"
    heads = [row for row in rows if row[0] == "step"]
    assert len(heads) == 2 and "loss" in heads[0] and "loss" not in heads[1]


def test_progress_is_seldom_a_line_and_often_the_live_one(monkeypatch):
    for live, shown in ((False, ["  sampling: 3 of 4"]), (True, ["sampling 3/4"])):
        stream, now = io.StringIO(), [100.0]
        monkeypatch.setattr("skyrl.tracking.console.time.monotonic", lambda now=now: now[0])
        sink = ConsoleSink({"rl": 9}, stream=stream, live=live)
        sink.begin("collect")
        for done in (1, 2):
            sink.progress("sampling", done, 4)
        now[0] += 20
        sink.progress("sampling", 3, 4)
        sink.progress("sampling", 4, 4)
        text = stream.getvalue()
        assert all(part in text for part in shown) and "4/4" not in text and "4 of 4" not in text


def test_a_narrow_terminal_shows_the_columns_that_matter(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    ConsoleSink({"rl": 100}, stream=stream, live=True).write(record(1))
    header = stream.getvalue().split("\n")[0]
    assert all(title in header for title in ("reward", "held-out", "entropy", "length", "trunc", "left"))
    assert "KL" not in header and len(header) <= 84  # with the codes that clear the line


def test_held_out_is_what_an_evaluation_has():
    """Where nothing is scored: the divergence from the teacher, or the loss on held-out rows."""
    for key in ("eval/divergence:mean", "eval/nll:mean"):
        stream = io.StringIO()
        ConsoleSink({"distill": 9}, stream=stream, live=False).write({"step": 9, "phase": "distill", key: 1.25})
        header, row = stream.getvalue().splitlines()
        assert row.split()[header.split().index("held-out") + 1] == "1.250"


def test_live_line_on_a_real_terminal():
    """In a pseudo-terminal: each step rewrites the line, evaluations stay, nothing wraps."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from skyrl.config.schema import BatchConfig, RunConfig\n"
        "from skyrl.tracking import make_tracker\n"
        "tracker = make_tracker(RunConfig(batch=BatchConfig(num_steps=4)), Path(sys.argv[1]), 0)\n"
        "for step in range(1, 5):\n"
        "    with tracker.span('collect'): pass\n"
        "    tracker.add({'reward:mean': step / 10})\n"
        "    if step == 2: tracker.add({'eval/accuracy:mean': 0.5})\n"
        "    tracker.finish_step(step, 'rl')\n"
        "tracker.say('a message')\n"
        "tracker.close()\n"
    )
    import tempfile

    leader, follower = pty.openpty()
    read = bytearray()

    def drain():
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other end is closed
                return
            read.extend(data)

    with tempfile.TemporaryDirectory() as folder:
        reader = threading.Thread(target=drain)
        reader.start()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        done = subprocess.run([sys.executable, "-c", script, folder], stdout=follower, env=env, timeout=60)
        os.close(follower)
        reader.join(10)
        os.close(leader)
    assert done.returncode == 0
    shown = screen(read.decode())
    assert all(len(line) < 80 for line in shown)
    assert shown[0].split()[:2] == ["step", "reward"]
    assert [line.split()[1] for line in shown if "/4" in line] == ["2/4", "4/4"]
    assert shown[-1] == "a message"
    assert "collect ..." in read.decode() and "rl 1/4" in read.decode()


def screen(text):
    """What a terminal shows after `text`, which uses carriage return, newline and erase-to-end only."""
    lines, column = [""], 0
    index = 0
    while index < len(text):
        if text.startswith("\x1b[K", index):
            lines[-1] = lines[-1][:column]
            index += 3
            continue
        letter = text[index]
        index += 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            lines.append("")
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + letter + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_durations():
    assert [duration(s) for s in (None, float("nan"), 0, 59.4, 60, 3599, 7800)] == [
        "-",
        "-",
        "0s",
        "59s",
        "1m 00s",
        "59m 59s",
        "2h 10m",
    ]
