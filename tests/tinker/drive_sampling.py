"""Steps of drive.py: saves, samples and log-probabilities."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import tinker
from driving import (
    PROMPT,
    Run,
    Skip,
    adam,
    datum,
    draw,
    failure,
    floats,
    learn_rows,
    logprobs_of,
    params,
    step,
    takes,
    tensor,
    text_input,
    wait,
)

# ---- sampling -----------------------------------------------------------------------------------------------------


@step
def save(run: Run) -> dict:
    state = wait(run.learner.save_state("step-8"))
    sampler = wait(run.learner.save_weights_for_sampler("step-8"))
    run.state_path, run.sampler_path = state.path, sampler.path
    run.ephemeral = wait(run.learner.save_weights_and_get_sampling_client())
    run.named = wait(run.service.create_sampling_client(model_path=run.sampler_path))
    run.base = wait(run.service.create_sampling_client(base_model=run.base_model))
    again = failure(lambda: run.learner.save_state("step-8"))
    return {"state_path": state.path, "sampler_path": sampler.path, "again": again}


@step
def sample(run: Run) -> dict:
    prompt = run.ids(PROMPT)
    first = draw(run.ephemeral, prompt, 3, stop=[])
    again = draw(run.ephemeral, prompt, 3, stop=[])
    other = draw(run.ephemeral, prompt, 3, stop=[], seed=12)
    named = draw(run.named, prompt, 3, stop=[])

    def tokens(response: Any) -> list[list[int]]:
        return [list(map(int, s.tokens)) for s in response.sequences]

    ids = [getattr(s, "sequence_id", None) for s in first.sequences]
    return {
        "tokens": tokens(first),
        "lengths": [len(s.tokens) for s in first.sequences],
        "logprobs": [len(s.logprobs) for s in first.sequences],
        "reasons": [str(s.stop_reason) for s in first.sequences],
        "again_equal": tokens(first) == tokens(again),
        "others_differ": tokens(first) != tokens(other),
        "siblings_differ": len({tuple(x) for x in tokens(first)}) == 3,
        "named_equal": tokens(first) == tokens(named),
        "sequence_ids_distinct": ids[0] is None or len(set(ids)) == 3,
    }


@step
def stops(run: Run) -> dict:
    """Every kind of stop cuts the same draw at the first place where it applies, itself included."""
    prompt = run.ids(PROMPT)
    whole = [int(t) for t in draw(run.base, prompt, stop=[], max_tokens=24).sequences[0].tokens]
    plain = [
        i
        for i, t in enumerate(whole)
        if i >= 3 and t < 256 and run.tokenizer.decode([t]).isascii() and t not in whole[:i]
    ]
    at = plain[0]
    text = run.tokenizer.decode([whole[at]])
    first = next(i for i, t in enumerate(whole) if text in run.tokenizer.decode(whole[: i + 1]))
    facts: dict[str, Any] = {"whole": len(whole)}
    for name, stop in {"string": text, "strings": ["never~~", text], "ids": [whole[at]]}.items():
        sequence = draw(run.base, prompt, stop=stop, max_tokens=24).sequences[0]
        end = at if name == "ids" else first
        facts[name] = {
            "right": [int(t) for t in sequence.tokens] == whole[: end + 1],
            "reason": str(sequence.stop_reason),
            "logprobs": len(sequence.logprobs) == len(sequence.tokens),
        }
    short = draw(run.base, prompt, stop=[], max_tokens=1).sequences[0]
    facts["one"] = [len(short.tokens), str(short.stop_reason)]
    return facts


@step
def end_of_sequence(run: Run) -> dict:
    """Without a stop the model's own end of sequence ends it: a model that was taught to end does."""
    model = run.train(seed=3)
    end = run.tokenizer.eos_token_id
    ids = [*run.ids("ab"), end]
    for _ in range(25):
        model.forward_backward([datum(ids, weights=floats([0.0, 1.0]))], "cross_entropy")
        last = model.optim_step(adam(5e-2))
    wait(last)
    client = wait(model.save_weights_and_get_sampling_client())
    default = draw(client, run.ids("ab"), temperature=0.0).sequences[0]
    strings = draw(client, run.ids("ab"), temperature=0.0, stop=["never~~"]).sequences[0]
    none = draw(client, run.ids("ab"), temperature=0.0, stop=[], max_tokens=5).sequences[0]
    return {
        "default": [[int(t) for t in default.tokens] == [end], str(default.stop_reason)],
        "strings": [[int(t) for t in strings.tokens] == [end], str(strings.stop_reason)],
        "none": [len(none.tokens), int(none.tokens[0]) == end, str(none.stop_reason)],
    }


@step
def greedy_and_cuts(run: Run) -> dict:
    prompt = run.ids(PROMPT)
    zero = [draw(run.named, prompt, stop=[], temperature=0.0, seed=s).sequences[0].tokens for s in (1, 2)]
    one = draw(run.named, prompt, stop=[], top_k=1).sequences[0].tokens
    nucleus = draw(run.named, prompt, stop=[], top_p=1e-6).sequences[0].tokens
    return {"equal": list(zero[0]) == list(zero[1]) == list(one) == list(nucleus)}


@step
def logprobs_agree(run: Run) -> dict:
    """Sampled, prompt and computed log-probs against the training forward of the same tokens."""
    prompt = run.ids(PROMPT)
    sequence = draw(run.named, prompt, stop=[], max_tokens=16).sequences[0]
    hot = draw(run.named, prompt, stop=[], max_tokens=16, temperature=2.0, seed=4).sequences[0]
    whole = prompt + [int(t) for t in sequence.tokens]
    trained = logprobs_of(wait(run.learner.forward([datum(whole)], "cross_entropy")))[0]
    sampled = np.asarray(sequence.logprobs, np.float64)
    computed = wait(run.named.compute_logprobs(text_input(whole)))
    response = draw(run.named, whole, more={"include_prompt_logprobs": True}, max_tokens=1)
    prompts = list(response.prompt_logprobs)
    return {
        "sampled": float(np.abs(sampled - trained[len(prompt) - 1 :]).max()),
        "computed": float(np.abs(np.asarray(computed[1:], np.float64) - trained).max()),
        "prompt": float(np.abs(np.asarray(prompts[1:], np.float64) - trained).max()),
        "first_missing": [prompts[0] is None, computed[0] is None],
        "lengths": [len(computed) == len(whole), len(prompts) == len(whole)],
        "hot_differs": bool(len(hot.logprobs) == 16),
    }


@step
def hot_logprobs(run: Run) -> dict:
    """At temperature 2 the reported log-probs are of the scaled distribution: rebuilt from the top 268 at 1."""
    if not takes(run.named.sample, "topk_prompt_logprobs"):
        raise Skip("no topk_prompt_logprobs")
    prompt = run.ids(PROMPT)
    hot = draw(run.named, prompt, stop=[], max_tokens=6, temperature=2.0).sequences[0]
    whole = prompt + [int(t) for t in hot.tokens]
    entries = len(run.tokenizer)
    response = draw(
        run.named, whole, more={"include_prompt_logprobs": True, "topk_prompt_logprobs": entries}, max_tokens=1
    )
    errors = []
    for position, (token, reported) in enumerate(zip(hot.tokens, hot.logprobs, strict=True), start=len(prompt)):
        row = dict(response.topk_prompt_logprobs[position])
        scaled = {t: value / 2.0 for t, value in row.items()}
        norm = math.log(sum(math.exp(value) for value in scaled.values()))
        errors.append(abs(scaled[int(token)] - norm - reported))
    return {"error": max(errors), "entries": len(row) == entries}


@step
def topk_prompt(run: Run) -> dict:
    prompt = run.ids(PROMPT)
    response = draw(run.named, prompt, more={"include_prompt_logprobs": True, "topk_prompt_logprobs": 4}, max_tokens=1)
    rows = response.topk_prompt_logprobs
    ordered = all(all(a[1] >= b[1] for a, b in zip(r, r[1:], strict=False)) for r in rows[1:])
    bounded = all(r[0][1] >= lp - 1e-6 for r, lp in zip(rows[1:], response.prompt_logprobs[1:], strict=True))
    return {
        "length": len(rows) == len(prompt),
        "first": not rows[0],
        "k": {len(r) for r in rows[1:]} == {4},
        "ordered": ordered,
        "bounded": bounded,
    }


@step
def topk_sample(run: Run) -> dict:
    if not takes(run.named.sample, "topk_sample_logprobs"):
        raise Skip(f"{tinker.__version__} has no topk_sample_logprobs")
    sequence = draw(run.named, run.ids(PROMPT), more={"topk_sample_logprobs": 3}, stop=[], temperature=0.0).sequences[0]
    rows = sequence.topk_logprobs
    greedy = all(int(row[0][0]) == int(token) for row, token in zip(rows, sequence.tokens, strict=True))
    return {"k": {len(row) for row in rows} == {3}, "greedy_first": greedy}


@step
def targets(run: Run) -> dict:
    if not takes(run.named.sample, "target_prompt_logprobs"):
        raise Skip(f"{tinker.__version__} has no target_prompt_logprobs")
    prompt = run.ids(PROMPT)
    wanted = np.stack([prompt[1:], np.full(len(prompt) - 1, -1)], axis=1)
    more = {"include_prompt_logprobs": True, "target_prompt_logprobs": tensor(wanted, np.int64)}
    response = draw(run.named, prompt, more=more, max_tokens=1)
    got = np.asarray(response.target_prompt_logprobs.to_numpy())
    own = np.asarray(response.prompt_logprobs[1:], np.float64)
    return {
        "shape": got.shape == wanted.shape,
        "error": float(np.abs(got[:, 0] - own).max()),
        "minus_one": bool((got[:, 1] == 0).all()),
    }


@step
def last_n(run: Run) -> dict:
    if not takes(run.named.compute_logprobs, "prompt_logprobs_last_n"):
        raise Skip(f"{tinker.__version__} has no prompt_logprobs_last_n")
    prompt = run.ids(PROMPT)
    whole = wait(run.named.compute_logprobs(text_input(prompt)))
    part = wait(run.named.compute_logprobs(text_input(prompt), prompt_logprobs_last_n=4))
    tail = np.abs(np.asarray(part[-4:], np.float64) - np.asarray(whole[-4:], np.float64)).max()
    return {"missing": all(x is None for x in part[:-4]), "length": len(part) == len(prompt), "error": float(tail)}


@step
def alternatives(run: Run) -> dict:
    if not takes(run.named.sample, "prompt_alt_tokens_k"):
        raise Skip(f"{tinker.__version__} has no prompt_alt_tokens")
    prompt = run.ids(PROMPT)
    got = draw(run.named, prompt, more={"prompt_alt_tokens_k": 2}, max_tokens=1).prompt_alt_tokens
    ids, logprobs = np.asarray(got.tokens.to_numpy()), np.asarray(got.logprobs.to_numpy())
    shape = [len(prompt) - 1, 2]
    return {"shapes": [list(ids.shape) == shape, list(logprobs.shape) == shape], "negative": bool((logprobs < 0).all())}


@step
def snapshots_stay(run: Run) -> dict:
    """Two more steps of training change neither the ephemeral nor the named snapshot."""
    prompt = run.ids(PROMPT)
    before = [draw(client, prompt, stop=[]).sequences[0] for client in (run.ephemeral, run.named)]
    for _ in range(2):
        run.learner.forward_backward(learn_rows(run), "cross_entropy")
        wait(run.learner.optim_step(adam(2e-2)))
    after = [draw(client, prompt, stop=[]).sequences[0] for client in (run.ephemeral, run.named)]
    new = draw(wait(run.learner.save_weights_and_get_sampling_client()), prompt, stop=[]).sequences[0]
    pairs = zip(before, after, strict=True)
    return {
        "equal": all(list(a.tokens) == list(b.tokens) and list(a.logprobs) == list(b.logprobs) for a, b in pairs),
        "new_differs": list(new.logprobs) != list(after[0].logprobs),
    }


@step
def inflight(run: Run) -> dict:
    if not takes(tinker.TrainingClient.save_weights_and_get_sampling_client, "kind"):
        raise Skip(f"{tinker.__version__} has no kinds of snapshots")
    client = wait(run.learner.save_weights_and_get_sampling_client(kind="inflight"))
    snapshot = wait(run.learner.save_weights_and_get_sampling_client(kind="snapshot"))
    one, other = (draw(c, run.ids(PROMPT), stop=[]).sequences[0].tokens for c in (client, snapshot))
    return {"equal": list(one) == list(other)}


@step
def clone(run: Run) -> dict:
    """A pickled copy of a sampling client, as other processes use it: its numbers are beyond 32 bits."""
    if "__reduce__" not in vars(type(run.named)):
        raise Skip(f"{tinker.__version__} cannot pickle sampling clients")
    prompt = run.ids(PROMPT)
    copy = pickle.loads(pickle.dumps(run.named))
    one, other = (draw(client, prompt, stop=[]).sequences[0].tokens for client in (run.named, copy))
    another = draw(copy, prompt, stop=[], seed=5).sequences[0].tokens
    return {"equal": list(one) == list(other), "distinct": list(other) != list(another)}


@step
def many_at_once(run: Run) -> dict:
    """Forty requests in flight; each equals the same request alone."""
    prompt = run.ids(PROMPT)
    futures = [run.base.sample(text_input(prompt), 1, params(stop=[], seed=i)) for i in range(40)]
    got = [[int(t) for t in wait(future).sequences[0].tokens] for future in futures]
    alone = [[int(t) for t in draw(run.base, prompt, stop=[], seed=i).sequences[0].tokens] for i in (0, 17, 39)]
    return {"equal": alone == [got[0], got[17], got[39]], "distinct": len({tuple(x) for x in got})}
