"""kill -9 at any moment: every acknowledged save is there and whole, nothing is half visible.

Run as a program it is the parent of the processes that are killed, so that torch is imported once.
"""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.content import Content, OptimizerState
from skyrl.service.storage.records import CheckpointPath, ModelInfo, NotFound
from skyrl.types import LoraSpec

INFO = ModelInfo("base", LoraSpec(2))
NAMES = ("a", "b", "c")
ROUNDS = 15
WATCHED = ("checkpoints.py", "archive.py", "files.py", "store.py", "database.py")


def started(folder: Path) -> tuple[CheckpointService, str]:
    """As a server starts: rows and folders put right, with the one run of these tests."""
    service = CheckpointService(folder)
    store = service.store
    if not store.list_sessions("o").items:
        store.create_run(store.create_session("o").session_id, "o", 0, INFO)
    (run,) = store.list_runs("o").items
    return service, run.run_id


def save(service: CheckpointService, run: str, name: str, value: int) -> None:
    tensor = torch.full((2, 3000), float(value))
    state = OptimizerState(value, {"w": tensor}, {"w": tensor})
    content = Content(INFO, {"w.A": tensor, "w.B": tensor.T.contiguous()}, state)
    service.save(
        CheckpointPath(run, "weights", name), "o", content, overwrite=True, user_metadata={"value": str(value)}
    )


def found(folder: Path) -> dict[str, int]:
    """What is there after a start, with every checkpoint read and compared with its row; no leftovers."""
    service, run = started(folder)
    try:
        values, versions = {}, set()
        for name in NAMES:
            path = CheckpointPath(run, "weights", name)
            try:
                row = service.store.get_checkpoint(path, "o")
            except NotFound:
                continue
            content = service.load(path.uri, "o", optimizer=True)
            tensors = [*content.weights.values(), content.optimizer.exp_avg["w"], content.optimizer.exp_avg_sq["w"]]
            (value,) = {int(v) for tensor in tensors for v in tensor.unique()}
            assert content.optimizer.step == value and row.user_metadata == {"value": str(value)}
            values[name] = value
            versions |= {name, f"{name}/{row.version}"}
        parent = service.archive.root / run / "weights"
        there = {str(entry.relative_to(parent)) for pattern in ("*", "*/*") for entry in parent.glob(pattern)}
        assert there == versions
        return values
    finally:
        service.close()


def work(folder: Path, first: int, say) -> None:
    """Saves and deletes for ever; says each intention before and each success after."""
    service, run = started(folder)
    random.seed(first)
    for value in range(first, first + 10**6):
        name = random.choice(NAMES)
        if random.random() < 0.2 and service.store.version_of(CheckpointPath(run, "weights", name)):
            say(f"try {name} 0")
            service.delete(CheckpointPath(run, "weights", name), "o")
            say(f"done {name} 0")
        else:
            say(f"try {name} {value}")
            save(service, run, name, value)
            say(f"done {name} {value}")


def in_child(body) -> tuple[int, int]:
    """Forks; returns the child's pid and the end of a pipe that the child writes lines to."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sink)
        return pid, source
    try:
        os.close(source)
        body(lambda text: os.write(sink, f"{text}\n".encode()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def drained(source: int) -> list[list[str]]:
    with os.fdopen(source) as stream:
        return [line.split() for line in stream.read().splitlines()]


def kill_at_random(folder: Path) -> None:
    """Lets a child do a few things, then kills it somewhere within the next ones."""
    acknowledged: dict[str, int] = {}
    saves, lengths = 0, [0.05]
    for number in range(ROUNDS):
        chance = random.Random(number)
        pid, source = in_child(lambda say, n=number: work(folder, 1000 * (n + 1), say))
        text = b""
        wanted = chance.randint(1, 6)
        while text.count(b"done") < wanted:
            started_at = time.monotonic()
            piece = os.read(source, 4096)
            assert piece, f"the child died: {text!r}"
            text += piece
            lengths.append(time.monotonic() - started_at)
        time.sleep(chance.uniform(0, 3) * sum(lengths[-5:]) / len(lengths[-5:]))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        lines = [line.split() for line in text.decode().splitlines()] + drained(source)
        under_way = lines[-1] if lines[-1][0] == "try" else None
        for verb, name, value in lines:
            if verb == "done":
                acknowledged[name] = int(value)
                saves += 1
        values = found(folder)
        for name in NAMES:
            allowed = {acknowledged.get(name, 0)}
            if under_way and under_way[1] == name:
                allowed.add(int(under_way[2]))
            assert values.get(name, 0) in allowed, (number, name, values, allowed)
            acknowledged[name] = values.get(name, 0)
    print("saves", saves)


def dying(folder: Path, value: int, at: int):
    """A child that dies, as by kill -9, before the line number `at` that it runs in our files."""

    def body(say):
        service, run = started(folder)
        left = at

        def watch(frame, event, _):
            nonlocal left
            if Path(frame.f_code.co_filename).name not in WATCHED:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os._exit(9)
            return watch

        sys.settrace(watch)
        save(service, run, "a", value)
        sys.settrace(None)
        say(f"done {at - left}")

    return body


def die_at_every_line(folder: Path, step: int) -> None:
    service, run = started(folder)
    save(service, run, "a", 1)
    service.close()
    at, current, kept, replaced = 1, 1, 0, 0
    while True:
        pid, source = in_child(dying(folder, current + 1, at))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = drained(source)
        assert status == (0 if done else 9)
        value = found(folder).get("a")
        assert value in ((current + 1,) if done else (current, current + 1)), (at, current, value)
        kept, replaced = kept + (value == current), replaced + (value > current)
        current = value
        if done:
            break
        at += step
    assert kept > 10 and replaced > 1, (kept, replaced)
    print("lines", done[0][1], "kept", kept, "replaced", replaced)


def test_acknowledged_saves_survive_kills(tmp_path):
    run_as_program("kill", tmp_path)


def test_overwriting_may_die_anywhere(tmp_path):
    run_as_program("lines", tmp_path, "13")


@pytest.mark.slow
def test_overwriting_may_die_at_every_line(tmp_path):
    run_as_program("lines", tmp_path, "1")


def run_as_program(what: str, folder: Path, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, what, str(folder), *options], capture_output=True, text=True, timeout=250,
        cwd=Path(__file__).resolve().parents[2], env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill_at_random(Path(sys.argv[2]))
    else:
        die_at_every_line(Path(sys.argv[2]), step=int(sys.argv[3]))
