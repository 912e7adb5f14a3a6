"""skyrl.SkyRLTrainer: what a script gives it becomes the options of a run; hooks; equal numbers on one rank and two."""

import linecache
import sys
import types
from pathlib import Path

import pytest
from gloo import run_ranks
from loop import LOOP
from small import SMALL

import skyrl
from skyrl.envs.base import ENVIRONMENTS
from skyrl.hub.locate import locate
from skyrl.registry import Registry, origin, script_facts
from skyrl.run_dir import read_metrics
from skyrl.tracking.hooks import Hooks, no_collectives

SHORT = [*SMALL, *LOOP]


class Digits(skyrl.Environment):
    """Rewards digits."""

    in_process = True

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    @classmethod
    def dataset(cls, options, data, split, seed):
        """Eight prompts."""
        texts = [f"{split} {i}" for i in range(8)]
        return [skyrl.Prompt(f"{cls.name}/{text}", cls.name, [{"role": "user", "content": text}]) for text in texts]

    def step(self, text):
        """One for each digit."""
        return skyrl.StepResult(self.scale * sum(letter.isdigit() for letter in text), True)


def digits(text, prompt):
    return float(sum(letter.isdigit() for letter in text))


def make_digits(*, scale: float = 1.0) -> Digits:
    return Digits(scale=scale)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Registries and the hook for uncaught errors as they were before the test."""
    for registry in Registry.all:
        monkeypatch.setattr(registry, "_things", dict(registry._things))
    monkeypatch.setattr(Digits, "name", "")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_names_of_the_package_are_those_of_the_api():
    assert skyrl._LAZY == set(skyrl.api.__all__) - {"train"}


class Noted(skyrl.Hook):
    every_rank = True

    def __init__(self):
        self.seen = []

    def on_step(self, step, metrics):
        self.seen.append((step, metrics["loss:sum"], metrics["reward:mean"], metrics["grad_norm:mean"]))

    def on_rollouts(self, step, groups):
        self.seen.append((step, sum(len(group) for group in groups)))

    def on_checkpoint(self, step, folder):
        assert (folder / "manifest.json").is_file() or any(folder.iterdir())
        self.seen.append((step, folder.name))


def whole(folder):
    hook = Noted()
    options = [*SHORT, f"run.dir={folder}", "eval.every_steps=1", "algorithm.advantage.name=rloo"]
    trainer = skyrl.SkyRLTrainer("tiny", Digits, config=options, hooks=[hook])
    metrics = trainer.train()
    before = trainer.evaluate()
    trainer.save(f"{folder}/saved")
    return metrics, before, hook.seen


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_rank_and_more_give_the_same(tmp_path, ranks):
    (one,), (two, *others) = run_ranks(1, whole, tmp_path / "1"), run_ranks(ranks, whole, tmp_path / "2")
    for name in ("loss:sum", "reward:mean", "grad_norm:mean", "eval/reward:mean"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-7)
        assert all(other[0][name] == two[0][name] for other in others)
    assert one[1]["eval/reward:mean"] == two[1]["eval/reward:mean"] == one[0]["eval/reward:mean"]
    steps = [[one for one in found[2] if len(one) == 4] for found in (one, two, *others)]
    assert len(steps[0]) == 2 and all(found == steps[1] for found in steps[2:])
    played = [next(one[1] for one in found[2] if len(one) == 2) for found in (one, two, *others)]
    assert played == [16, *[16 // ranks] * ranks]
    assert (2, "000002") in one[2] and (tmp_path / "1" / "saved" / "config.json").is_file()
    config = (tmp_path / "1" / "config.yaml").read_text()
    assert "name: test_trainer:Digits" in config or "test_trainer:Digits" in config
    assert [record["step"] for record in read_metrics(tmp_path / "2" / "metrics.jsonl")] == [0, 1, 2]


def build(folder, *args, **more):
    config = more.pop("config", [])
    return skyrl.SkyRLTrainer(*args, config=[*SHORT, f"run.dir={folder}", *config], **more)


def test_an_environment_is_a_name_a_class_or_a_function(tmp_path):
    assert build(tmp_path, "tiny", "guess_number").config.env.name == "guess_number"
    made = build(tmp_path, "tiny", make_digits, config=["env.options.scale=2"])
    name = made.config.env.name
    assert name.endswith("test_trainer:make_digits") and made.config.env.options == {"scale": 2}
    env = ENVIRONMENTS.get(name)(scale=3.0)
    assert env.step("12").reward == 6.0 and len(ENVIRONMENTS.get(name).dataset({}, None, "train", 1)) == 8
    assert build(tmp_path, "tiny", f"{__name__}:Digits").config.env.name == f"{__name__}:Digits"


def test_a_reward_is_a_function_of_single_turn(tmp_path):
    cfg = build(tmp_path, "tiny", reward=digits).config
    assert cfg.env.name == "single_turn" and cfg.env.options["reward"].endswith("test_trainer:digits")
    assert cfg.experiment == "custom"
    ours = skyrl.SkyRLTrainer("tiny", "tic_tac_toe", config=[f"run.dir={tmp_path}"]).config
    assert (ours.experiment, ours.env.max_turns, ours.sampler.max_new_tokens) == ("tic_tac_toe", 6, 2)
    assert build(tmp_path, "tiny", "arithmetic", reward="exact").config.env.options["reward"] == "exact"


def test_each_trainer_of_a_program_plays_with_what_it_was_given(tmp_path):
    """Lambdas, and a function that a notebook's cell defines anew, have one name: no other one's is called, and no
    worker that was made for another."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(4)))
    more = [f"data.path={rows}", f"data.eval_path={rows}", "eval.every_steps=1"]
    made = [
        build(tmp_path / str(worth), "tiny", reward=lambda text, prompt, worth=worth: worth, config=more)
        for worth in (1.0, 2.0)
    ]
    assert made[0].config.env == made[1].config.env
    assert [one.evaluate()["eval/reward:mean"] for one in made] == [1.0, 2.0]
    with pytest.raises(skyrl.UserError, match=r"a list of different ones \(one lambda\)"):
        build(tmp_path, "tiny", reward=[lambda text, prompt: 1.0, lambda text, prompt: 2.0]).evaluate()


def test_config_is_a_list_a_dict_or_a_config(tmp_path):
    listed = build(tmp_path, "tiny", "arithmetic", config=["optim.lr=0.5"]).config
    nested = skyrl.SkyRLTrainer("tiny", "arithmetic", config={"optim": {"lr": 0.5}, "run.dir": str(tmp_path)}).config
    again = skyrl.SkyRLTrainer("tiny", "guess_number", config=listed).config
    assert listed.optim.lr == nested.optim.lr == again.optim.lr == 0.5
    assert again.env.name == "guess_number" and again.run.dir == str(tmp_path)


def test_a_model_in_memory_is_a_policy(tmp_path, monkeypatch):
    from families import make_net

    from skyrl.text.tokenizer import tiny_tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pair = (make_net("qwen3"), tiny_tokenizer())

    def build(folder, policy, environment):
        return skyrl.SkyRLTrainer(policy, environment, config=[f"run.dir={folder}"])

    first = build(tmp_path, pair, "arithmetic").config.model.path
    assert build(tmp_path, pair, "arithmetic").config.model.path == first and (Path(first) / "config.json").is_file()
    assert build(tmp_path, (make_net("qwen3", seed=1), pair[1]), "arithmetic").config.model.path != first

    @skyrl.register_policy("mine")
    def mine():
        return pair

    class Other(skyrl.Policy):
        def load(self):
            return first

    assert build(tmp_path, mine, "arithmetic").config.model.path == "mine" and str(locate("mine")) == first
    assert str(locate(build(tmp_path, Other, "arithmetic").config.model.path)) == first


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"environment": Digits()}, "an instance plays one episode; give the class"),
        ({"environment": 5}, "no name, class or function"),
        ({"environment": dict}, "it makes a dict, wanted"),
        ({"environment": "guess"}, "no environment called 'guess'"),
        ({"reward": 0.5}, "give the name of a reward, or a function"),
        ({"policy": 7}, "policy: a int; give a transformers causal LM"),
        ({"config": "a=b"}, "give a list of option strings"),
        ({"config": ["optim.lrr=1"]}, "optim.lrr: no such option"),
        ({"environment": Digits, "config": ["env.name=arithmetic"]}, "leave one of them out"),
        ({"hooks": print}, "give a list"),
        ({"hooks": [object()]}, "has none of on_step"),
        ({"hooks": [lambda step: None]}, "is called with (step, metrics): too many"),
        ({"hooks": [types.SimpleNamespace(on_steps=print, on_step=print)]}, "no such event; did you mean on_step?"),
    ],
)
def test_mistakes_are_one_line(given, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"policy": "tiny", **given}
    config = given.pop("config", [])
    with pytest.raises(skyrl.UserError) as error:
        trainer = skyrl.SkyRLTrainer(config=[*SHORT, *config] if isinstance(config, list) else config, **given)
        trainer.train()
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_hook_that_fails_is_named_and_ends_the_run_or_is_said():
    class Bad(skyrl.Hook):
        def on_step(self, step, metrics):
            raise KeyError("x")

    lines, problem = Hooks([Bad()], 0).call("on_step", 3, {})
    assert not lines and "Bad.on_step, step 3: raised KeyError: 'x' at " in problem
    Bad.on_error = "say"
    lines, problem = Hooks([Bad()], 0).call("on_step", 3, {})
    assert not problem and "Bad.on_step, step 3: raised KeyError" in lines[0]
    assert Hooks([Bad()], 1).call("on_step", 3, {}) == ([], "")  # of rank 0 alone


def test_a_collective_in_a_hook_is_refused():
    import torch
    from torch.distributed import all_reduce

    def hook(step, metrics):
        all_reduce(torch.ones(1))

    _, problem = Hooks([hook], 0).call("on_step", 1, {})
    assert "it calls torch.distributed.all_reduce, and the other ranks do not" in problem
    with no_collectives():
        assert torch.distributed.is_initialized() in (True, False)
    assert sys.getprofile() is None


def test_code_of_a_script_is_remembered_with_what_it_uses(tmp_path, monkeypatch):
    def facts(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        script = types.ModuleType("__main__")
        script.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "__main__", script)
        linecache.clearcache()
        exec(compile(text, path, "exec"), vars(script))
        monkeypatch.setattr(ENVIRONMENTS, "_things", {"script.py:Mine": script.Mine})
        return script_facts()

    text = "import skyrl\nBY = 2\ndef half(x): return x / BY\nclass Mine(skyrl.Environment):\n"
    text += "    def step(self, text): return skyrl.StepResult(half(len(text)), True)\nsteps = 3\ndef main(): pass\n"
    first = facts(text)
    assert list(first) == ["code.script.script.py:Mine"]
    assert facts(text.replace("steps = 3", "steps = 4").replace("pass", "return 1")) == first
    for old, new in (("BY = 2", "BY = 3"), ("x / BY", "x * BY"), ("len(text)), True", "len(text)), False")):
        assert facts(text.replace(old, new)) != first


@pytest.mark.parametrize("left", ["text = '''never closed\n", "def f(:\n", "x = 'one\n", ""])
def test_a_script_that_is_edited_while_it_runs_is_no_fault_of_the_run(tmp_path, monkeypatch, left):
    path = tmp_path / "edited.py"
    path.write_text("class Mine:\n    pass\n\n\ndef rate(text):\n    return 1.0\n")
    script = types.ModuleType("__main__")
    script.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile(path.read_text(), path, "exec"), vars(script))
    path.write_text("#\n#\n#\n#\n" + left)
    linecache.clearcache()
    assert origin(script.rate) in (f"{path}:5", "__main__") and origin(script.Mine)
    for thing in (script.rate, script.Mine):
        monkeypatch.setattr(ENVIRONMENTS, "_things", {"script.py:Mine": thing})
        assert list(script_facts()) == ["code.script.script.py:Mine"]


def test_what_was_typed_at_a_prompt_is_told_by_its_module():
    typed = {"__name__": "prompt"}
    exec("def rate(text):\n    return 1.0\n\nclass Mine:\n    def score(self):\n        pass\n", typed)
    assert {origin(typed["rate"]), origin(typed["Mine"]), origin(typed["Mine"].score)} == {"prompt"}
    assert origin(test_what_was_typed_at_a_prompt_is_told_by_its_module).startswith(f"{__file__}:")


def test_an_uncaught_error_is_told_as_on_the_command_line(monkeypatch):
    ended = []
    monkeypatch.setattr(skyrl.api.trainer, "end_now", lambda error, mode: ended.append(error))
    monkeypatch.setattr(sys, "excepthook", lambda *error: ended.append("python's own"))
    skyrl.api.trainer._end_in_one_line()
    for error in (skyrl.UserError("mend it"), ValueError("the script's own")):
        sys.excepthook(type(error), error, None)
    assert [str(one) for one in ended][0] == "mend it" and "python's own" in ended


def test_a_plugin_is_a_module_a_file_or_an_entry_point(tmp_path, monkeypatch):
    from skyrl.registry.plugins import import_plugins

    monkeypatch.chdir(tmp_path)
    text = "import skyrl\n@skyrl.register_reward('of_{0}')\ndef of(text, prompt): return 1.0\n"
    (tmp_path / "plug_file.py").write_text(text.format("file"))
    (tmp_path / "plug_point.py").write_text(text.format("point"))
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (tmp_path / "mine-1.0.dist-info" / "entry_points.txt").write_text("[skyrl.plugins]\nmine = plug_point\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_plugins([str(tmp_path / "plug_file.py"), "mine", "plug_file"])
    from skyrl.envs.rewards import REWARDS

    assert "of_file" in REWARDS and "of_point" in REWARDS
    for plugin, told in (
        ("missing.py", "no file"),
        ("missing_module", "no module 'missing_module'; give its dotted name, or the path"),
        ("json.py", "no file"),
    ):
        with pytest.raises(skyrl.UserError, match=told):
            import_plugins([plugin])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(skyrl.UserError, match="a module 'json' is loaded already"):
        import_plugins(["json.py"])
