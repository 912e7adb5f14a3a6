"""kill -9 of a whole server at random moments, under a client that trains and saves over HTTP: what was acknowledged
is there afterwards, and training goes on from it bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gloo
import httpx
import pytest
from small import service_options, supervised

from skyrl.types import UserError

STEPS = 10
ADAM = {"learning_rate": 1e-2, "grad_clip_norm": 50.0}


class Lost(Exception):
    """The server is gone, or has forgotten the model."""


class Server:
    """Ranks of `python -m skyrl.serve`: forked from a warm process, or (launcher) under torchrun."""

    def __init__(self, folder: Path, size: int, *, launcher: bool = False) -> None:
        self.folder, self.size, self.launcher = folder, size, launcher
        self.port = gloo_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pids: list[int] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        """Returns when it answers."""
        given = {**service_options(self.folder / "service"), "service.port": str(self.port)}
        args = [f"{key}={value}" for key, value in given.items()]
        log = self.folder / "server.log"
        if self.launcher:
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.size}"]
            root = str(Path(__file__).resolve().parents[2])
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
            with open(log, "ab") as out:
                command = [*run, "-m", "skyrl.serve", *args]
                one = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
            self.processes = [one]
        else:
            meet = gloo_port()
            self.processes = [
                gloo._SERVER.Process(target=_serve, args=(rank, self.size, meet, args, log), daemon=True)
                for rank in range(self.size)
            ]
            for one in self.processes:
                one.start()
        deadline = time.monotonic() + 90
        while not self._answers():
            assert time.monotonic() < deadline and self.alive(), log.read_text()[-3000:]
            time.sleep(0.02)

    def alive(self) -> bool:
        """Whether every process of it runs."""
        one = self.processes[0]
        return one.poll() is None if self.launcher else all(process.is_alive() for process in self.processes)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/v1/healthz", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """kill -9 of every process."""
        for one in self.processes:
            if self.launcher:
                os.killpg(one.pid, signal.SIGKILL)
                one.wait(30)
            else:
                one.kill()
        if not self.launcher:
            for one in self.processes:
                one.join(30)


def gloo_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _serve(rank: int, size: int, port: int, args: list[str], log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1), os.dup2(out, 2)
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
    os.environ.update({**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"})
    from skyrl.main import run_entry

    sys.argv = ["skyrl.serve", *args]
    run_entry("serve")


class Client:
    """The protocol in JSON, as an old release speaks it; one model. Raises Lost when the server goes away."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1/", timeout=20)
        self.session = self.post("create_session", tags=[], sdk_version="test")["session_id"]
        self.models = 0
        self.model, self.seq = "", 0

    def post(self, path: str, /, **body: Any) -> Any:
        try:
            reply = self.http.post(path, json=body)
        except httpx.TransportError as error:
            raise Lost(str(error)) from error
        if reply.status_code == 408:
            return None
        assert reply.status_code == 200, reply.text
        return reply.json()

    def result(self, request_id: str) -> Any:
        while (found := self.post("retrieve_future", request_id=request_id)) is None:
            pass
        if "error" in found:
            if found.get("category") == "server":  # the server was on its way out
                raise Lost(found["error"])
            raise UserError(found["error"])
        return found

    def create(self, path: str | None) -> None:
        """A new model, or one from a checkpoint."""
        number, self.models = self.models, self.models + 1
        start = {"session_id": self.session, "model_seq_id": number}
        if path is None:
            lora = {"rank": 4, "seed": 7}
            made = self.post("create_model", **start, base_model="tiny", lora_config=lora)
        else:
            made = self.post("load_weights", **start, path=path, optimizer=True)
        self.result(made["request_id"])
        self.model, self.seq = f"{self.session}:train:{number}", 0

    def call(self, operation: str, /, **body: Any) -> str:
        self.seq += 1
        return self.post(operation, model_id=self.model, seq_id=self.seq, **body)["request_id"]

    def step(self, number: int) -> tuple[str, str]:
        """Posts one step of training; its two requests."""
        data = [
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
                "loss_fn_inputs": {
                    "target_tokens": {"data": targets.tolist(), "dtype": "int64", "shape": [len(tokens)]},
                    "weights": {"data": weights.tolist(), "dtype": "float32", "shape": [len(tokens)]},
                },
            }
            for tokens, targets, weights in supervised(number)
        ]
        first = self.call("forward_backward", forward_backward_input={"data": data, "loss_fn": "cross_entropy"})
        return first, self.call("optim_step", adam_params=ADAM)

    def numbers(self, requests: tuple[str, str]) -> list[Any]:
        """Everything that a step tells: losses, log-probabilities, gradient norm; floats as they are."""
        first, second = (self.result(request) for request in requests)
        return [first["metrics"], [one["logprobs"]["data"] for one in first["loss_fn_outputs"]], second["metrics"]]


class Script:
    """Trains STEPS steps and saves after each second one, without waiting for a save before the next step.

    `acknowledged`: step -> path of the saves that were. `seen`: step -> what each try of it told.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.acknowledged: dict[int, str] = {}
        self.seen: dict[int, list[Any]] = {}
        self.tries = 0

    def run(self) -> None:
        """From the last acknowledged save to the end. Raises Lost."""
        self.tries += 1
        client = Client(self.url)
        first = max(self.acknowledged, default=0)
        client.create(self.acknowledged.get(first))
        saves: dict[int, str] = {}
        for number in range(first, STEPS):
            requests = client.step(number)
            if (number + 1) % 2 == 0:
                saves[number + 1] = client.call("save_weights", path=f"try{self.tries}-{number + 1}")
            self.seen.setdefault(number, []).append(client.numbers(requests))
            for step in [step for step in saves if step < number]:  # of some steps ago
                self.acknowledged[step] = client.result(saves.pop(step))["path"]
        for step, request in saves.items():
            self.acknowledged[step] = client.result(request)["path"]


def killed_at_random(
    server: Server, draws: random.Random, expected: list[Any], *, rounds: int, seconds: float
) -> Script:
    """A script that runs while its server is killed `rounds` times, at any moment of the `seconds` that it takes;
    checks every number and every save."""
    script = Script(server.url)
    server.start()
    done = 0
    lost_at: list[int] = []
    while True:
        timer = threading.Timer(draws.uniform(0.02, 0.9) * seconds, server.kill)
        if done < rounds:
            timer.start()
        try:
            script.run()
        except Lost:
            timer.join()
            done += 1
            lost_at.append(max(script.seen, default=-1))
            server.start()
            check_saves(script)
            continue
        if done >= rounds:
            break
        timer.join()  # it came too late: train anew, without what was saved
        done += 1
        server.start()
        check_saves(script)
        script.acknowledged = {}
    assert script.tries == rounds + 1
    print(f"killed after steps {lost_at}; tries of each step: {[len(script.seen[n]) for n in sorted(script.seen)]}")
    for number, tries in script.seen.items():
        assert all(one == expected[number] for one in tries), f"step {number} told something else"
    return script


def check_saves(script: Script) -> None:
    """Every acknowledged save is listed."""
    found = httpx.get(f"{script.url}/api/v1/checkpoints", params={"limit": 1000}).json()["checkpoints"]
    missing = set(script.acknowledged.values()) - {one["tinker_path"] for one in found}
    assert not missing


def go_on_from_each(script: Script, expected: list[Any]) -> None:
    """The step after each acknowledged save is the same as without any kill."""
    client = Client(script.url)
    for step, path in script.acknowledged.items():
        if step < STEPS:
            client.create(path)
            assert client.numbers(client.step(step)) == expected[step], path


def undisturbed(server: Server) -> tuple[list[Any], float]:
    """What each step tells when nothing happens, and the seconds that takes."""
    server.start()
    try:
        script = Script(server.url)
        start = time.monotonic()
        script.run()
        seconds = time.monotonic() - start
        assert sorted(script.acknowledged) == [2, 4, 6, 8, 10]
    finally:
        server.kill()
    return [script.seen[number][0] for number in range(STEPS)], seconds


def check(make: Callable[[str], Server], seed: int, rounds: int) -> None:
    expected, seconds = undisturbed(make("calm"))
    assert expected[0] != expected[1]
    server = make("killed")
    try:
        script = killed_at_random(
            server, random.Random(f"skyrl restarts {seed}"), expected, rounds=rounds, seconds=seconds
        )
        go_on_from_each(script, expected)
    finally:
        server.kill()


def folder_of(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=[pytest.mark.ranks])])
def test_kill_9_and_go_on(size, tmp_path):
    check(lambda name: Server(folder_of(tmp_path / name), size), seed=size, rounds=2)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_many_times(seed, tmp_path):
    check(lambda name: Server(folder_of(tmp_path / name), 1 + seed % 2), seed=100 + seed, rounds=15)


@pytest.mark.slow
@pytest.mark.ranks
def test_kill_9_under_torchrun(tmp_path):
    check(lambda name: Server(folder_of(tmp_path / name), 2, launcher=True), seed=200, rounds=3)


def test_a_restart_says_what_is_lost(tmp_path):
    """A model that was open is gone, and its client is told which checkpoint to go on from; so is a lost snapshot."""
    server = Server(folder_of(tmp_path / "state"), 1)
    server.start()
    try:
        client = Client(server.url)
        client.create(None)
        client.numbers(client.step(0))
        saving = client.call("save_weights", path="one")
        path = client.result(saving)["path"]
        sampler = client.result(client.call("save_weights_for_sampler", sampling_session_seq_id=0))
        stepping = client.step(1)
        client.numbers(stepping)
        server.kill()
        server.start()
        again = Client(server.url)
        again.model, again.seq = client.model, client.seq
        assert again.result(saving)["path"] == path  # what outlives the process is answered after it, too
        for request in stepping:
            with pytest.raises(Lost, match="this request was lost when the server restarted; go on from the last"):
                again.result(request)
        with pytest.raises(Lost, match=f"lost when the server restarted; create a model from a saved state.*{path}"):
            again.result(again.step(2)[0])
        sample = {"sampling_params": {"max_tokens": 2}, "prompt": {"chunks": [{"tokens": [5]}]}}
        asked = again.post("asample", sampling_session_id=sampler["sampling_session_id"], seq_id=0, **sample)
        with pytest.raises(Lost, match="this snapshot was lost when the server restarted"):
            again.result(asked["request_id"])
        again.create(path)
        assert again.numbers(again.step(1))[2]["grad_norm"] > 0
    finally:
        server.kill()
