"""Whole evaluations of a small model, and what a training run makes of sets: in this process, but for two ranks."""

import json

import lowercase  # noqa: F401
import pytest
from gloo import run_ranks
from loop import LOOP
from small import SMALL

from skyrl.checkpoint.folder import latest
from skyrl.config.load import load_config
from skyrl.run_dir import RunReader, final_values, read_metrics
from skyrl.sweep import play
from skyrl.trainers import evaluate as module
from skyrl.types import UserError

SETS = "eval.sets=[{name: drawn, env: lowercase, samples_per_prompt: 3, temperature: 1.0},{env: lowercase}]"
OWN = ["experiment=custom", "model=tiny", "env.name=lowercase", "plugins=[lowercase]"]
SHORT = ["sampler.max_new_tokens=6", "tracking.console=off", "run.threads=1", "eval.num_prompts=8"]


def evaluate(*options):
    cfg = load_config([*options, *SHORT], mode="evaluate")
    play(cfg, "evaluate", sweep=False)
    return json.loads(open(f"{cfg.run.dir}/evaluation.json").read())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on `lowercase`, with a set beside its held-out prompts."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    more = [
        *OWN,
        "eval.every_steps=1",
        "checkpoint.export=true",
    ]
    cfg = load_config([*SMALL, *LOOP, f"run.dir={folder}", *more, SETS])
    play(cfg, "train", sweep=False)
    return folder


def test_a_training_run_evaluates_its_sets_beside_its_held_out_prompts(trained):
    records = read_metrics(trained / "metrics.jsonl")
    assert [record["step"] for record in records if "eval/drawn/pass@2:mean" in record] == [0, 1, 2]
    last = records[-1]
    assert last["eval/episodes:sum"] == 4 and last["eval/drawn/episodes:sum"] == 12
    assert last["eval/lowercase/reward:mean"] == last["eval/reward:mean"]  # the same prompts, greedy, the same way
    assert last["eval/drawn/reward/low:mean"] <= last["eval/drawn/reward:mean"] <= last["eval/drawn/reward/high:mean"]
    assert "eval/pass@1:mean" not in last and "eval/reward/low:mean" not in last
    assert {"eval-drawn-000002", "eval-lowercase-000002", "eval-000002"} <= set(RunReader(trained).dumps())


def test_a_checkpoint_is_evaluated_with_its_runs_options_as_the_run_was(trained, tmp_path):
    last = final_values(trained / "metrics.jsonl")
    found = evaluate(f"model={trained}", f"run.dir={tmp_path}/held-out", "eval.num_prompts=4")
    assert list(found["sets"]) == ["lowercase"]
    reward = found["sets"]["lowercase"]["metrics"]["reward"]["value"]
    assert reward == pytest.approx(last["eval/reward:mean"], rel=1e-12)
    assert found["sets"]["lowercase"]["training_prompts"] == 0 and found["model"].endswith("checkpoints/000002")
    assert json.loads((tmp_path / "held-out/result.json").read_text())["state"] == "evaluated"
    assert final_values(tmp_path / "held-out/metrics.jsonl")["eval/reward:mean"] == last["eval/reward:mean"]
    again = evaluate(f"model={trained}/export", f"run.dir={tmp_path}/export", "eval.num_prompts=4")
    assert again["sets"] == found["sets"]


def on_rank(options):
    return evaluate(*options)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_say_what_one_says(trained, tmp_path):
    one = evaluate(f"model={trained}", SETS, f"run.dir={tmp_path}/one")
    run_ranks(2, on_rank, [f"model={trained}", SETS, f"run.dir={tmp_path}/two", *SHORT])
    assert json.loads((tmp_path / "two/evaluation.json").read_text()) == one


def test_a_killed_evaluation_goes_on(trained, tmp_path, monkeypatch):
    one = evaluate(f"model={trained}", SETS, f"run.dir={tmp_path}/one")
    # As a kill leaves it: of three prompts all samples, of one some, of one a part of a line.
    file = tmp_path / "one/rollouts/eval-drawn-000000-r0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:10]) + lines[10][:50])
    (tmp_path / "one/rollouts/eval-lowercase-000000-r0.jsonl").unlink()
    (tmp_path / "one/evaluation.json").unlink()
    played, real = {}, module.play_set

    def noted(run, what, mine, **more):
        played[what.title] = [place for place, _ in mine]
        return real(run, what, mine, **more)

    monkeypatch.setattr(module, "play_set", noted)
    assert evaluate(f"model={trained}", SETS, f"run.dir={tmp_path}/one") == one
    assert played == {"drawn": [3, 4, 5, 6, 7], "lowercase": [*range(8)]}
    # Other options are another evaluation, of which nothing is taken up.
    played.clear()
    evaluate(f"model={trained}", SETS.replace("1.0", "0.5"), f"run.dir={tmp_path}/one")
    assert played["drawn"] == [*range(8)]


def test_a_damaged_checkpoint_and_a_tokenizer_that_does_not_fit_are_refused(trained, tmp_path):
    info = latest(trained / "checkpoints")
    copy = tmp_path / "checkpoints" / "000002"
    copy.mkdir(parents=True)
    for path in info.path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    name = next(name for name in info.files if name.endswith(".distcp"))
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        evaluate(f"model={copy}", f"run.dir={tmp_path}/damaged")
    with pytest.raises(UserError, match="tokenizer"):
        evaluate(f"model={trained}/export", "model.tokenizer=/nowhere", f"run.dir={tmp_path}/other")


# ---- early stop


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["eval.stop_when=eval/drawn/avg@3:mean >= 0"], 0),
        (["eval.patience=2", "checkpoint.best_metric=eval/episodes:sum"], 4),  # always the same: never better
    ],
)
def test_training_ends_early(options, steps, tmp_path):
    more = [*OWN, "eval.every_steps=2", "batch.num_steps=6", SETS]
    words = [*SMALL, *LOOP, f"run.dir={tmp_path}/run", *more]
    play(load_config([*words, *options]), "train", sweep=False)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == steps
    if steps == 4:
        assert latest(tmp_path / "run/checkpoints").tag == "000004"  # saved where it ended
        play(load_config([*words, *options]), "train", sweep=False)
        assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 4, "the same command has nothing left to do"
        play(load_config([*words, "eval.patience=0", *options[1:]]), "train", sweep=False)
        assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 6


def test_a_metric_that_evaluations_lack_is_refused_before_the_first_step(tmp_path):
    more = [*OWN, "eval.every_steps=2", "eval.stop_when=eval/luck:mean > 1"]
    with pytest.raises(UserError, match="eval.stop_when: the evaluation has no eval/luck:mean; it has: eval/accuracy"):
        play(load_config([*SMALL, *LOOP, f"run.dir={tmp_path}/run", *more]), "train", sweep=False)
