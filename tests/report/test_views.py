"""skyrl-tx show, runs, rollouts, top, report and compare over run folders, whole and damaged ones."""

import fcntl
import html
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from skyrl import cli
from skyrl.report import show
from skyrl.report.charts import braille, cut, printable, sparkline, thin
from skyrl.report.compare import compare_folders, compare_runs
from skyrl.report.page import LARGEST, page
from skyrl.report.top import ENTER, LEAVE, LiveRun, frame
from skyrl.run_dir.reader import RunReader
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert('&')</script>\x1b[31m\u202e"


def record(step, phase="rl", **more):
    keys = {"reward:mean": 0.1 * step, "entropy:mean": 2.0 / step, "time/step_seconds:sum": 2.0 + step % 2}
    keys |= {"time/collect_seconds:sum": 1.5, "time/train_seconds:sum": 0.5, "speed/tokens_per_second:mean": 90.0}
    return {"step": step, "phase": phase, **keys, "sampled_tokens:sum": 7.0, **more}


def episode(uid="a", index=0, text="7<eos>", **more):
    turn = {"context_text": "3+4=", "text": text, "context": [1, 2], "tokens": [5, 6], "logprobs": [-0.5, -0.25]}
    turn |= {"reward": 1.0, "stop": "stop", "version": 0, "read": text}
    return {
        "uid": uid,
        "index": index,
        "expected": 7,
        "reward": 1.0,
        "stop": "stop",
        "invalid": "",
        "turns": [turn],
        **more,
    }


def make(folder, steps=10, *, options=None, episodes=None, records=None, seed=1):
    """A run folder as a run leaves it."""
    (folder / "rollouts").mkdir(parents=True)
    config = {"seed": seed, "experiment": "mine", "model": {"path": "tiny"}, "env": {"name": "toy"}}
    config |= {"batch": {"num_steps": 10}, "warmup": {"num_steps": 0}, "optim": {"lr": 1e-4, **(options or {})}}
    config["algorithm"] = {"advantage": {"name": "grpo"}, "loss": {"name": "ppo"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    start = {"command": ["/x/bin/skyrl-tx", "hydra/job_logging=none", "-m", "optim.lr=1e-4", "run.name=one"]}
    (folder / "versions.json").write_text(
        json.dumps([start | {"started": "2026-11-30", "host": "h", "skyrl": "0.1.0"}])
    )
    records = [record(n) for n in range(1, steps + 1)] if records is None else records
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    lines = episodes if episodes is not None else [episode(index=n) for n in range(3)]
    (folder / "rollouts" / "000010-r0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return RunReader(folder)


def said(folder, name, text):
    one = {"name": name, "step": 3, "text": text, "remedy": "do this"}
    (folder / "advisories.jsonl").write_text(json.dumps(one) + "\n")


def call(capsys, *args):
    cli._call(list(map(str, args)))
    return capsys.readouterr().out


# ---- charts


def test_characters_of_curves():
    assert sparkline([(n, n) for n in range(8)]) == "▁▂▃▄▅▆▇█" and sparkline([]) == "" and sparkline([(1, 5)]) == "▁"
    assert braille([(0, 0.0), (1, 1.0)], 1, 1) == ["\u2869"] or len(braille([(0, 0.0), (1, 1.0)], 1, 1)[0]) == 1
    rising = braille([(n, n) for n in range(100)], 10, 3)
    assert [len(line) for line in rising] == [10, 10, 10]
    assert rising[0][:5] == "\u2800" * 5 and rising[2][-5:] == "\u2800" * 5 and rising[0][-1] != "\u2800"
    assert len(braille([(3, 1.0)], 10, 2)) == 2  # one point, and one value
    assert (
        thin([(n, n) for n in range(1000)], 10)[0] == (49.5, 49.5) and len(thin([(n, 1) for n in range(99)], 10)) == 10
    )


def test_text_that_a_terminal_shows_and_does_not_obey():
    assert printable(EVIL + "\n\t\x9b2J\r") == "<script>alert('&')</script>\\x1b[31m\\u202e\n\t\\x9b2J\\r"
    assert printable("naïve 漢字 😀") == "naïve 漢字 😀"
    assert [cut("漢字漢字", n) for n in (0, 1, 3, 8)] == ["", "…", "漢…", "漢字漢字"] and cut("a\nb\tc", 9) == "a b c"


# ---- show, runs, rollouts


def test_show_says_what_it_is_and_what_to_do_next(tmp_path, capsys):
    reader = make(tmp_path / "one", 5)
    (tmp_path / "one" / "checkpoints" / "000004").mkdir(parents=True)
    out = call(capsys, "show", reader.path)
    assert "unfinished, rl step 5 of 10" in out and "0.1 -> 0.5" in out and "2026-11-30 on h, start 1" in out
    assert "skyrl-tx train optim.lr=1e-4 run.name=one   (goes on from checkpoint 000004)" in out
    found = json.loads(call(capsys, "show", reader.path, "--json"))
    assert (found["step"], found["total"], found["results"]["sampled_tokens"]) == (5, 10, 35)
    assert found["rollouts"] == ["000010"] and found["speed"]["step_seconds"] == pytest.approx(2.6)
    (tmp_path / "one" / "crash-20261130-000000").mkdir()
    assert "first see" in call(capsys, "show", reader.path)
    (tmp_path / "one" / "result.json").write_text("{}")
    said(tmp_path / "one", "all_truncated", EVIL)
    out = call(capsys, "show", reader.path)
    assert f"skyrl-tx report {reader.path}" in out and "\x1b" not in out and "all_truncated" in out


@pytest.mark.parametrize("command", ["show", "top", "report", "replay", "rollouts", "play", "trace", "profile"])
def test_no_run_and_damaged_metrics_are_one_line(command, tmp_path):
    more = ["--uid", "x"] if command == "play" else []
    with pytest.raises(UserError, match=f"^{command}: no run folder .*nowhere here"):
        cli._call([command, str(tmp_path / "nowhere"), *more])
    with pytest.raises(UserError, match=f"^{command}: .* is no run: it has neither"):
        cli._call([command, str(tmp_path), *more])
    make(tmp_path / "bad", records=[]).path.joinpath("metrics.jsonl").write_text(json.dumps(record(1)) + "\nnonsense\n")
    if command in ("show", "top", "report", "replay"):
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a record of metrics"):
            cli._call([command, str(tmp_path / "bad")])


def test_a_run_without_a_step_and_one_with_a_torn_line(tmp_path, capsys):
    reader = make(tmp_path / "empty", records=[])
    assert "unfinished, no step 0" in call(capsys, "show", reader.path)
    assert "no step has ended yet" in call(capsys, "top", reader.path, "--once")
    assert "No step has ended yet" in page(reader)
    for path in reader.path.glob("*.*"):
        path.unlink()
    (reader.path / "config.yaml").write_text("{")
    assert "no step 0" in call(capsys, "show", reader.path)
    torn = make(tmp_path / "torn", 3)
    with open(torn.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward:me')
    assert json.loads(call(capsys, "show", torn.path, "--json"))["step"] == 3


def test_runs_and_rollouts_for_programs(tmp_path, capsys):
    make(tmp_path / "good", 4)
    make(tmp_path / "bad", records=[]).path.joinpath("metrics.jsonl").write_text("nonsense\n")
    found = {one["name"]: one for one in json.loads(call(capsys, "runs", tmp_path, "--json"))}
    assert found["good"]["step"] == 4 and found["good"]["options"] == ["optim.lr=1e-4"] and not found["good"]["problem"]
    assert "line 1: not a record" in found["bad"]["problem"]
    assert "line 1: not a record" in show.runs_table(tmp_path)  # and the others are there
    found = json.loads(call(capsys, "rollouts", tmp_path / "good", "--json", "-n", "2"))
    assert [one["index"] for one in found] == [0, 1]
    assert json.loads(call(capsys, "rollouts", tmp_path / "good", "--list", "--json")) == ["000010"]
    evil = make(tmp_path / "evil", episodes=[episode(text=EVIL, reward="nan")])
    out = call(capsys, "rollouts", evil.path)
    assert "\x1b" not in out and "\\x1b[31m\\u202e" in out and "reward nan" in out
    evil.path.joinpath("rollouts", "000010-r0.jsonl").write_text('{"uid": "a"\n')
    with pytest.raises(UserError, match="000010-r0.jsonl, line 1: not an episode"):
        cli._call(["rollouts", str(evil.path)])


# ---- top


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (41, 11), (300, 12)])
def test_a_frame_has_the_size_of_the_terminal(size, tmp_path):
    reader = make(tmp_path / "one", 9, episodes=[episode(text=EVIL + "漢" * 500)])
    (tmp_path / "one" / "result.json").write_text("{}")
    said(tmp_path / "one", "stalled", "x" * 300)
    (tmp_path / "one" / "system").mkdir()
    spans = [["generation", 10.0, 16.0], ["training", 16.0, 18.0], ["experience", 16.5, 17.0]]
    line = {
        "step": 9,
        "phase": "rl",
        "spans": spans,
        "cpu": 97.2,
        "memory_gib": 1.25,
        "gpus": [{"util": 40, "memory_gib": 9}],
    }
    for rank in range(2):
        (tmp_path / "one" / "system" / f"rank-{rank}.jsonl").write_text(f"torn\n{json.dumps(line)}\n" + '{"step": 10')
    view = LiveRun(reader)
    view.poll()
    lines = frame(view, *size)
    assert len(lines) == size[1] and all(len(line) <= size[0] for line in lines)
    text = "\n".join(lines)
    assert "one  finished  rl step 9/10" in text and "! stalled: x" in text
    assert "\x1b" not in text and ("\\x1b" in text) == (size[0] > 41) and "reward 0.9" in text
    bar = next(line for line in lines if line.startswith("rank 0 ["))
    if size[0] > 41:
        assert bar.endswith("cpu 97% 1.2 GiB gpu 40% 9.0 GiB") and "experience" not in bar
        inside = bar[bar.index("[") + 1 : bar.index("]")]
        assert inside.index("training") == pytest.approx(0.75 * len(inside), abs=1)
    assert ("rank 1 [" in text) == (size[1] >= 16)
    assert frame(view, 10, 5) == ["40 x 10 a…"]


def test_top_follows_a_run_that_is_taken_back_to_a_checkpoint(tmp_path):
    reader = make(tmp_path / "one", 6)
    view = LiveRun(reader)
    view.poll()
    assert [r["step"] for r in view.records] == [1, 2, 3, 4, 5, 6]
    lines = (reader.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for steps, more in (((1, 2, 3), []), ((1, 2, 3, 4, 5, 6, 7, 8), [record(n, entropy=1) for n in range(4, 9)])):
        text = "".join([*lines[:3], *(json.dumps(one) + "\n" for one in more)])
        (reader.path / "metrics.jsonl").write_text(text)
        view.poll()
        assert tuple(r["step"] for r in view.records) == steps
    with open(reader.path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(9)) + "\n")
    view.poll()
    assert len(view.records) == 9


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [b"q", b"\x03", signal.SIGTERM])
def test_top_gives_the_terminal_back(end, tmp_path):
    make(tmp_path / "one", 4)
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = "import sys; sys.modules['torch'] = None; from skyrl.cli import main; main()"
    command, env = [sys.executable, "-c", code, "top", str(tmp_path / "one")], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    try:
        seen = read_until(ours, b"q leaves")
        assert seen.startswith(ENTER.encode())
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        frames = (read_until(ours, b"q leaves").count(b"\r\n") for _ in range(20))  # one of before may still come
        assert 19 in frames
        process.send_signal(end) if isinstance(end, signal.Signals) else os.write(ours, end)
        seen = read_until(ours, LEAVE.encode())
        assert process.wait(20) == (128 + signal.SIGTERM if isinstance(end, signal.Signals) else 0)
        assert termios.tcgetattr(theirs) == before and b"Traceback" not in seen
    finally:
        process.kill()
        os.close(ours), os.close(theirs)


def read_until(terminal, end):
    seen = b""
    while end not in seen:
        assert select.select([terminal], [], [], 20)[0], f"nothing comes any more after {seen!r}"
        seen += os.read(terminal, 65536)
    return seen


# ---- report


def test_a_report_is_one_file_that_asks_for_nothing(tmp_path, capsys, monkeypatch):
    long = [episode(uid="u" + EVIL, text=EVIL * 100_000), *[episode(index=n, text="x" * 3000) for n in range(1, 9)]]
    reader = make(tmp_path / "one", episodes=long, options={"lr": 0.5})
    monkeypatch.chdir(tmp_path)
    assert "wrote one.html" in call(capsys, "report", reader.path)
    text = (tmp_path / "one.html").read_text()
    assert len(text.encode()) < LARGEST and "more characters" not in text and "characters more" in text
    assert "<script" not in text and not re.search(r"(src|href|url|@import)\b\s*[=(:]", text)
    assert html.escape(EVIL[:20]) in text and "<svg" in text and "optim.lr" in text and "0.5" in text
    with pytest.raises(UserError, match="give a file outside of the run's folder"):
        cli._call(["report", str(reader.path), "-o", str(reader.path / "report.html")])
    with pytest.raises(UserError, match="no/where.html: cannot be written"):
        cli._call(["report", str(reader.path), "-o", "no/where.html"])


# ---- compare


def test_runs_that_do_not_part(tmp_path):
    a, b = (
        make(tmp_path / "a"),
        make(tmp_path / "b", records=[record(n, **{"time/step_seconds:sum": 9.0}) for n in range(1, 8)]),
    )
    found = compare_runs(a, b)
    assert found["metric"] is None and found["rollout"] is None and found["why"] == "they do not part"
    often = [record(n, **({"eval/accuracy:mean": 0.5} if n % 2 else {})) for n in range(1, 8)]
    assert compare_runs(a, make(tmp_path / "c", records=often))["metric"] is None  # it was only evaluated more often


def test_the_first_step_metric_and_rollout_and_why(tmp_path, capsys):
    changed = [record(n, **({"reward:mean": 0.7, "loss:sum": 1.0} if n >= 4 else {})) for n in range(1, 8)]
    other = [episode(), episode(index=1), episode(index=2)]
    other[1]["turns"] = [{**other[1]["turns"][0], "tokens": [5, 9], "text": "\x1b8"}]
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", records=changed, episodes=other, options={"lr": 2e-4})
    found = compare_runs(a, b)
    assert (found["metric"]["step"], list(found["metric"]["differ"])) == (4, ["reward:mean", "loss:sum"])
    assert found["metric"]["differ"]["loss:sum"] == [None, 1.0]
    assert found["rollout"] == {
        "dump": "000010", "uid": "a", "index": 1,
        "what": "turn 1: the model wrote something else from token 1 on: '7<eos>' and '\\x1b8'",
    }  # fmt: skip
    assert found["options"] == ["optim.lr: 0.0001 -> 0.0002"] and found["why"].startswith("other options: optim.lr")
    out = call(capsys, "compare", a.path, b.path)
    assert "part in rl step 4" in out and "why          other options" in out and "\x1b" not in out
    assert json.loads(call(capsys, "compare", a.path, b.path, "--json"))["why"] == found["why"]


def test_files_and_versions_are_reasons_too(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", records=[record(n, x=1) for n in range(1, 8)])
    assert compare_runs(a, b)["why"].startswith("nothing that is recorded tells")
    (b.path / "versions.json").write_text(json.dumps([{"torch": "3.0"}]))
    assert "other versions: torch: (absent) -> 3.0, skyrl: 0.1.0 -> (absent)" in compare_runs(a, b)["why"]
    (a.path / "fingerprint.json").write_text('{"data.train": "1", "code.x.py": "2"}')
    (b.path / "fingerprint.json").write_text('{"data.train": "2", "code.x.py": "2"}')
    assert compare_runs(a, b)["why"] == "other code, data or files: data.train"


def test_folders_of_runs_are_compared_over_seeds(tmp_path, capsys):
    for folder, lr, rewards in (("a", 1e-4, (0.1, 0.3)), ("b", 2e-4, (0.5, 0.7, 0.9))):
        for seed, reward in enumerate(rewards, start=1):
            one = make(
                tmp_path / folder / f"s{seed}",
                records=[record(1, **{"reward:mean": reward})],
                seed=seed,
                options={"lr": lr},
            )
            (one.path / "result.json").write_text("{}")
    found = compare_folders(tmp_path / "a", tmp_path / "b", ["reward:mean"])
    assert found["options"] == ["optim.lr: 0.0001 -> 0.0002"]
    (one,) = found["rows"]
    # by hand: variances 0.02 and 0.04, so the error is sqrt(0.02 / 2 + 0.04 / 3)
    assert one["difference"] == pytest.approx(0.5) and one["error"] == pytest.approx((0.02 / 2 + 0.04 / 3) ** 0.5)
    assert "b - a = +0.5000" in call(capsys, "compare", tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="is no folder of runs, and the other is"):
        cli._call(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "s1")])
    with pytest.raises(UserError, match="--metric=x: no finished run has it; there are .*reward:mean"):
        cli._call(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--metric", "x"])


# ---- bad input of all of them


@pytest.mark.parametrize(
    "command", [["show"], ["top", "--once"], ["report", "-o", "x.html"], ["rollouts"], ["runs"], ["trace"]]
)
def test_lines_that_lack_something_end_no_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = make(tmp_path / "runs" / "one", 3, episodes=[{"turns": [{}]}, {"turns": [], "reward": "inf"}])
    (reader.path / "advisories.jsonl").write_text('{"name": "a"}\n{"name": "b", "step": 1, "text": 3, "remedy": []}\n')
    (reader.path / "versions.json").write_text('[{"command": {"x": 1}}]')
    (reader.path / "system").mkdir()
    (reader.path / "system" / "rank-0.jsonl").write_text('{"step": 1}\n{"step": 2, "phase": "rl", "time": 2.0}\n')
    place = tmp_path / "runs" if command[0] == "runs" else reader.path
    try:
        cli._call([command[0], str(place), *command[1:]])
    except UserError as error:
        assert command == ["trace"] and "tracking.system" in str(error)


def test_nothing_is_written_into_a_run(tmp_path):
    reader = make(tmp_path / "one")
    for command, flag in (("report", "-o"), ("trace", "-o")):
        for name in ("config.yaml", "new.html", "deep/new.json", "."):
            with pytest.raises(UserError, match="give a file outside of the run's folder"):
                cli._call([command, str(reader.path), flag, str(reader.path / name)])
    assert not (reader.path / "new.html").exists()


def test_names_and_errors_steer_no_terminal(tmp_path, capsys, monkeypatch):
    make(tmp_path / "runs" / "a\x1b[31mb", 2)
    assert "\x1b" not in (out := call(capsys, "runs", tmp_path / "runs")) and "a\\x1b[31mb" in out
    monkeypatch.setattr(sys, "argv", ["skyrl-tx", "show", "\x1b[31m"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\\x1b[31m" in (said := capsys.readouterr().err) and "\x1b" not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf8(encoding, tmp_path):
    make(tmp_path / "one", 8, episodes=[episode(text="漢字 é")])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    for command in (["top", "--once"], ["show"]):
        command = [sys.executable, "-m", "skyrl.cli", command[0], str(tmp_path / "one"), *command[1:]]
        done = subprocess.run(command, env=env, capture_output=True, timeout=60)
        text = done.stdout.decode(encoding)
        assert done.returncode == 0 and done.stderr == b"" and ("**" in text or "12345678" in text), (text, done.stderr)
