"""A simulated population whose preference is known, learned from its votes alone: `python benchmarks/live_feedback.py`.

Each user has a key, asks over HTTP and votes up where the answer has the liked character, with a tenth of the votes
turned round. One user in four is hostile: it votes against the preference, votes for others' answers, sends its votes
again turned round, and sends numbers out of range. Printed for each seed: how often answers had the liked character in
the first and the last steps, and what was shut out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
from pathlib import Path
from unittest import mock

import httpx

import skyrl.trainers.live as live
from skyrl.config.load import load_config
from skyrl.run_dir import read_metrics

LIKED = "7"
USERS = 8


class Population:
    """USERS threads at one server, until it ends."""

    def __init__(self, seed: int) -> None:
        self.seed, self.seen, self.ids = seed, list[bool](), ["cmpl-none"]
        self.threads: list[threading.Thread] = []

    def start(self, url: str) -> None:
        """They begin to ask."""
        self.threads = [threading.Thread(target=self.live, args=(url, number)) for number in range(USERS)]
        for thread in self.threads:
            thread.start()

    def live(self, url: str, number: int) -> None:
        """One user. Ends when the server does."""
        rng, hostile = random.Random(f"{self.seed}/{number}"), number % 4 == 0
        with httpx.Client(base_url=url, headers={"x-api-key": f"tml-{number}"}, timeout=60) as http:
            while True:
                try:
                    body = {"model": "tiny", "prompt": str(rng.randrange(10)), "max_tokens": 6}
                    answer = http.post("/v1/completions", json=body)
                    if answer.status_code != 200:
                        return
                    told = answer.json()
                    good = LIKED in told["choices"][0]["text"]
                    self.seen.append(good)
                    vote = (good != (rng.random() < 0.1)) != hostile
                    http.post("/feedback", json={"id": told["id"], "thumbs": "up" if vote else "down"})
                    if hostile:
                        http.post("/feedback", json={"id": told["id"], "thumbs": "down" if vote else "up"})
                        http.post("/feedback", json={"id": rng.choice(self.ids[-50:]), "thumbs": "down"})
                        http.post("/feedback", json={"id": told["id"], "reward": rng.choice([1e9, float("-1000")])})
                    else:
                        self.ids.append(told["id"])
                except httpx.HTTPError:
                    return


def run(seed: int, steps: int, folder: str) -> dict[str, float]:
    """One run with its population; rates and counts."""
    os.environ["SKYRL_API_KEYS"] = ",".join(f"user{number}:tml-{number}" for number in range(USERS))
    cfg = load_config([
        "experiment=live_feedback", f"seed={seed}", f"run.dir={folder}/{seed}", f"batch.num_steps={steps}",
        "batch.prompts_per_step=32", "optim.lr=3e-3", "service.port=0", "feedback.rate_per_minute=100000",
        "model.tiny.hidden_size=32", "model.tiny.num_layers=2", "model.tiny.num_heads=2", "model.tiny.num_kv_heads=1",
        "model.tiny.ffn_size=48", "run.threads=1", "checkpoint.export=false", "tracking.console=off",
    ])  # fmt: skip
    population, real = Population(seed), live.start_http_server

    def start(*args, **more):  # type: ignore[no-untyped-def]
        server = real(*args, **more)
        population.start(server.url)
        return server

    with mock.patch.object(live, "start_http_server", start):
        live.train_live(cfg)
    for thread in population.threads:
        thread.join()
    records = [one for one in read_metrics(Path(folder) / str(seed) / "metrics.jsonl") if one["step"] > 0]
    part = max(1, len(population.seen) // 10)
    last = {key.split("/")[1]: one for key, one in records[-1].items() if key.startswith("feedback/")}
    return {
        "seed": seed,
        "liked_first_tenth": sum(population.seen[:part]) / part,
        "liked_last_tenth": sum(population.seen[-part:]) / part,
        "answers": len(population.seen),
        **last,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            print(json.dumps(run(seed, given.steps, folder)), flush=True)
