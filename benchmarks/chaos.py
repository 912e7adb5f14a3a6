"""Kills runs at random, damages their checkpoints and fills their disks; holds what comes out against a quiet run.

    python benchmarks/chaos.py [--kills 60] [--seed 1] [--write]

Each run folder suffers up to three kills, each in a new start of the same command, and is then finished; its metrics
must be those of the uninterrupted run, bit for bit. Ends with 1 when anything was not as promised: a corrupt state
loaded, more lost than the save interval, other numbers, a job that did not end. Uses the launcher of tests/system.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "system"), str(ROOT / "benchmarks")]

from common import write  # noqa: E402
from launcher import LETTERS, Warm, lines_in, when  # noqa: E402

from skyrl.checkpoint.folder import list_checkpoints  # noqa: E402
from skyrl.run_dir import read_metrics  # noqa: E402
from skyrl.tracking.base import without_wall_clock  # noqa: E402

SAVE_EVERY = 2  # of LETTERS
WARMUP, STEPS = 4, 6
RUN = [*LETTERS, "run.dir=run", "plugins=[letters,pace]", "run.hang_seconds=20"]
PHASES = ("opening", "warm-up", "generation", "training", "evaluation", "saving")
KINDS = (("SIGKILL", "one"), ("SIGKILL", "all"), ("SIGTERM", "one"), ("SIGTERM", "all"), ("SIGUSR1", "one"))


def records(run: Path) -> list[dict[str, Any]]:
    """What must be equal, of each step."""
    return [without_wall_clock(record) for record in read_metrics(run / "metrics.jsonl")]


def newest(run: Path) -> dict[str, Any]:
    """The state of the newest complete checkpoint; that of a fresh start without one."""
    known = list_checkpoints(run / "checkpoints") if (run / "checkpoints").exists() else []
    return known[-1].state if known else {"phase": "warmup", "step": 0, "global_step": 0, "unrecorded": False}


def choose(rng: random.Random, run: Path) -> tuple[str, int]:
    """A phase and step that the next start will go through."""
    state = newest(run)
    left = {"warm-up": [], "generation": [], "training": [], "evaluation": [], "opening": [0], "saving": [0]}
    if state["phase"] == "warmup":
        left["warm-up"] = list(range(state["step"] + 1, WARMUP + 1))
        left["evaluation"] = [WARMUP]
    first = state["step"] + 1 if state["phase"] == "rl" else 1
    left["generation"] = left["training"] = list(range(first, STEPS + 1))
    left["evaluation"] = left["evaluation"] or [step for step in (2, 4, 6) if step >= first]
    phase = rng.choice([phase for phase in PHASES if left[phase]])
    return phase, rng.choice(left[phase])


def strike(warm: Warm, rng: random.Random, place: Path, async_save: bool) -> dict[str, Any] | None:
    """One start that is killed; what happened, or None when it ended before its place was reached.

    Steps lost: those that had been recorded, and are not in the newest checkpoint."""
    run = place / "run"
    phase, step = choose(rng, run)
    (name, who), victim = rng.choice(KINDS), rng.randrange(2)
    for rank in (0, 1):
        (place / f"in-{rank}").unlink(missing_ok=True)
    watched = 0 if phase == "saving" else victim
    reached = when((place / f"in-{watched}").exists, delay=rng.random() * 0.5)
    seen: dict[str, Any] = {}

    def now() -> bool:
        if not seen and reached():
            # while it opens, the lines of the start before are not cut back yet
            recorded = lines_in(run / "metrics.jsonl") if phase != "opening" else newest(run)["global_step"]
            seen.update(recorded=recorded, at=time.monotonic())
            return True
        return False

    done = warm.run(
        *RUN,
        f"checkpoint.async_save={str(async_save).lower()}",
        cwd=place,
        ranks=2,
        kill=now,
        only=[victim] if who == "one" else (),
        number=getattr(signal, name),
        before=f"import os; os.environ['SKYRL_PACE'] = '{phase}:{step}:0.6'",
    )
    if not seen:
        return None
    state = newest(run) if run.exists() else {"global_step": 0, "unrecorded": False}
    result = {
        "phase": phase,
        "step": step,
        "kind": f"{name} {who}",
        "async_save": async_save,
        "exit_code": done.code,
        "seconds_to_end": round(time.monotonic() - seen["at"], 2),
        "steps_lost": max(0, seen["recorded"] - state["global_step"] + state["unrecorded"]),
        "problem": "",
    }
    limit = SAVE_EVERY if name == "SIGKILL" else 0
    if result["steps_lost"] > limit:
        result["problem"] = f"lost {result['steps_lost']} steps"
    if name != "SIGKILL" and done.code not in (75, 0):
        result["problem"] = f"exit code {done.code}: {done.stderr[-600:]}"
    return result


def kills(warm: Warm, rng: random.Random, whole: list[dict[str, Any]], count: int, scratch: Path) -> list[dict]:
    """`count` kills over as many run folders as that takes."""
    out: list[dict[str, Any]] = []
    while len(out) < count:
        place = Path(tempfile.mkdtemp(dir=scratch))
        async_save = rng.random() < 0.5
        struck = [one for one in (strike(warm, rng, place, async_save) for _ in range(3)) if one is not None]
        done = warm.run(*RUN, cwd=place, ranks=2)
        equal = done.code == 0 and records(place / "run") == whole
        for one in struck:
            one["equal_in_the_end"] = equal
            if not equal:
                one["problem"] = one["problem"] or f"finished with {done.code}, other numbers: {done.stderr[-600:]}"
        out += struck
        print(f"{len(out)} kills", Counter(one["problem"] or "sound" for one in out), flush=True)
        shutil.rmtree(place)
    return out


def damage(warm: Warm, rng: random.Random, whole: Path, count: int, scratch: Path) -> list[dict[str, Any]]:
    """Flips a bit of, or cuts, a file of the newest checkpoint: it must be refused, and the one before it work."""
    out = []
    for number in range(count):
        place = Path(tempfile.mkdtemp(dir=scratch))
        shutil.copytree(whole, place / "run")
        for path in (place / "run" / "checkpoints").iterdir():
            if path.name > "000008":
                shutil.rmtree(path)
        file = rng.choice(sorted(p for p in (place / "run" / "checkpoints" / "000008").iterdir() if p.is_file()))
        data, how = bytearray(file.read_bytes()), ("bit flipped", "truncated")[number % 2]
        if how == "bit flipped":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        done = warm.run(*RUN, cwd=place, ranks=2)
        told = re.search(r"run\.resume=(\S+/\d{6})", done.stderr)
        problem = ""
        if done.code != 2 or len(done.stderr.splitlines()) != 1 or told is None:
            problem = f"exit code {done.code}: {(done.stderr or done.stdout)[-600:]}"
        else:
            done = warm.run(*RUN, f"run.resume={told[1]}", cwd=place, ranks=2)
            if done.code != 0 or records(place / "run") != records(whole):
                problem = f"the checkpoint before: exit code {done.code}: {done.stderr[-600:]}"
        out.append({"file": file.name, "kind": how, "problem": problem})
        shutil.rmtree(place)
    return out


def disks(warm: Warm, rng: random.Random, whole: list[dict[str, Any]], count: int, scratch: Path) -> list[dict]:
    """Disks that are too small, or that become read-only; [] without the right to mount one."""
    out: list[dict[str, Any]] = []
    for number in range(count):
        place = Path(tempfile.mkdtemp(dir=scratch))
        disk, how = place / "disk", ("full disk", "read-only")[number % 2]
        disk.mkdir()
        size = rng.randrange(600, 1300) if how == "full disk" else 20_000
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            return out
        try:
            options = [option.replace("run.dir=run", "run.dir=disk/run") for option in RUN]
            after = rng.randrange(1, 9)

            def lock(disk: Path = disk, after: int = after) -> bool:
                if lines_in(disk / "run" / "metrics.jsonl") >= after:
                    subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
                return False

            done = warm.run(*options, cwd=place, ranks=2, kill=lock if how == "read-only" else None)
            problem = "" if done.code in (0, 2) else f"exit code {done.code}: {done.stderr[-600:]}"
            if done.code == 2 and len([line for line in done.stderr.splitlines() if "error" in line]) != 1:
                problem = f"not one line: {done.stderr[-600:]}"
            shutil.copytree(disk / "run", place / "run")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        again = warm.run(*RUN, cwd=place, ranks=2)
        if again.code != 0 or records(place / "run") != whole:
            problem = problem or f"on a sound disk: exit code {again.code}: {again.stderr[-600:]}"
        out.append({"kind": how, "exit_code": done.code, "problem": problem})
        shutil.rmtree(place)
    return out


def table(struck: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each phase and kind: kills, sound ones, worst loss in steps, worst seconds to the end."""
    rows = []
    for phase in PHASES:
        for kind in sorted({one["kind"] for one in struck}):
            here = [one for one in struck if (one["phase"], one["kind"]) == (phase, kind)]
            if here:
                rows.append(
                    {
                        "phase": phase,
                        "kind": kind,
                        "kills": len(here),
                        "sound": sum(not one["problem"] for one in here),
                        "most_steps_lost": max(one["steps_lost"] for one in here),
                        "most_seconds_to_end": max(one["seconds_to_end"] for one in here),
                    }
                )
    return rows


def main() -> int:
    """Runs everything and prints the table; 1 when something was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damages", type=int, default=12)
    parser.add_argument("--disks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rng, warm = random.Random(f"chaos {args.seed}"), Warm()
    try:
        with tempfile.TemporaryDirectory(prefix="skyrl-chaos-") as name:
            scratch = Path(name)
            quiet = scratch / "quiet"
            quiet.mkdir()
            done = warm.run(*RUN, cwd=quiet, ranks=2)
            assert done.code == 0, done.stderr
            whole = records(quiet / "run")
            struck = kills(warm, rng, whole, args.kills, scratch)
            damaged = damage(warm, rng, quiet / "run", args.damages, scratch)
            filled = disks(warm, rng, whole, args.disks, scratch)
    finally:
        warm.close()
    problems = [one for one in [*struck, *damaged, *filled] if one["problem"]]
    figures = {
        "seed": args.seed,
        "ranks": 2,
        "save_interval_steps": SAVE_EVERY,
        "kills": len(struck),
        "damaged_checkpoints": len(damaged),
        "bad_disks": len(filled),
        "problems": problems,
        "most_steps_lost": {
            kind: max((one["steps_lost"] for one in struck if one["async_save"] is flag), default=0)
            for kind, flag in (("saves that are waited for", False), ("saves in the background", True))
        },
        "by_phase_and_kind": table(struck),
        "damage": damaged,
        "disks": filled,
    }
    print(json.dumps(figures, indent=1))
    if args.write:
        print(write("chaos", figures))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
