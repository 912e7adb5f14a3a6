"""What must be true of the facts that drive.py tells; one function per step, each raising AssertionError."""

from __future__ import annotations

import math
from collections.abc import Callable

CHECKS: dict[str, Callable[[dict], None]] = {}
# Largest difference of a log-probability between the sampler and the training forward, float32 on a CPU.
LOGPROB = 1e-4
# First and last of the tested releases that have what a step needs.
NOW = (0, 38, 0)
KNOWN_BY = {
    "sparse_targets": ((0, 18, 2), NOW),
    "clipping": ((0, 7, 0), NOW),
    "topk_sample": ((0, 30, 4), NOW),
    "targets": ((0, 30, 4), NOW),
    "last_n": ((0, 34, 0), NOW),
    "alternatives": ((0, 34, 0), NOW),
    "inflight": ((0, 38, 0), NOW),
    "clone": ((0, 13, 1), NOW),
    "resumed_equals_unbroken": ((0, 7, 0), NOW),
    "user_listings": ((0, 7, 0), NOW),
    "publish": ((0, 7, 0), NOW),
    "ttl": ((0, 13, 1), NOW),
    "overwrite": ((0, 22, 7), NOW),
    "checkpoint_metadata": ((0, 28, 1), NOW),
    "archive": ((0, 3, 0), (0, 34, 0)),
    "external": ((0, 28, 1), NOW),
    "newer_records": ((0, 22, 7), NOW),
    "dimuon": ((0, 30, 4), NOW),
    "close": ((0, 28, 1), NOW),
}


def check(function: Callable[[dict], None]) -> Callable[[dict], None]:
    """Adds the check of the step of this name."""
    CHECKS[function.__name__] = function
    return function


def problems(facts: dict, base_model: str) -> dict[str, str]:
    """Step -> what is wrong with it; empty when everything is right. A step that never ran is wrong too, and so is one
    that was left out although this release has what it needs."""
    release = tuple(int(part) for part in facts["release"]["release"].split("."))
    wrong = {} if "end" in facts else {"end": "the script did not come to its end"}
    for name, judge in CHECKS.items():
        seen = facts.get(name)
        first, last = KNOWN_BY.get(name, ((0,), (999,)))
        if seen is None:
            wrong[name] = "did not run"
        elif ("left_out" in seen) != (not first <= release <= last):
            wrong[name] = f"release {release} {'left it out' if 'left_out' in seen else 'should not know it'}"
        elif "left_out" in seen:
            continue
        elif not seen["ok"]:
            wrong[name] = seen["error"]
        else:
            try:
                judge({**seen, "base_model": base_model})
            except AssertionError as error:
                wrong[name] = f"{error} { ({k: v for k, v in seen.items() if k not in ('ok', 'seconds')}) }"[:1500]
    return wrong


@check
def session(seen: dict) -> None:
    assert seen["base_model"] in seen["models"], "the alias is not among the supported models"


@check
def create(seen: dict) -> None:
    head, _, number = seen["model_id"].partition(":train:")
    assert head and number.isdigit(), "model id is not {session}:train:{number}"
    assert seen["model_name"] == seen["base_model"], "get_info names another model"
    assert seen["is_lora"] in (True, None) and seen["lora_rank"] in (8, None), "rank"
    assert seen["arch"], "arch is empty"


@check
def tokenizer(seen: dict) -> None:
    assert seen["entries"] == 268 and seen["round"] == seen["text"]


@check
def same_seed(seen: dict) -> None:
    assert seen["fresh_equal"], "a fresh adapter is not the base bit for bit"
    assert seen["seed_equal"] and seen["seeds_differ"], "seeds"


@check
def forward(seen: dict) -> None:
    assert seen["lengths_right"] and seen["one_colon"]
    assert abs(seen["loss_error"]) < 1e-3
    assert -12 < seen["mean_logprob"] < -2


@check
def forward_keeps_gradient(seen: dict) -> None:
    assert seen["equal"], "a forward left a gradient"


@check
def policy_losses(seen: dict) -> None:
    assert {"importance_sampling", "ppo"} <= {name.partition("[")[0] for name in seen["errors"]}
    assert max(seen["errors"].values()) < 1e-3, "a loss differs from its formula"


@check
def per_token_thresholds(seen: dict) -> None:
    assert seen["error"] < 1e-3


@check
def weights_of_every_kind(seen: dict) -> None:
    assert max(seen["errors"].values()) < 2e-3


@check
def many_targets(seen: dict) -> None:
    assert seen["shape_right"], "shape is not (N, K)"
    assert seen["column_error"] < 1e-5 and seen["loss_error"] < 1e-3


@check
def sparse_targets(seen: dict) -> None:
    assert seen["went_sparse"] and seen["equal"] and seen["loss_difference"] < 1e-5


@check
def custom_loss(seen: dict) -> None:
    assert seen["metric"] == seen["tokens"]
    assert seen["equal"] < 1e-5, "another gradient than the same by hand"


@check
def learn(seen: dict) -> None:
    losses = seen["losses"]
    assert losses[-1] < 0.8 * losses[0], "the loss does not fall"
    norm = [value for name, value in seen["step_metrics"].items() if "grad_norm" in name]
    assert norm and math.isfinite(norm[0]) and norm[0] > 0, "no grad_norm"


@check
def accumulate(seen: dict) -> None:
    assert seen["difference"] < 1e-5, "two calls and one step differ from one call"


@check
def clipping(seen: dict) -> None:
    assert 0 < seen["clipped"] < 0.2 * seen["free"], "grad_clip_norm does nothing"


@check
def save(seen: dict) -> None:
    for path, kind in ((seen["state_path"], "weights"), (seen["sampler_path"], "sampler_weights")):
        scheme, rest = path.split("://")
        assert scheme == "tinker" and rest.split("/")[1:] == [kind, "step-8"], "path is not of three parts"
    assert seen["again"]["type"] and seen["again"]["category"] == "user", "an existing name was saved again"


@check
def sample(seen: dict) -> None:
    assert seen["lengths"] == seen["logprobs"] == [12, 12, 12], "lengths"
    assert all("length" in reason.lower() for reason in seen["reasons"]), "stop reasons"
    assert seen["again_equal"] and seen["others_differ"] and seen["siblings_differ"], "seeds"
    assert seen["named_equal"], "named and ephemeral snapshot of one state differ"
    assert seen["sequence_ids_distinct"]


@check
def stops(seen: dict) -> None:
    assert seen["whole"] == 24
    for kind in ("string", "strings", "ids"):
        assert seen[kind]["right"] and seen[kind]["logprobs"], f"stop as {kind}"
        assert "stop" in seen[kind]["reason"].lower(), f"stop as {kind}: reason"
    assert seen["one"][0] == 1 and "length" in seen["one"][1].lower()


@check
def end_of_sequence(seen: dict) -> None:
    for kind in ("default", "strings"):
        assert seen[kind][0] and "stop" in seen[kind][1].lower(), f"end of sequence with {kind}"
    assert seen["none"][0] == 5 and seen["none"][1] and "length" in seen["none"][2].lower(), "stop=[] stopped"


@check
def greedy_and_cuts(seen: dict) -> None:
    assert seen["equal"]


@check
def logprobs_agree(seen: dict) -> None:
    assert max(seen["sampled"], seen["computed"], seen["prompt"]) < LOGPROB
    assert all(seen["first_missing"]) and all(seen["lengths"]) and seen["hot_differs"]


@check
def hot_logprobs(seen: dict) -> None:
    assert seen["error"] < LOGPROB and seen["entries"], "not the temperature-scaled distribution"


@check
def topk_prompt(seen: dict) -> None:
    assert all(seen[key] for key in ("length", "first", "k", "ordered", "bounded"))


@check
def topk_sample(seen: dict) -> None:
    assert seen["k"] and seen["greedy_first"]


@check
def targets(seen: dict) -> None:
    assert seen["shape"] and seen["minus_one"] and seen["error"] < 1e-5


@check
def last_n(seen: dict) -> None:
    assert seen["missing"] and seen["length"] and seen["error"] < 1e-5


@check
def alternatives(seen: dict) -> None:
    assert all(seen["shapes"]) and seen["negative"]


@check
def snapshots_stay(seen: dict) -> None:
    assert seen["equal"], "a snapshot changed"
    assert seen["new_differs"], "a new snapshot is the old one"


@check
def inflight(seen: dict) -> None:
    assert seen["equal"]


@check
def clone(seen: dict) -> None:
    assert seen["equal"] and seen["distinct"]


@check
def many_at_once(seen: dict) -> None:
    assert seen["equal"] and seen["distinct"] > 30


@check
def create_from_state(seen: dict) -> None:
    assert seen["rank"] in (8, None), "the rank is not the checkpoint's"
    if "whole" in seen:
        assert seen["whole"] == seen["again"], "the same state twice gives other steps"
        assert seen["whole"][0] == seen["plain"][0], "the same weights give another loss"
        assert seen["whole"][2] != seen["plain"][2], "the optimizer's state makes no difference"


@check
def load_state(seen: dict) -> None:
    assert seen["fresh"] == seen["used"], "loading into a trained model keeps something of it"
    if "whole" in seen:
        assert seen["whole"][0] == seen["fresh"][0] and seen["whole"][2] != seen["fresh"][2]


@check
def resumed_equals_unbroken(seen: dict) -> None:
    assert seen["unbroken"] == seen["resumed"], "not bit-identical after resuming"


@check
def records(seen: dict) -> None:
    assert seen["listed"] and seen["by_path"]
    run = seen["run"]
    assert run["base_model"] == seen["base_model"] and run["is_lora"] == "True"
    assert "purpose" in run.get("user_metadata", "purpose"), "metadata of the run is lost"
    assert run["last_checkpoint"] != "None" and run.get("last_sampler_checkpoint", "") != "None", "last checkpoints"
    kinds = {key: value[0] for key, value in seen["checkpoints"].items()}
    assert kinds["weights/step-8"] == "training" and kinds["sampler_weights/step-8"] == "sampler"
    assert all(size is None or size > 0 for size in seen["sizes"])


@check
def user_listings(seen: dict) -> None:
    assert all(seen[key] for key in ("checkpoints", "total", "session", "runs", "sampler_base"))
    assert all(seen["weights"])


@check
def publish(seen: dict) -> None:
    assert seen["public"] and seen["private"]


@check
def ttl(seen: dict) -> None:
    assert 7000 < seen["expires_in"] <= 7210 and seen["kept"] and 3400 < seen["short"] <= 3610


@check
def overwrite(seen: dict) -> None:
    assert seen["back"] == seen["last"] != seen["first"]


@check
def checkpoint_metadata(seen: dict) -> None:
    assert seen["metadata"] == {"loss": "low"}


@check
def archive(seen: dict) -> None:
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(seen["names"])


@check
def external(seen: dict) -> None:
    assert "/external_weights/plain" in seen["path"]
    names = {name.rsplit("/", 1)[-1]: size for name, size in seen["files"].items()}
    assert names["adapter_config.json"] > 0 and names["adapter_model.safetensors"] > 1000


@check
def delete(seen: dict) -> None:
    assert seen["there"] and seen["gone"]
    assert seen["load"]["type"], "a deleted checkpoint was loaded"


@check
def newer_records(seen: dict) -> None:
    assert seen.get("search", True)
    if "copy" in seen:
        assert seen["copy"][0], "copy_weights gave the source's path"
    if "trace" in seen:
        assert not seen["trace"]["type"] or len(seen["trace"]["message"]) > 20, "a trace is refused without a word"


@check
def refusals(seen: dict) -> None:
    for name, error in seen["refused"].items():
        assert error["type"], f"{name}: accepted"
        by_future = error["type"] == "RequestFailedError" and error["category"] == "user"
        by_status = error["status"] in (400, 404)
        by_client = name == "nan" and error["type"] == "ValueError" and "JSON" in error["message"]
        assert by_future or by_status or by_client, f"{name}: {error}"
        assert len(error["message"]) > 20, f"{name}: says nothing"
    assert seen["step_after"]["category"] == "user", "a step on half a gradient was made"
    assert seen["alive"]


@check
def dimuon(seen: dict) -> None:
    for error in (seen["refused_step"], seen["refused_model"]):
        assert error["type"] and "dimuon" in error["message"].lower(), str(error)
        assert error["category"] == "user", str(error)


@check
def close(seen: dict) -> None:
    pass
