"""What a server's clients see under load: steps and restarts with very many sessions on record, and small clients
beside one with many requests in flight.

    python benchmarks/server_load.py [--write] [--live 100000] [--recorded 200000] [--rounds 3]
    python benchmarks/server_load.py --only fairness --ranks 2

One CPU rank with the tiny model, in a process of its own, so that a step hardly computes and what is measured is the
server. The door: what a request of 16 clients costs in processor time of the server's threads. The rest is measured
alternately with and without, for a shared machine's minutes differ. Prints JSON. With --model FOLDER only this: the
door with 1, 16 and 256 clients before that model in bfloat16, 16 tokens a sample (kept as server_load_FOLDER.json).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, write

MODEL = ("model.path=tiny", "run.threads=1")
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": list(range(5, 21))}]}
DOOR_CLIENTS, DOOR_REQUESTS = 16, 640
PRETRAINED = {1: 24, 16: 192, 256: 768}  # clients: requests of all of them
CROWD = 64  # requests that the large client has in flight
SMALL = {"max_tokens": 8, "stop": []}
CROWDS: dict[str, tuple[int, dict[str, Any]]] = {
    "long": (4, {"max_tokens": 64, "stop": []}),
    "short": (1, {"max_tokens": 4, "stop": []}),
    "training": (0, {}),  # instead of samples: one model, two forward_backward of 64 rows of 128 tokens in flight
}


class Client:
    """Requests over one connection that stays open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: Any = None

    async def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """(status, answer) of a POST, or of a GET without a body."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        content = b"" if body is None else json.dumps(body).encode()
        writer.write(
            f"{'GET' if body is None else 'POST'} /api/v1/{path} HTTP/1.1\r\nHost: x\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int((head.partition("content-length: ")[2] or "0").partition("\r\n")[0])
        answer = json.loads(await reader.readexactly(length) or b"null")
        return int(head.split()[1]), answer

    async def result(self, path: str, **body: Any) -> Any:
        """What becomes of a request with a future."""
        _, made = await self.call(path, body)
        while True:
            status, answer = await self.call("retrieve_future", {"request_id": made["request_id"]})
            if status != 408:
                assert status == 200 and "error" not in answer, answer
                return answer

    async def session(self) -> str:
        """A new one."""
        return (await self.call("create_session", {"tags": []}))[1]["session_id"]

    async def sampler(self, model: str = "tiny") -> str:
        """A sampling session of the base model."""
        body = {"session_id": await self.session(), "sampling_session_seq_id": 0, "base_model": model}
        return (await self.call("create_sampling_session", body))[1]["sampling_session_id"]


@contextlib.contextmanager
def serving(
    folder: Path, options: tuple[str, ...] = MODEL, ranks: int = 1
) -> Iterator[tuple[int, tuple[float, float], int]]:
    """(port, seconds from its start until it answers and until its model is loaded, process) of a server that keeps its
    state in `folder`; with several ranks under torchrun, which is the process then."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m") if ranks > 1 else ()
    where = (f"service.port={port}", f"service.folder={folder}")
    command = [sys.executable, "-m", *torchrun, "skyrl.serve", *options, *where]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with open(folder.with_suffix(".log"), "a") as log, subprocess.Popen(command, env=env, stderr=log) as process:
        try:
            seconds = []
            for body in ('{"tags": []}', None):  # a new session; what needs the model waits for it
                path = "create_session" if body else "get_server_capabilities"
                while not answers(port, path, body):
                    if process.poll() is not None or time.monotonic() > start + 300:
                        raise RuntimeError(folder.with_suffix(".log").read_text()[-2000:])
                    time.sleep(0.02)
                seconds.append(time.monotonic() - start)
            yield port, (seconds[0], seconds[1]), process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def answers(port: int, path: str, body: str | None) -> bool:
    """Whether this request, a GET without a body, is answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("POST" if body else "GET", f"/api/v1/{path}", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    return False


def fill(folder: Path, live: int, recorded: int) -> None:
    """Puts sessions of earlier days into the records of a server that does not run: `live` that have not ended."""
    now = int(time.time() * 1e6)
    rows = [
        (f"s-{number:012x}", "local", "[]", "{}", "0.38.0", "", now, now, "active" if number < live else "cancelled")
        for number in range(live + recorded)
    ]
    with contextlib.closing(sqlite3.connect(folder / "service.sqlite")) as db, db:
        db.executemany(
            "INSERT INTO sessions (session_id, owner, tags, user_metadata, sdk_version, folded_name, created_at,"
            " last_heartbeat, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )


async def steps(port: int, count: int) -> list[float]:
    """Seconds of steps: forward_backward of 4 tokens and optim_step."""
    client = Client(port)
    session = await client.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 1}}
    model = (await client.result("create_model", **body))["model_id"]
    inputs = {"target_tokens": {"data": [5, 6, 7, 8], "dtype": "int64"}}
    data = [{"model_input": {"chunks": [{"tokens": [5, 6, 7, 8]}]}, "loss_fn_inputs": inputs}]
    given, took = {"loss_fn": "cross_entropy", "data": data}, []
    for number in range(count):
        start = time.perf_counter()
        await client.result("forward_backward", model_id=model, seq_id=2 * number + 1, forward_backward_input=given)
        await client.result("optim_step", model_id=model, seq_id=2 * number + 2, adam_params={"learning_rate": 1e-4})
        took.append(time.perf_counter() - start)
    return took[5:]


async def samples(
    port: int, count: int, settings: dict[str, Any], pause: float = 0.01, model: str = "tiny"
) -> list[float]:
    """Seconds of one-sample requests, one after the other."""
    client, took = Client(port), []
    sampler = await client.sampler(model)
    for number in range(count):
        start = time.perf_counter()
        await client.result(
            "asample", sampling_session_id=sampler, seq_id=number, prompt=PROMPT, sampling_params=settings
        )
        took.append(time.perf_counter() - start)
        await asyncio.sleep(pause)
    return took


@contextlib.asynccontextmanager
async def crowd(port: int, kind: str) -> AsyncIterator[None]:
    """One session that always has CROWD requests in flight, from a process of its own."""
    number, settings = CROWDS[kind]
    code = f"import asyncio, server_load; asyncio.run(server_load.press({port}, {number}, {settings!r}))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=Path(__file__).parent, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    session = (await process.stdout.readline()).decode().strip()
    try:
        yield
    finally:
        process.kill()
        await process.wait()
        await Client(port).call(f"sessions/{session}/finish", {"reason": {"type": "success"}})
        await asyncio.sleep(1)  # what it has in flight is withdrawn


async def press(port: int, number: int, settings: dict[str, Any]) -> None:
    """Keeps CROWD requests of `number` samples in flight for ever."""
    sampler, seq_ids = await Client(port).sampler(), iter(range(1 << 30))
    if not number:
        body = {"session_id": sampler.partition(":")[0], "model_seq_id": 0, "base_model": "tiny"}
        model = (await Client(port).result("create_model", lora_config={"rank": 32}, **body))["model_id"]
        next(seq_ids)
    tokens = [5 + place % 80 for place in range(128)]
    inputs = {"target_tokens": {"data": tokens, "dtype": "int64"}}
    rows = [{"model_input": {"chunks": [{"tokens": tokens}]}, "loss_fn_inputs": inputs}] * 64

    async def one() -> None:
        client = Client(port)
        while not number:
            given = {"loss_fn": "cross_entropy", "data": rows}
            await client.result("forward_backward", model_id=model, seq_id=next(seq_ids), forward_backward_input=given)
        while True:
            body = {"prompt": PROMPT, "num_samples": number, "sampling_params": settings}
            await client.result("asample", sampling_session_id=sampler, seq_id=next(seq_ids), **body)

    tasks = [asyncio.ensure_future(one()) for _ in range(CROWD if number else 2)]
    await asyncio.sleep(2)
    print(sampler.partition(":")[0], flush=True)
    await asyncio.gather(*tasks)


async def two_small(port: int, count: int) -> list[float]:
    """Seconds of the requests of two small clients."""
    return sum(await asyncio.gather(*(samples(port, count, SMALL) for _ in range(2))), [])


async def fairness(port: int, rounds: int, count: int = 100) -> dict[str, Any]:
    """p95 of two small clients alone and beside each crowd, and the ratios."""
    found: dict[str, list[float]] = {"alone": []}
    await two_small(port, 20)
    for _ in range(rounds):
        for kind in CROWDS:
            found["alone"] += await two_small(port, count)
            async with crowd(port, kind):
                found.setdefault(kind, []).extend(await two_small(port, count))
    p95 = {name: float(np.percentile(took, 95)) for name, took in found.items()}
    return {"p95_seconds": p95, "ratio": {kind: p95[kind] / p95["alone"] for kind in CROWDS}}


def door(
    port: int, pid: int, clients: int = DOOR_CLIENTS, requests: int = DOOR_REQUESTS, model: str = "tiny"
) -> dict[str, float]:
    """Processor milliseconds for each of `requests` samples by that many clients, each with one in flight: of
    the server's threads but the main one, and of the main one (the worker, and the model). A sample is two requests
    of HTTP. The clients run in a process of their own."""
    before = [thread_seconds(pid, main) for main in (False, True)]
    code = f"import asyncio, server_load; asyncio.run(server_load.many({port}, {clients}, {requests}, {model!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    after = [thread_seconds(pid, main) for main in (False, True)]
    spent = [1000 * (b - a) / requests for a, b in zip(before, after, strict=True)]
    return {"door_ms": round(spent[0], 4), "worker_ms": round(spent[1], 4), **json.loads(done.stdout)}


async def many(port: int, clients: int, requests: int, model: str) -> None:
    """The clients of `door`; prints requests a second and the 95th percentile of a request."""
    took: list[float] = []

    async def one() -> None:
        settings = {"max_tokens": 16, "stop": []}
        took.extend(await samples(port, requests // clients, settings, pause=0.0, model=model))

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - start
    print(json.dumps({"requests_per_second": requests / seconds, "p95_seconds": float(np.percentile(took, 95))}))


def thread_seconds(pid: int, main: bool) -> float:
    """Processor seconds so far of a process's first thread, or of all others that are left."""
    ticks = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (int(task.name) == pid) == main:
            values = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def quantiles(took: list[float]) -> dict[str, float]:
    """p50, p99 and the longest."""
    return {"p50": float(np.median(took)), "p99": float(np.percentile(took, 99)), "max": max(took)}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--live", type=int, default=100_000)
    parser.add_argument("--recorded", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", choices=("door", "sessions", "fairness"))
    parser.add_argument("--ranks", type=int, default=1, help="of the server whose fairness is measured")
    parser.add_argument("--model", default="", help="a folder with pretrained weights")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.model:
        own = Path(args.model).absolute()
        options = (f"model.path={own}", "model.dtype=bfloat16", "run.threads=1")
        with tempfile.TemporaryDirectory() as name, serving(Path(name) / "state", options) as (port, _, pid):
            for round in range(args.rounds + 1):  # the first is warm-up
                for clients, requests in PRETRAINED.items():
                    found = door(port, pid, clients, requests, own.name)
                    if round:
                        figures.setdefault(f"clients_{clients}", []).append(found)
        print(json.dumps(figures, indent=1))
        if args.write:
            print(write(f"server_load_{own.name}", {"clients": figures}))
        return
    with tempfile.TemporaryDirectory() as name:
        empty, full = Path(name) / "empty", Path(name) / "full"
        if args.only in (None, "door"):
            with serving(empty) as (port, _, pid):
                figures["door"] = [door(port, pid) for _ in range(args.rounds + 1)][1:]  # the first is warm-up
        if args.only in (None, "sessions"):
            seen: dict[str, Any] = {name: {"starts": [], "loads": [], "took": []} for name in ("empty", "full")}
            for folder in (empty, full):
                with serving(folder):
                    pass
            fill(full, args.live, args.recorded)
            for _ in range(args.rounds):
                for folder in (empty, full):
                    with serving(folder) as (port, start, _):
                        seen[folder.name]["starts"].append(start[0])
                        seen[folder.name]["loads"].append(start[1])
                        seen[folder.name]["took"] += asyncio.run(steps(port, args.steps))
            figures["sessions"] = {
                "live": args.live,
                "recorded": args.recorded,
                **{
                    kind: {
                        "step_seconds": quantiles(one["took"]),
                        "start_seconds": sorted(one["starts"]),  # until it answers
                        "loaded_seconds": sorted(one["loads"]),
                    }
                    for kind, one in seen.items()
                },
            }
        if args.only in (None, "fairness"):
            with serving(empty, ranks=args.ranks) as (port, *_):
                figures["fairness"] = asyncio.run(fairness(port, args.rounds))
    print(json.dumps(figures, indent=1))
    if args.write:
        ranks = f"_{args.ranks}_ranks" if args.ranks > 1 else ""
        print(write("server_load" + (f"_{args.only}" if args.only else "") + ranks, figures))


if __name__ == "__main__":
    main()
