"""Runs that serve their policy and learn from what a user says of its answers, with such a user."""

from __future__ import annotations

import contextlib
import threading
from unittest import mock

import httpx
from loop import loop_config, train_here

from skyrl.feedback.queue import FeedbackQueue
from skyrl.trainers import live

LIVE = ["feedback.enabled=true", "service.port=0", "algorithm=reinforce_pp", "batch.samples_per_prompt=1",
        "algorithm.loss.recompute_old_logprobs=true", "algorithm.loss.correction=token_truncate"]  # fmt: skip


def live_config(folder, *overrides):
    return loop_config(folder, *LIVE, *overrides)


def user(url, told):
    """Asks and votes until the run ends: answers with more low characters than high ones are liked."""
    with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=url, timeout=60) as http:
        for number in range(1000):
            body = {"model": "tiny", "prompt": f"{number % 3}", "max_tokens": 3, "stream": number % 2 == 1}
            answer = http.post("/v1/completions", json=body)
            if answer.status_code != 200 or "data: [DONE]" not in answer.text and body["stream"]:
                return
            text = answer.text.removeprefix("data: ").partition("\n\n")[0] if body["stream"] else answer.text
            episode = httpx.Response(200, text=text).json()["id"]
            vote = {"id": episode, "reward": 1.0 if sum(map(ord, answer.text)) % 2 else -1.0}
            told.append((http.post("/feedback", json=vote).status_code, episode))


def served(cfg):
    """The run with a user beside rank 0; each rank's calls of forward_backward, and what the user was told."""
    told, threads = [], []
    real = live.start_http_server

    def start(*args, **kwargs):
        server = real(*args, **kwargs)
        threads.append(threading.Thread(target=user, args=(server.url, told)))
        threads[0].start()
        return server

    with mock.patch.object(live, "start_http_server", start):
        try:
            return train_here(cfg), told
        finally:
            for thread in threads:
                thread.join(60)


def taken(folder, steps):
    """The episodes of each step, as the queue has them."""
    queue = FeedbackQueue(folder / "feedback", live_config(folder).feedback)
    rows = [queue.take(str(folder), step, 1000, version=0) for step in steps]
    queue.close()
    return [[(row.episode, row.version) for row in part] for part in rows]
