"""RL on live feedback: the policy answers users, and learns from what they say of its answers.

One process group is server and trainer. First all ranks serve the policy, from the very weights that are trained,
until enough of its answers are rated; then what is being drawn is finished, requests wait, a step is made from the
rated answers, and the next requests are drawn from its weights. The rest is `train_rl`: the losses correct for answers
of earlier weights, whose log-probabilities were kept.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyrl.config.schema import RunConfig
from skyrl.distributed.collectives import broadcast_object, on_leader
from skyrl.feedback.queue import KeptAnswer
from skyrl.loop import run_loop
from skyrl.rollout import Group
from skyrl.run import Run, Step
from skyrl.service.commands import RankContext, serve_commands
from skyrl.service.frontend import open_frontend, start_http_server
from skyrl.service.server import Service, lead
from skyrl.trainers.generation import note_groups, record_episodes, sampling
from skyrl.trainers.rl import train_rl
from skyrl.trainers.sft import sft_warmup
from skyrl.types import Episode, Prompt, Sample, Turn
from skyrl.web.auth import read_keys

STRETCH_SECONDS = 1.0  # of serving, between two looks at whether a rank was asked to stop


def train_live(cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """The whole run, as `trainers.rl.train`: batch.num_steps steps on rated answers, batch.prompts_per_step in each.
    Raises as that does, and UserError for an address, keys or a queue that cannot be used."""
    read_keys(cfg.service)  # who may come in is looked at before any weights are
    return run_loop(cfg, _train, hooks=hooks)


def _train(run: Run) -> None:
    sft_warmup(run)
    with _serving(run) as live:
        train_rl(run, live.collect)


@contextlib.contextmanager
def _serving(run: Run) -> Iterator[_Live]:
    """Serves the policy over HTTP, from rank 0, while `collect` is at work; requests wait meanwhile. Collective."""
    score_tokens = run.cfg.batch.max_tokens_per_microbatch
    live = _Live(RankContext(run.engine, score_tokens, model="policy"), str(Path(run.cfg.run.dir).resolve()))
    with contextlib.ExitStack() as stack:

        def open_door() -> None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="skyrl-service-"))  # nothing of it is kept
            queue = run.cfg.feedback.folder or f"{run.cfg.run.dir}/feedback"
            service, feedback = replace(run.cfg.service, folder=folder), replace(run.cfg.feedback, folder=queue)
            cfg, keys = replace(run.cfg, service=service, feedback=feedback), read_keys(service)
            frontend = open_frontend(cfg)
            stack.callback(frontend.close)
            live.service, live.shared = lead(frontend, live.context, ""), keys.shared
            live.queue = frontend.feedback
            server = start_http_server(frontend, weights=live.weights)
            stack.callback(server.stop)
            stack.callback(live.service.worker.sampling.abandon, "the run ends")
            stack.callback(live.service.scheduler.close, "the run ends")
            live.service.worker.check = server.check
            text = f"skyrl: serving {cfg.model.path} at {server.url}/v1; feedback: POST {server.url}/feedback"
            print(text, file=sys.stderr, flush=True)

        on_leader(run.world, open_door)
        yield live


@dataclass
class _Live:
    """One rank of a policy that is served and trained. `weights` is what the queue calls it; rank 0 has the service."""

    context: RankContext
    weights: str
    service: Service | None = None
    queue: Any = None  # the service's FeedbackQueue
    shared: bool = False  # there are keys of several owners

    def collect(self, run: Run, step: Step) -> tuple[list[Group], int]:
        """This rank's groups of rated answers, one for each prompt, and how many all ranks have: what `train_rl` wants.
        Serves until they are there. Collective."""
        with sampling(run, step):
            taken = self._serve(run, step)
        names = sorted({name for one in taken for name in one.objectives})
        run.objectives.names = [] if names == ["reward"] else names  # a plain reward is a number and no objective
        run.objectives.check(["reward", *run.cfg.feedback.objectives], "feedback.objectives")
        groups: dict[bytes, list[Episode]] = {}
        for one in taken:
            groups.setdefault(one.prompt.tobytes(), []).append(_episode(run, one))
        mine = step.deal(list(enumerate(groups.values())))
        for place, group in mine:
            for episode in group:
                episode.position = place
        keep_P = note_groups(run, step, [group for _, group in mine])
        record_episodes(run, step, [group for _, group in mine])
        if self.service is not None:
            for one in taken:
                behind = float(abs(run.engine.version("policy") - one.version))
                for key, value in (("delay_seconds:mean", one.seconds), ("versions_behind:max", behind)):
                    step.sums.add(f"feedback/{key}", value)
            for name, value in self.queue.counts().items():
                step.sums.add(f"feedback/{name}:sum", float(value))
        return [one for one, keep in zip(mine, keep_P, strict=True) if keep], len(groups)

    def _serve(self, run: Run, step: Step) -> list[KeptAnswer]:
        """Answers requests until the rows of this step are there, which every rank gets."""
        while True:
            found: list[KeptAnswer] = []

            def enough(found: list[KeptAnswer] = found) -> bool:
                count, version = run.cfg.batch.prompts_per_step, run.engine.version("policy")
                found += self.queue.take(self.weights, step.number, count, version=version, shared=self.shared)
                return bool(found)

            if self.service is None:
                serve_commands(run.world, self.context)
            else:
                self.service.worker.work(STRETCH_SECONDS, enough)
            step.check_stop()
            if taken := broadcast_object(run.world, found):
                return taken


def _episode(run: Run, one: KeptAnswer) -> Episode:
    """A rated answer as the loop knows episodes: one turn, with the ids and log-probabilities that were drawn."""
    chat = run.engine.chat
    prompt = Prompt(one.episode, "feedback", [{"role": "user", "content": chat.decode(one.prompt.tolist())}])
    sample = Sample(one.episode, one.tokens, one.logprobs, one.stop, one.version)
    turn = Turn(one.prompt, sample, text=chat.read(one.tokens.tolist(), int(one.prompt[-1])))
    turn.objectives = one.objectives if run.objectives.names else {}
    turn.reward, turn.scale = run.objectives.combine(one.objectives)
    return Episode(prompt, one.choice, [turn], turn.reward, one.stop)
