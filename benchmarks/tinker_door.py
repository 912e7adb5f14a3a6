"""What a server of its own costs against a service in the script's program (skyrl.tinker), and what many clients see.

    SKYRL_TEST_CLIENTS=<folder> python benchmarks/tinker_door.py [--write] [--ranks 2]

Needs the newest SDK release (make test-tinker downloads it). Steps are measured with two sizes of the tests' Qwen3: one
like the default of skyrl.serve (3 million parameters), and one of 0.2 million, which hardly computes, so that its
ratio is that of the overhead alone. The rest is measured with the small one. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, write

sys.path[:0] = [str(ROOT / "tests" / "tinker"), str(ROOT / "tests" / "system")]

from clients import NEWEST, client_environment, release_path  # noqa: E402
from hub import MODEL, make_hub  # noqa: E402
from launcher import environment  # noqa: E402
from serving import Server, serve  # noqa: E402

HERE = Path(__file__).resolve().parent / "tinker"
STEP = {"kind": "step", "model": MODEL, "prompts": 64, "samples": 8}
SIZES: dict[str, dict[str, int]] = {"3M": {"hidden": 256, "layers": 4}, "0.2M": {"hidden": 64, "layers": 2}}
STEPS = {"3M": 4, "0.2M": 7}
FIRST = {"kind": "first_sample", "model": MODEL, "steps": 30}


def over_http(server: Server, hub: Path, order: dict) -> dict[str, Any]:
    """One measurement in a client process; with the CPU seconds of the door's threads in rank 0 during it."""
    before = door_seconds(server)
    command = [sys.executable, str(HERE / "workload.py"), json.dumps(order)]
    env = client_environment(server.url, release_path(NEWEST, download=True))
    done = subprocess.run(command, cwd=hub, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{order}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "door_cpu_seconds": door_seconds(server) - before}


def in_process(hub: Path, order: dict, ranks: int) -> dict[str, Any]:
    """The same measurement inside a torchrun program, by skyrl.tinker (a client without HTTP until 2026-11-28)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(HERE / "in_process.py"), json.dumps(order), str(hub / MODEL), str(out), folder]
        done = subprocess.run(command, cwd=hub, env=environment(), capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError(f"{order} in process: exit code {done.returncode}\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def steps(hub: Path, folder: Path, size: str, ranks: int, rounds: int) -> dict[str, Any]:
    """Both ways in turn, several times: on a shared machine neighbouring minutes differ more than the two doors do."""
    order, seen = {**STEP, "steps": STEPS[size]}, []
    for i in range(rounds):
        direct = in_process(hub, order, ranks)
        with serve(folder / f"{size}-{i}", hub / MODEL, ranks=ranks, aliases=(MODEL,)) as server:
            seen.append({"http": over_http(server, hub, order), "in_process": direct})
        print(f"{size}, round {i}: {seen[-1]['http']['total']:.3f} s, in process {direct['total']:.3f} s", flush=True)
    return {"what": order, "model": SIZES[size], "rounds": seen}


def door_seconds(server: Server) -> float:
    """CPU seconds so far of all threads but the main one in the process that listens: event loop, parsing, store.

    torch's own worker threads count too; with run.threads=1 there are none that compute.
    """
    port = int(server.url.rsplit(":", 1)[1])
    pid = listener(port, server.process.pid)
    ticks = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) != pid:
            values = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(values[11]) + int(values[12])
    return ticks / 100.0


def listener(port: int, root: int) -> int:
    """The process under `root` that listens on the port."""
    wanted = f":{port:04X} "
    nodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and f"{line.split()[1]} ".endswith(wanted)
    }
    for pid in [root, *children(root)]:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(fd.readlink())
            except FileNotFoundError:  # closed meanwhile
                continue
            if target.startswith("socket:[") and target[8:-1] in nodes:
                return pid
    raise RuntimeError(f"nobody under process {root} listens on port {port}")


def children(pid: int) -> list[int]:
    """All descendants."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures: dict[str, Any] = {"ranks": args.ranks, "sdk": NEWEST}
    with tempfile.TemporaryDirectory() as folder:
        for size, shape in SIZES.items():
            hub = make_hub(Path(folder) / f"hub-{size}", **shape)
            figures[f"step_{size}"] = measured = steps(hub, Path(folder), size, args.ranks, args.rounds)
            ratios = sorted(one["http"]["total"] / one["in_process"]["total"] for one in measured["rounds"])
            measured["http_over_in_process_median"] = ratios[len(ratios) // 2]
        with serve(Path(folder) / "many", hub / MODEL, ranks=args.ranks, aliases=(MODEL,)) as server:
            figures["first_sample"] = over_http(server, hub, FIRST)
            figures["concurrent"] = [
                {"tenants": tenants, "at_once": at_once, **over_http(server, hub, order(tenants, at_once))}
                for tenants in (1, 4, 16)
                for at_once in (1, 16, 256)
            ]
    print(json.dumps(figures, indent=1))
    if args.write:
        print(write("tinker_door", figures))


def order(tenants: int, at_once: int) -> dict[str, Any]:
    """Enough requests for some seconds of work."""
    requests = {1: 60, 16: 480, 256: 1536}[at_once]
    return {"kind": "concurrent", "model": MODEL, "tenants": tenants, "at_once": at_once, "requests": requests}


if __name__ == "__main__":
    main()
