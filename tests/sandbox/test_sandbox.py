"""Limits of programs, how they end, what they leave behind, and results that are forged."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl.sandbox import Limits, Sandbox, SandboxError, run_code, to_text
from skyrl.sandbox.__main__ import main
from skyrl.sandbox.plain import from_text
from skyrl.types import UserError

FAST = Limits(cpu_seconds=30, wall_seconds=60, memory_mb=128, processes=8, disk_mb=2, files=20)


@pytest.fixture(scope="module")
def sandbox():
    box = Sandbox("strict")
    try:
        box.level  # noqa: B018  # tries it
    except UserError as error:
        pytest.skip(str(error))
    yield box
    box.close()


def programs(name):
    """[title, source] of the programs in a text file, which "### title" divides."""
    text = (Path(__file__).parent / f"{name}.txt").read_text("utf-8")
    return [
        [title, source.strip("\n")] for title, _, source in (part.partition("\n") for part in text.split("### ")[1:])
    ]


def alive(marker):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if marker.encode() in path.read_bytes() else []
    return found


@pytest.mark.parametrize(("title", "source"), programs("endings"))
def test_a_program_ends_as_its_status_says(sandbox, title, source):
    status, _, limits = title.partition(":")
    limits = json.loads(limits[limits.index("{") :])
    result = sandbox.run(source, limits=Limits(**{**vars(FAST), **limits}))
    assert result.status == status, result
    assert len(result.stdout) <= FAST.output_bytes and len(result.stderr) <= FAST.output_bytes


BOMBS = """
import os, threading, time, tempfile
told = {}
def fill(folder):
    try:
        with open(folder + "/big", "wb") as file:
            while True: file.write(bytes(1 << 16))
    except OSError as error: told[folder] = error.errno
    os.unlink(folder + "/big")
for folder in ("/tmp", "/dev/shm", "."): fill(folder)
count = 0
try:
    while True:
        open(f"/tmp/f{count}", "w").close(); count += 1
except OSError as error: told["files"] = (count < 30, error.errno)
for name in os.listdir("."): os.unlink(name)
def fork(n=0):
    try:
        while n < 1000:
            if os.fork() == 0: time.sleep(1000)
            n += 1
    except OSError as error: return n, error.errno
n, told["forks"] = fork()
assert n < 10
def threads(n=0):
    try:
        while n < 1000: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(); n += 1
    except RuntimeError: return n
told["threads"] = threads()
n = 0
try:
    while True: os.pipe(); n += 1
except OSError as error: told["descriptors"] = (n < 40, error.errno)
print(told, flush=True)
os._exit(0)
"""


def test_bombs_are_bounded(sandbox):
    result = sandbox.run(BOMBS, limits=FAST)
    full = {"/tmp": 28, "/dev/shm": 28, ".": 28, "files": (True, 28)}
    assert result.stdout == f"{full | {'forks': 11, 'threads': 0, 'descriptors': (True, 24)}}\n", result


def test_nothing_is_left_behind(sandbox):
    marker = f"skyrl_left_{os.getpid()}"
    source = f"""
import os, subprocess
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv("/bin/sh", ["sh", "-c", "sleep 1000; : {marker}"])
        os._exit(0)
    os.wait()
open("/tmp/{marker}", "w").write("x")
open("/dev/shm/{marker}", "w").write("x")
"""
    assert sandbox.run(source, limits=FAST).status == "ok"
    assert sandbox.run("import os; print(os.listdir('.'))").stdout == "['main.py']\n"
    assert alive(marker) == [] and not os.path.exists(f"/tmp/{marker}") and not os.path.exists(f"/dev/shm/{marker}")


def test_input_files_arguments_and_a_traceback(sandbox):
    source = "import sys\nprint(sys.argv[1:], sys.stdin.read(), open('in/a.txt').read())\n\nraise ValueError('é')"
    result = sandbox.run(source, stdin="hello", files={"in/a.txt": b"data"}, arguments=["x"])
    assert result.stdout == "['x'] hello data\n" and result.exit_code == 1
    assert result.stderr == (
        "Traceback (most recent call last):\n"
        "  File \"main.py\", line 4, in <module>\n    raise ValueError('é')\nValueError: é\n"
    )
    with pytest.raises(UserError, match=r"3 with \d+ bytes, .* limits.disk_mb=1 allow"):
        sandbox.run("", files={"a": bytes(10**6), "b": bytes(10**5)}, limits=Limits(disk_mb=1))
    for name in ("/etc/x", "../x", "a/../../x", ""):
        with pytest.raises(UserError, match="relative path"):
            sandbox.run("", files={name: ""})


CALLED = (2, 3)
CALLS = [([n], {}) for n in CALLED]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x): return x * 2", [4, 6]),
        ("def f(x): return {x: (x, [True]), 'b': {1.5, 2}}", [{n: (n, [True]), "b": {1.5, 2}} for n in CALLED]),
        ("def f(x): return 10**400 * x", [2 * 10**400, 3 * 10**400]),
        ("print('noise')\ndef f(x):\n  print('more')\n  return x", [2, 3]),
    ],
)  # fmt: skip
def test_results_come_out_as_plain_data(sandbox, source, expected):
    result, texts = sandbox.call(source, "f", CALLS)
    assert result.status == "ok" and texts == [to_text(value) for value in expected]
    assert [from_text(text) for text in texts] == expected


FORGED = dict(programs("forged"))


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_result_is_none(sandbox, name):
    """By value, and by asserts, of which the first is right for any function that ends its caller."""
    limits = Limits(cpu_seconds=2, wall_seconds=60)
    _, texts = sandbox.call(FORGED[name], "f", CALLS, limits=limits)
    assert to_text(4) not in texts[:1]
    tests = "def check(candidate):\n  assert all(map(lambda x: candidate(x) == 2 * x, [2, 3]))\n  assert f(2) == 4"
    _, judged = sandbox.test(FORGED[name], "f", tests, limits=limits)
    assert ["passed"] not in judged.events and judged.status == "error"


def test_asserts_run_outside_of_the_sandbox_of_what_they_test(sandbox):
    tests = (
        "def check(candidate):\n  assert candidate(2, y=[helper]) == (2, [5])\n"
        "  try:\n    candidate('a')\n    assert False\n  except TypeError as error:\n    assert 'y' in str(error)\n"
        "  assert candidate(1, 2.5) != (1, 2)"
    )
    program, judged = sandbox.test("def f(x, y): return x, y", "f", tests, context="helper = 5")
    assert (judged.status, judged.events, program.status) == ("ok", [["passed"]], "ok"), judged
    source = "import gc\ndef f(x, y): return [o for o in gc.get_objects() if 'helper' + ' = 5' in str(o)] or 1/0"
    assert ["passed"] not in sandbox.test(source, "f", tests, context="helper = 5")[1].events


@pytest.mark.parametrize("value", ["1", "(True, 0)", "'x'", "[0]"])
def test_an_assert_on_the_function_itself_takes_no_other_truth(sandbox, value):
    right = "def check(candidate):\n    assert candidate(1)\n    assert not candidate(0)"
    assert ["passed"] in sandbox.test("def f(x): return x == 1", "f", right)[1].events
    assert ["passed"] not in sandbox.test(f"def f(x): return {value}", "f", "assert f(1)")[1].events


@pytest.mark.parametrize("end", ["import os; os._exit(0)", "import sys; sys.exit()", "while True: pass"])
def test_no_test_takes_the_end_of_the_function_for_its_exception(sandbox, end):
    tests = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert ["passed"] in sandbox.test("def f(x): 1 / 0", "f", tests)[1].events
    _, judged = sandbox.test(f"def f(x):\n  {end}", "f", tests, limits=Limits(cpu_seconds=0.3))
    assert ["passed"] not in judged.events and judged.exit_code == 1


def test_texts_of_values():
    values = [
        None,
        True,
        1,
        1.0,
        -1,
        "1",
        b"1",
        2**53,
        1j,
        (1,),
        [1],
        {1},
        frozenset([1]),
        {1: 2},
        {"1": 2},
        {(1,): {}},
    ]
    assert len({to_text(value) for value in values}) == len(values)
    assert all(
        from_text(to_text(value)) == value and type(from_text(to_text(value))) is type(value) for value in values
    )
    assert to_text({2: 1, 1: [0.0]}) == to_text({1: [-0.0], 2: 1}) and to_text(float("nan")) == to_text(float("nan"))
    for wrong in ("[", "{}", '{"x":1}', '{"int":1}', '{"set":1}', '{"dict":[1]}', '{"int":"0x1","set":[]}'):
        with pytest.raises(ValueError):
            from_text(wrong)


def test_a_spawner_that_is_killed_is_started_again(sandbox):
    box = Sandbox("strict")
    assert box.run("").status == "ok"
    box._process.kill()
    box._process.wait()
    assert box.run("print(1)").stdout == "1\n"
    box.close()


def waited_for(condition):
    end = time.monotonic() + 50
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_caller_that_is_gone_ends_its_sandbox(sandbox):
    marker = f"skyrl_gone_{os.getpid()}"
    source = f"import os; os.execv('/bin/sh', ['sh', '-c', 'sleep 1000; : {marker}'])"
    connection = sandbox._start({"kind": "program", "source": source, "inputs": {}, "limits": vars(FAST)})
    assert waited_for(lambda: alive(marker))
    connection.close()
    assert waited_for(lambda: not alive(marker))


def test_a_monitor_that_is_killed_ends_its_sandbox(sandbox):
    marker = f"skyrl_monitor_{os.getpid()}"
    source = f"import os; os.execv('/bin/sh', ['sh', '-c', 'sleep 1000; : {marker}'])"
    connection = sandbox._start({"kind": "program", "source": source, "inputs": {}, "limits": vars(FAST)})
    assert waited_for(lambda: alive(marker))
    children = Path(f"/proc/{sandbox._process.pid}/task/{sandbox._process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    with pytest.raises(SandboxError, match="the process that watched the sandbox ended"):
        sandbox._finish(connection)
    assert waited_for(lambda: not alive(marker))


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match=r"level='none': choose one of: strict, landlock, rlimits"):
        Sandbox("none")
    for wrong in (
        {"memory_mb": 0},
        {"cpu_seconds": float("nan")},
        {"files": 1.5},
        {"processes": True},
        {"disk_mb": "1"},
    ):
        with pytest.raises(UserError, match=rf"limits\.{next(iter(wrong))}=.*wanted a"):
            Limits(**wrong)
    with pytest.raises(UserError, match="is no Python that runs"):
        Sandbox("strict", python=str(tmp_path / "none")).run("")
    assert main(["run", str(tmp_path / "none.py")]) == 125
    assert "none.py: cannot be read" in capsys.readouterr().err
    assert issubclass(SandboxError, RuntimeError)


def test_the_command(sandbox, tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import sys\nprint(sys.stdin.read(), sys.argv[1])\nsys.exit(7)")
    command = [sys.executable, "-m", "skyrl.sandbox", "run", str(file), "x"]
    done = subprocess.run(command, input="hello", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "hello x\n")
    assert "sandbox: error, exit code 7, level strict" in done.stderr
    file.write_text("print(1)")
    reading, writing = os.pipe()  # an input that never ends
    done = subprocess.run(command, stdin=reading, capture_output=True, text=True, timeout=60)
    os.close(reading), os.close(writing)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_the_weakest_level_is_loud(other_users_python):
    with pytest.warns(UserWarning, match="does NOT protect your files"):
        assert "not permitted" in Sandbox("rlimits", python=other_users_python).run("import os\nos.fork()").stderr
    assert run_code.__doc__
