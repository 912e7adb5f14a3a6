"""What eval.sets may hold, what a wrong entry is told, and which prompts count as seen in training."""

import dataclasses
import json
from collections import Counter

import pytest
import yaml

from skyrl.config.eval_sets import eval_sets, evaluation_options, longest_answer, read_condition
from skyrl.config.load import load_config, to_dict
from skyrl.config.validation import check
from skyrl.evaluation.sets import all_prompts, named_sets, overlapping, text_keys
from skyrl.types import Prompt, UserError


def config(*sets, **options):
    cfg = load_config([])
    return dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, sets=list(sets), **options))


def test_an_entry_is_the_runs_environment_a_recipe_or_an_environment():
    own, recipe, bare, changed = eval_sets(
        config(
            "arithmetic",
            "smollm2_arithmetic",
            "single_turn",
            {
                "name": "hard",
                "env": "gsm8k",
                "path": "x.jsonl",
                "max_turns": 2,
                "temperature": 1,
                "samples_per_prompt": 4,
            },
        )
    )
    cfg = load_config([])
    assert own.own and own.env == cfg.env and own.prefix == "eval/arithmetic/"
    assert recipe.env.name == "arithmetic" and recipe.env.options["reward"] == "last_digits" and not recipe.own
    assert recipe.max_new_tokens == 8 and bare.max_new_tokens == 16 and bare.env.options == {}
    assert (changed.env.name, changed.env.max_turns, changed.max_new_tokens) == ("gsm8k", 2, 1024)
    assert (changed.data.eval_path, changed.samples_per_prompt, changed.name) == ("x.jsonl", 4, "hard")
    assert longest_answer(config("gsm8k")) == 1024


@pytest.mark.parametrize(
    ("entry", "options", "said"),
    [
        (5, {}, "eval.sets: 5: wanted a name, or a mapping"),
        ({"env": 5}, {}, "wanted a name, or a mapping"),
        ({"name": "reward", "env": "gsm8k"}, {}, "none of reward, env and workers"),
        ({"name": "a/b", "env": "gsm8k"}, {}, "a name has letters, digits"),
        ({"name": "gsm8k", "samples": 2}, {}, "no such key 'samples'; a set has name, env,"),
        ({"name": "gsm8k", "num_prompts": 0}, {}, "num_prompts=0; wanted 1 or more"),
        ({"name": "gsm8k", "num_prompts": True}, {}, "num_prompts=True"),
        ({"name": "gsm8k", "temperature": -1}, {}, "temperature=-1; wanted 0"),
        ({"name": "gsm8k", "temperature": float("nan")}, {}, "temperature=nan; wanted 0"),
        ({"name": "gsm8k", "temperature": 1e-9}, {}, "temperature=1e-09; wanted 0"),
        ("preference", {}, "rows of env.name=preference are to be learned and give no reward"),
        ({"name": "gsm8k", "samples_per_prompt": 4}, {}, "gsm8k: 4 greedy episodes of one prompt are all equal"),
        ("gsm8k", {"k": [2]}, r"eval.k=\[2\] is above its samples_per_prompt=1; draw more"),
        ("gsm8k", {"k": [0]}, r"eval.k=\[0\]: wanted numbers of samples"),
        ("gsm8k", {"stop_when": "accuracy 0.9"}, "eval.stop_when=accuracy 0.9: wanted a metric, one of"),
        ("gsm8k", {"patience": 2, "every_steps": 0}, "eval.every_steps=0: eval.stop_when and eval.patience look at"),
    ],
)
def test_wrong_entries_are_one_line(entry, options, said):
    with pytest.raises(UserError, match=said) as told:
        check(config(entry, **options))
    assert "\n" not in str(told.value)


def test_sets_that_cannot_be_had_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for sets, said in (
        (["gsm8kk"], "eval.sets: gsm8kk: no environment or recipe is called 'gsm8kk'; did you mean one of: gsm8k"),
        (["gsm8k"], "eval.sets: gsm8k: data.path is empty.*give the set its file"),
        ([{"name": "gsm8k", "path": str(tmp_path / "empty.jsonl")}], "eval.sets: gsm8k: .*has no rows"),
        ([{"name": "gsm8k", "path": "nowhere.jsonl"}], "eval.sets: gsm8k: .*nowhere.jsonl.*no such file"),
        ([{"name": "gsm8k", "options": {"tone": 1}}], "eval.sets: gsm8k: env.options.tone"),
        (["arithmetic", "arithmetic"], "two sets are called 'arithmetic'"),
    ):
        with pytest.raises(UserError, match=said):
            all_prompts(config(*sets), evaluates=True)
    with pytest.raises(UserError, match="eval.sets is empty: say what is evaluated"):
        all_prompts(load_config(["model=tiny", "sampler.max_new_tokens=4"], mode="evaluate"), evaluates=True)


def prompt(text, number=0, **extra):
    return Prompt(f"x/{number}", "x", [{"role": "user", "content": text}], extra)


def test_overlap_is_found_through_case_space_and_instructions():
    question = "Tom has 3 apples and buys 4 more. How many apples does he have now?"
    train = [prompt("1+2="), prompt(f"{question}\nThink step by step."), prompt("What is 2+2?")]
    keys = Counter(key for some in text_keys(train) for key in some)
    instruction = "End with one line that holds nothing but the final answer, a number."
    seen = [
        prompt("1 +2="),
        prompt("1+2= "),
        prompt(f"{question.upper()}\n{instruction}"),
        prompt(f"New?\n{instruction}"),
    ]
    assert overlapping(keys, seen) == [1, 2]
    assert overlapping(keys, [prompt("What is 2+2?", 1), prompt("What is 2+2?", 2)]) == []  # tells no task from another
    assert overlapping(keys, [prompt("1-2=")]) == []


def test_a_set_that_was_trained_on_is_said_by_name(tmp_path):
    rows = [{"question": f"What is {i} plus 1, and why would it be so?", "answer": f"#### {i + 1}"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[4:6], {**rows[0], "question": "?"}])
    )
    cfg = load_config(["experiment=gsm8k", "model=tiny", f"data.path={tmp_path}/train.jsonl"])
    sets = [{"name": "leaked", "env": "gsm8k", "path": f"{tmp_path}/other.jsonl", "options": {"instruction": "Go."}}]
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, sets=sets))
    made, lines = named_sets(cfg, all_prompts(cfg, evaluates=False)[0])
    assert [(one.title, one.overlap) for one in made] == [("gsm8k", 0), ("leaked", 2)]
    assert len(lines) == 1 and lines[0].startswith("warning: leaked: 2 of 3 prompts are training prompts too: ")


def test_model_names_a_run_a_checkpoint_or_a_model(tmp_path):
    run = tmp_path / "run"
    for step in ("000010", "000020", "000030.tmp-ab"):
        (run / "checkpoints" / step).mkdir(parents=True)
    nothing = ["experiment=custom", "env.name=''"]
    assert evaluation_options([f"model={run}"]) == [*nothing, f"run.resume={run}/checkpoints/000020"]
    checkpoint = run / "checkpoints" / "000010"
    assert evaluation_options(["env.name=x", f"model={checkpoint}"])[-1] == f"run.resume={checkpoint}"
    assert evaluation_options(["experiment=gsm8k", "model=org/name"])[1:] == ["model=hub", "model.path=org/name"]
    assert evaluation_options(["model=tiny"]) == [*nothing, "model=tiny"]
    with pytest.raises(UserError, match="no checkpoint yet"):
        (tmp_path / "new" / "checkpoints").mkdir(parents=True)
        evaluation_options([f"model={tmp_path}/new"])
    with pytest.raises(UserError, match="manifest.json: cannot be read .*damaged"):
        load_config([f"model={checkpoint}", "eval.sets=[arithmetic]"], mode="evaluate")
    with pytest.raises(UserError, match="gsm8kk: has no length of an answer; .* did you mean one of: gsm8k"):
        load_config(["model=tiny", "eval.sets=[gsm8kk]"], mode="evaluate")
    assert load_config(["experiment=arithmetic"], mode="evaluate").run.name == "arithmetic-evaluate-seed1"
    with pytest.raises(UserError, match="optim.lr: skyrl.evaluate does not read it; leave it out"):
        load_config(["model=tiny", "optim.lr=1"], mode="evaluate")
    with pytest.raises(UserError, match="algorithm: skyrl.evaluate does not read it; leave it out"):
        load_config(["model=tiny", "eval.sets=[arithmetic]", "algorithm=ppo"], mode="evaluate")
    with pytest.raises(
        UserError, match=r"eval.k=\[1\]: has an effect only with eval.sets, or in python -m skyrl.evaluate"
    ):
        load_config(["eval.k=[1]"])
    assert load_config(["model=tiny", "experiment=arithmetic", "eval.k=[1]"], mode="evaluate").eval.k == [1]
    with pytest.raises(UserError, match=r"eval.k=\[64\] is above eval.samples_per_prompt=1; draw more, or lower k"):
        check(load_config(["model=tiny", "experiment=arithmetic", "eval.k=[64]"], mode="evaluate"))
    # what a run of rows to learn from has made is evaluated on something else
    of_chat = load_config(["model=tiny", "env.name=chat", "eval.sets=[arithmetic]"], mode="evaluate")
    check(of_chat)
    assert of_chat.env.name == ""


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("eval/accuracy:mean >= 0.95", ("eval/accuracy:mean", ">=", 0.95)),
        ("eval/gsm8k/pass@8:mean>.5", ("eval/gsm8k/pass@8:mean", ">", 0.5)),
        ("eval/length:mean <= 1e2", ("eval/length:mean", "<=", 100.0)),
        ("eval/x:mean >= ", None),
        ("eval/x:mean >= 1.2.3", None),
        ("", None),
    ],
)
def test_stop_rule(text, rule):
    assert read_condition(text) == rule


def test_what_other_trainers_have_made_is_evaluated_on_named_sets_and_a_reward_model_is_not(tmp_path):
    """Their own options, which have an effect only with them, are left behind."""
    for trainer, *own in (
        ("dpo", "preference.loss=ipo", "env.name=preference"),
        ("distill", "distill.teacher=tiny", "env.name=chat"),
        ("reward_model", "reward_model.center_coef=0.01", "env.name=preference"),
    ):
        (tmp_path / trainer / "export").mkdir(parents=True)
        (tmp_path / trainer / "export" / "config.json").write_text("{}")
        run = load_config([f"trainer={trainer}", "warmup.num_steps=0", "model=tiny", *own])
        (tmp_path / trainer / "config.yaml").write_text(yaml.safe_dump(to_dict(run)))
        words = [f"model={tmp_path}/{trainer}/export", "eval.sets=[arithmetic]"]
        if trainer == "reward_model":
            with pytest.raises(UserError, match="a reward model writes no answers"):
                load_config(words, mode="evaluate")
        else:
            cfg = load_config(words, mode="evaluate")
            check(cfg)
            assert cfg.env.name == "" and cfg.trainer == "rl"
