"""What a program tries to get out of a sandbox, by level of protection: escapes.py and more_escapes.py have it."""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from skyrl.sandbox import Limits, Sandbox
from skyrl.types import UserError

ESCAPES = "".join((Path(__file__).parent / name).read_text("utf-8") for name in ("escapes.py", "more_escapes.py"))
NAMES = [line[4:].partition("(")[0] for line in ESCAPES.splitlines() if line.startswith("def ")]
NAMES = [name for name in NAMES if name not in ("main", "syscall")]


@pytest.fixture(scope="module", params=["strict", "landlock"])
def sandbox(request, other_users_python):
    box = Sandbox(request.param, python=sys.executable if request.param == "strict" else other_users_python)
    try:
        box.level  # noqa: B018  # tries it
    except UserError as error:
        pytest.skip(str(error))
    yield box
    box.close()


@pytest.fixture(scope="module")
def tried(sandbox):
    """{attempt: what it got}, all of them in one program, beside things of the machine that are worth getting."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to the other user
    secret = folder / "secret"
    secret.write_text("canary")
    secret.chmod(0o666)
    folder.chmod(0o777)
    os.environ["SKYRL_CANARY"] = f"canary-{os.getpid()}"
    usr1 = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("a signal came out"))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0skyrl-{os.getpid()}")
        abstract.listen()
        host = {
            "secret": str(secret), "pid": os.getpid(), "port": server.getsockname()[1],
            "abstract": f"skyrl-{os.getpid()}", "level": sandbox.level, "reasons": {},
        }  # fmt: skip
        result = sandbox.run(f"{ESCAPES}\nmain({host!r})", limits=Limits(wall_seconds=60))
    signal.signal(signal.SIGUSR1, usr1)
    del os.environ["SKYRL_CANARY"]
    assert result.status == "ok", result
    assert secret.read_text() == "canary" and sorted(os.listdir(folder)) == ["secret"]
    assert secret.stat().st_mode & 0o777 == 0o666 and secret.stat().st_mtime > 1e9
    shutil.rmtree(folder)
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_an_attempt_comes_to_nothing(tried, name):
    told, reasons = tried
    assert told[name] == "", f"{name} got {told[name]}"
    assert not reasons.get(name, "").startswith(("NameError", "SyntaxError", "TypeError")), reasons[name]
