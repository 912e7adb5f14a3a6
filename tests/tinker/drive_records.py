"""Steps of drive.py: state, listings and refusals."""

from __future__ import annotations

import io
import tarfile
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker
from driving import (
    RELEASE,
    Run,
    Skip,
    adam,
    datum,
    failure,
    floats,
    learn_rows,
    logprobs_of,
    loss_of,
    needs,
    params,
    policy_rows,
    step,
    takes,
    text_input,
    texts,
    wait,
)
from tinker import types

# ---- state --------------------------------------------------------------------------------------------------------


def two_losses(model: Any, run: Run) -> list[float]:
    losses = []
    for _ in range(2):
        losses.append(loss_of(wait(model.forward_backward(learn_rows(run), "cross_entropy"))))
        wait(model.optim_step(adam(2e-2)))
    losses.append(loss_of(wait(model.forward(learn_rows(run), "cross_entropy"))))
    return losses


@step
def create_from_state(run: Run) -> dict:
    """From the state of step 8: weights alone, and (where known) with the optimizer, twice the same."""
    plain = wait(run.service.create_training_client_from_state(run.state_path))
    facts: dict[str, Any] = {"rank": getattr(plain.get_info(), "lora_rank", None)}
    facts["plain"] = two_losses(plain, run)
    if hasattr(run.service, "create_training_client_from_state_with_optimizer"):
        for name in ("whole", "again"):
            model = wait(run.service.create_training_client_from_state_with_optimizer(run.state_path))
            facts[name] = two_losses(model, run)
    return facts


@step
def load_state(run: Run) -> dict:
    """Into a fresh model, and into one that was trained (which the hosted service does not allow)."""
    fresh = run.train(seed=4)
    wait(fresh.load_state(run.state_path))
    used = run.train(seed=4)
    wait(used.forward_backward(learn_rows(run), "cross_entropy"))
    wait(used.optim_step(adam(1e-2)))
    wait(used.load_state(run.state_path))
    facts = {"fresh": two_losses(fresh, run), "used": two_losses(used, run)}
    if hasattr(fresh, "load_state_with_optimizer"):
        wait(used.load_state_with_optimizer(run.state_path))
        facts["whole"] = two_losses(used, run)
    return facts


@step
def resumed_equals_unbroken(run: Run) -> dict:
    """Two steps after a save, and two steps of the model created from that save: bit for bit."""
    if not hasattr(run.service, "create_training_client_from_state_with_optimizer"):
        raise Skip(f"{tinker.__version__} cannot load an optimizer")
    model = run.train(seed=9)
    two_losses(model, run)
    path = wait(model.save_state("half")).path
    unbroken = two_losses(model, run)
    resumed = two_losses(wait(run.service.create_training_client_from_state_with_optimizer(path)), run)
    return {"unbroken": unbroken, "resumed": resumed}


# ---- records ------------------------------------------------------------------------------------------------------


def checkpoints(run: Run, run_id: str) -> dict[str, Any]:
    return {c.checkpoint_id: c for c in wait(run.rest.list_checkpoints(run_id)).checkpoints}


@step
def records(run: Run) -> dict:
    run.run_id = run.learner.get_info().model_id
    listing = wait(run.rest.list_training_runs(limit=100))
    one = wait(run.rest.get_training_run(run.run_id))
    by_path = wait(run.rest.get_training_run_by_tinker_path(run.state_path))
    found = checkpoints(run, run.run_id)
    return {
        "listed": run.run_id in [r.training_run_id for r in listing.training_runs],
        "run": {key: str(value) for key, value in one.model_dump().items()},
        "by_path": by_path.training_run_id == run.run_id,
        "checkpoints": {key: [c.checkpoint_type, c.tinker_path] for key, c in found.items()},
        "sizes": [getattr(c, "size_bytes", None) for c in found.values()],
    }


@step
def user_listings(run: Run) -> dict:
    every = wait(needs(run.rest, "list_user_checkpoints")(limit=1000))
    session_id = run.run_id.rsplit(":train:", 1)[0]
    sessions = wait(run.rest.list_sessions(limit=1000)).sessions
    one = wait(run.rest.get_session(session_id))
    sampler = wait(run.rest.get_sampler(one.sampler_ids[0]))
    info = wait(run.rest.get_weights_info_by_tinker_path(run.state_path))
    return {
        "checkpoints": run.state_path in [c.tinker_path for c in every.checkpoints],
        "total": every.cursor is not None and every.cursor.total_count >= len(every.checkpoints),
        "session": session_id in sessions,
        "runs": run.run_id in one.training_run_ids,
        "sampler_base": sampler.base_model == run.base_model,
        "weights": [info.base_model == run.base_model, info.is_lora, info.lora_rank == run.rank],
    }


@step
def publish(run: Run) -> dict:
    put = needs(run.rest, "publish_checkpoint_from_tinker_path")
    for _ in range(2):  # twice: the second finds it public already
        wait(put(run.state_path))
    public = checkpoints(run, run.run_id)["weights/step-8"].public
    for _ in range(2):
        wait(run.rest.unpublish_checkpoint_from_tinker_path(run.state_path))
    return {"public": public, "private": not checkpoints(run, run.run_id)["weights/step-8"].public}


@step
def ttl(run: Run) -> dict:
    put = needs(run.rest, "set_checkpoint_ttl_from_tinker_path")
    wait(put(run.state_path, 7200))
    expires = checkpoints(run, run.run_id)["weights/step-8"].expires_at
    wait(put(run.state_path, None))
    kept = checkpoints(run, run.run_id)["weights/step-8"].expires_at
    wait(run.learner.save_weights_for_sampler("short", ttl_seconds=3600))
    short = checkpoints(run, run.run_id)["sampler_weights/short"].expires_at
    return {
        "expires_in": expires.timestamp() - time.time(),
        "kept": kept is None,
        "short": short.timestamp() - time.time(),
    }


@step
def overwrite(run: Run) -> dict:
    if not takes(tinker.TrainingClient.save_state, "overwrite"):
        raise Skip(f"{tinker.__version__} has no overwrite")
    model = run.train(seed=8)
    first = two_losses(model, run)[-1]
    wait(model.save_state("one"))
    last = two_losses(model, run)[-1]
    path = wait(model.save_state("one", overwrite=True)).path
    back = wait(run.service.create_training_client_from_state(path))
    return {"first": first, "last": last, "back": loss_of(wait(back.forward(learn_rows(run), "cross_entropy")))}


@step
def checkpoint_metadata(run: Run) -> dict:
    if not takes(tinker.TrainingClient.save_state, "user_metadata"):
        raise Skip(f"{tinker.__version__} has no metadata of checkpoints")
    wait(run.learner.save_state("noted", user_metadata={"loss": "low"}))
    noted = checkpoints(run, run.run_id)["weights/noted"].user_metadata
    return {"metadata": noted}


@step
def archive(run: Run) -> dict:
    ask = needs(run.rest, "get_checkpoint_archive_url_from_tinker_path")
    url = wait(ask(run.sampler_path)).url
    with urllib.request.urlopen(url, timeout=30) as reply:  # noqa: S310
        body = reply.read()
    with tarfile.open(fileobj=io.BytesIO(body), mode="r:*") as tar:
        names = [member.name for member in tar.getmembers() if member.isfile()]
    return {"names": sorted(name.rsplit("/", 1)[-1] for name in names)}


@step
def external(run: Run) -> dict:
    put = needs(run.learner, "save_weights_external")
    path = wait(put("plain")).path
    reply = wait(run.rest.get_external_weights_urls(path))
    files = {}
    for name, url in reply.urls.items():
        with urllib.request.urlopen(url, timeout=30) as body:  # noqa: S310
            files[name] = len(body.read())
    return {"path": path, "files": files}


@step
def delete(run: Run) -> dict:
    path = wait(run.learner.save_state("doomed")).path
    there = "weights/doomed" in checkpoints(run, run.run_id)
    wait(
        run.rest.delete_checkpoint_from_tinker_path(path)
        if hasattr(run.rest, "delete_checkpoint_from_tinker_path")
        else run.rest.delete_checkpoint(run.run_id, "weights/doomed")
    )
    gone = "weights/doomed" not in checkpoints(run, run.run_id)
    return {"there": there, "gone": gone, "load": failure(lambda: run.service.create_training_client_from_state(path))}


@step
def newer_records(run: Run) -> dict:
    """Search, copies, projects, usage, audit: whatever this release has."""
    session_id = run.run_id.rsplit(":train:", 1)[0]
    facts: dict[str, Any] = {}
    if hasattr(run.rest, "search_sessions"):
        request = types.SessionSearchRequest(owner=types.AccessibleSearchOwner(), limit=200)
        reply = wait(run.rest.search_sessions(request))
        facts["search"] = session_id in [s.session_id for s in reply.sessions]
    if hasattr(run.service, "copy_weights"):
        # The newest copies into a project; before, into the session.
        rest = getattr(run.rest, "copy_weights", None)
        path = wait(rest(run.state_path, "project-1") if rest else run.service.copy_weights(run.state_path))
        back = wait(run.service.create_training_client_from_state(path))
        facts["copy"] = [path != run.state_path, loss_of(wait(back.forward(learn_rows(run), "cross_entropy")))]
    if hasattr(run.rest, "assign_session_project"):
        wait(run.rest.assign_session_project(session_id, "project-1"))
        facts["project"] = True
    if hasattr(run.rest, "get_billing_usage") and RELEASE >= (0, 28, 0):
        usage = wait(run.rest.get_billing_usage("2026-01-01", "2026-01-02"))
        facts["billing"] = len(usage.data)
    if hasattr(run.rest, "get_audit_log"):
        facts["audit"] = len(wait(run.rest.get_audit_log()).entries)
    if hasattr(run.rest, "export_session_trace"):
        facts["trace"] = failure(lambda: run.rest.export_session_trace(session_id))
    if not facts:
        raise Skip(f"{tinker.__version__} has none of these")
    return facts


# ---- refusals -----------------------------------------------------------------------------------------------------


@step
def refusals(run: Run) -> dict:
    """What is asked for wrongly fails with a user's error that names it; the model goes on."""
    ids = texts(run)[0]
    huge = [*ids[:3], 10**6, *ids[3:]]
    facts: dict[str, Any] = {}

    def forward(data: list, loss: str = "cross_entropy", config: dict | None = None) -> Callable[[], Any]:
        return lambda: run.model.forward_backward(data, loss, loss_fn_config=config)

    facts["vocabulary"] = failure(forward([datum(huge)]))
    facts["negative token"] = failure(forward([datum([*ids[:3], -5, *ids[3:]])]))
    facts["target"] = failure(forward([datum([*ids, 10**6])]))
    facts["ragged"] = failure(forward([datum(ids, weights=floats([1.0, 1.0]))]))
    # JSON clients fail on it themselves, after taking a number for it: the server must get over the gap.
    facts["nan"] = failure(forward([datum(ids, weights=floats([np.nan] * (len(ids) - 1)))]))
    facts["missing input"] = failure(forward([datum(ids)], "ppo"))
    facts["config key"] = failure(forward(policy_rows(run)[0], "ppo", {"clip_hihg": 1.0}))
    facts["too long"] = failure(forward([datum([5] * 9000)]))
    facts["prompt"] = failure(lambda: run.base.sample(text_input([5] * 9000), 1, params()))
    facts["prompt token"] = failure(lambda: run.base.sample(text_input([10**6, 5]), 1, params()))
    facts["no checkpoint"] = failure(
        lambda: run.service.create_training_client_from_state("tinker://no:train:0/weights/x")
    )
    facts["base model"] = failure(
        lambda: run.service.create_lora_training_client(base_model="no/such-model", rank=4).get_info()
    )
    if RELEASE >= (0, 25, 0):  # before, the client itself checks the name
        facts["loss"] = failure(forward([datum(ids)], "no_such_loss"))
    if RELEASE >= (0, 36, 0):
        facts["stable_reinforce"] = failure(forward(policy_rows(run)[0], "stable_reinforce"))
    # What was pending beside a failed call is not stepped on, and the step says so; then everything goes on.
    spoilt = failure(lambda: run.model.optim_step(adam(1e-3)))
    rows = [datum(ids, weights=floats(np.ones(len(ids) - 1))) for ids in texts(run)]
    untouched = logprobs_of(wait(run.model.forward(rows, "cross_entropy")))
    wait(run.model.forward_backward(rows, "cross_entropy"))
    wait(run.model.optim_step(adam(1e-3)))
    return {"refused": facts, "step_after": spoilt, "alive": len(untouched) == 3}


@step
def dimuon(run: Run) -> dict:
    if not hasattr(types, "DimuonParams"):
        raise Skip(f"{tinker.__version__} has no dimuon")
    step_only = failure(lambda: run.model.optim_step(types.DimuonParams(learning_rate=1e-3)))
    config = getattr(types, "DimuonOptimizerConfig", None)
    model = failure(lambda: run.train(optimizer=config()).get_info()) if config else None
    return {"refused_step": step_only, "refused_model": model}


@step
def close(run: Run) -> dict:
    wait(needs(run.service, "close")("success"))
    return {}
