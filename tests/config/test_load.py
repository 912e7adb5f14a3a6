"""Composition, errors in one line, names of runs, storage of the resolved config."""

import dataclasses

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from skyrl.args import hide_in_command
from skyrl.config import load
from skyrl.config.load import load_config
from skyrl.config.options import all_options
from skyrl.config.schema import RunConfig
from skyrl.config.validation import option
from skyrl.main import split_args
from skyrl.registry.plugins import import_plugins
from skyrl.run_dir import RunReader
from skyrl.tracking import crash_report
from skyrl.types import UserError


def line_of(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides_reach_the_frozen_config():
    cfg = load_config(["optim.lr=3e-4", "sampler.stop=[a,b]", "env.options.digits=3", "env.options.x.y=z"])
    assert isinstance(cfg, RunConfig)
    assert cfg.optim.lr == 3e-4
    assert cfg.sampler.stop == ["a", "b"]
    assert cfg.env.options["digits"] == 3 and cfg.env.options["x"] == {"y": "z"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.optim.lr = 1.0  # type: ignore[misc]


def test_group_choice_on_the_command_line_beats_the_recipe():
    assert load_config(["algorithm=dapo"]).algorithm.filters.refill
    assert not load_config([]).algorithm.filters.refill


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "optim.lrr: no such option; did you mean optim.lr?"),
        ("+optim.lrr=1", "optim.lrr: no such option; did you mean optim.lr?"),
        ("algorthm=ppo", "algorthm: no such option; did you mean algorithm?"),
        ("clip_low=1", "clip_low: no such option; did you mean algorithm.loss.params.clip_low?"),
        ("zzz=1", "zzz: no such option; --help lists all options"),
        ("+optim={a: 1}", "optim"),
        ("optim.lr=abc", "optim.lr=abc: needs a value of type float"),
        ("optim.lr=null", "optim.lr=null: needs a value of type float"),
        ("batch.num_steps=1.5", "batch.num_steps=1.5: needs a value of type int"),
        ("sampler.stop=x", "sampler.stop=x: needs a list, in brackets: sampler.stop=[x]"),
        ("optim=3", "optim=3: is a group of options"),
        ("~optim.lr", "optim.lr: cannot be removed"),
        ("optim.lr=1,2", "a sweep over values needs -m"),
        ("optim.lr=(]", "cannot read 'optim.lr=(]'"),
        ("foo", "cannot read 'foo'"),
        ("experiment=nothing", "experiment=nothing: no such file in conf/experiment; choose one of: acrobot"),
        ("experiment=gms8k", "did you mean gsm8k? There are: acrobot"),
        (
            "strategy=ddp",
            "strategy=ddp: no such file in conf/strategy; did you mean strategy.name=ddp? There are: auto",
        ),
        ("num_generations=8", "num_generations: no such option; did you mean batch.samples_per_prompt?"),
        ("data.train_batch_size=8", "did you mean batch.prompts_per_step?"),
        ("temperature=0.7", "did you mean sampler.temperature or eval.temperature?"),
        ("env.reward=exact", "did you mean env.options.reward?"),
        ("run.name=a/b", "run.name=a/b"),
    ],
)
def test_each_mistake_is_one_line_with_its_place(override, said):
    assert said in line_of(override)


def test_a_plugin_that_does_not_parse_is_told_with_its_own_line(tmp_path):
    file = tmp_path / "half_written.py"
    file.write_text("x = 1\ndef f(:\n")
    with pytest.raises(UserError, match=rf"SyntaxError: .* at {file}:2; fix it there$"):
        import_plugins([str(file)])


def test_two_models_are_refused():
    assert line_of("model=tiny", "model.path=a/b").startswith("model=tiny: model.path=a/b names another model; leave")
    assert load_config(["experiment=custom", "model=tiny", "sampler.max_new_tokens=4"]).model.path == "tiny"


def test_same_command_same_name_in_any_order():
    one = load_config(["optim.lr=0.001", "sampler.top_k=0"])
    two = load_config(["sampler.top_k=0", "optim.lr=0.5", "optim.lr=0.001"])
    assert one.run.name == two.run.name == "arithmetic-seed1-optim.lr=0.001-top_k=0"
    assert one.run.dir == "runs/" + one.run.name


def test_names_tell_different_commands_apart():
    commands = [
        [],
        ["seed=2"],
        ["optim.lr=0.01"],
        ["warmup.lr=0.01"],
        ["model.path=/a/b"],
        ["model.path=/a-b"],
        ["algorithm=dapo"],
    ]
    names = [load_config(command).run.name for command in commands]
    assert len(set(names)) == len(names)
    assert load_config([]).run.name != load_config([], mode="sft").run.name
    assert all(len(name) <= 60 and "/" not in name for name in names)


def test_names_say_their_options_in_words():
    said = ["plugins=[my_reward]", "optim.lr=1e-5", "data.path=data/train set.jsonl"]
    wanted = "arithmetic-seed1-data.path=data_train_set.jsonl-optim.lr=1e-5-plugins=_my_reward"
    assert load_config(said).run.name == wanted
    long = [load_config([f"model.path=/{'a' * 200}{end}"]).run.name for end in "xy"]
    assert long[0] != long[1] and long[0].startswith("arithmetic-seed1-model.path=_aaa") and len(long[0]) < 150


def test_places_and_switches_do_not_change_the_name():
    plain = load_config([]).run.name
    assert load_config(["run.threads=2", "tracking.wandb=off", "debug.deterministic=true"]).run.name == plain
    given = load_config(["run.name=mine", "run.dir=/tmp/there"])
    assert (given.run.name, given.run.dir) == ("mine", "/tmp/there")


def test_secrets_of_an_environment_are_neither_shown_nor_kept(tmp_path, monkeypatch):
    """They are compared all the same. Numbers, and names that only resemble, stay as they are."""
    hidden = {
        "api_key": "S1", "token": "S2", "judge": {"password": "S3", "name": "x"}, "secrets": {"a": "S4", "b": ["S5"]},
        "OPENAI_KEY_2": "S6", "clientSecret": "S7", "keys": ["S8", 3],
    }  # fmt: skip
    shown = {"max_tokens": 256, "tokenizer": "gpt", "keyboard": "us", "monkeys": 3, "stop_token_ids": [1], "key": ""}
    shown |= {"answer_key": "final_answer", "stop_token": "<|im_end|>", "key_column": "id"}
    cfg = load_config(["experiment=arithmetic"])
    cfg = dataclasses.replace(cfg, env=dataclasses.replace(cfg.env, options={**hidden, **shown}))
    values = load.to_dict(cfg)
    told = values["env"]["options"]
    assert {name: told[name] for name in shown} == shown and told["judge"]["name"] == "x" and told["keys"][1] == 3
    text = yaml.safe_dump(values)
    assert not any(f"S{n}" in text for n in range(1, 9)) and text.count("(hidden ") == 8
    other = dataclasses.replace(cfg, env=dataclasses.replace(cfg.env, options={**hidden, **shown, "api_key": "S9"}))
    (line,) = load.config_diff(cfg, other)
    assert line.startswith("env.options.api_key: (hidden ") and "S1" not in line and "S9" not in line
    words = [
        "train",
        "env.options.api_key=S1",
        "+env.options.judge={password: S3, name: x}",
        "env.options.max_tokens=5",
    ]
    assert hide_in_command([*words, "env.options={'x_token':'S2'}", "optim.key=a"]) == [
        "train", "env.options.api_key=(hidden)", "+env.options.judge={password: (hidden), name: x}",
        "env.options.max_tokens=5", "env.options={'x_token':(hidden)}", "optim.key=a",
    ]  # fmt: skip
    assert "S1" not in load_config(["+env.options.api_key=S1"]).run.name
    assert "5" in load_config(["+env.options.max_tokens=5"]).run.name
    monkeypatch.setenv("SLURM_JWT", "S1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    kept = crash_report._environment()["started_by"]
    assert kept["SLURM_JOB_ID"] == "7" and "SLURM_JWT" not in kept


def test_resolved_config_survives_storage(tmp_path):
    cfg = load_config(["optim.lr=1e-6", "sampler.stop=['#','a: b']", "env.options={digits: 2, ops: ['+','*']}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load.to_dict(cfg), allow_unicode=True))
    assert load.from_dict(RunReader(tmp_path).options("play")) == cfg
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch"]["num_steps"] == cfg.batch.num_steps
    assert load.from_dict(load.to_dict(cfg)) == cfg
    with pytest.raises(UserError, match="optim.lrr: no such option"):
        load.from_dict({"optim": {"lrr": 1}})


@pytest.mark.parametrize("mode", ["train", "serve"])
def test_every_option_that_is_a_path_has_its_home_folder_expanded(mode, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [known.path for known in all_options(mode) if known.type == "path" and known.path != "service.aliases_file"]
    assert len(paths) >= 6
    given = [f"{path}=~/a-{number}" for number, path in enumerate(paths)]
    given += [f"dashboard.{name}=https://id.example.org" for name in ("oidc_issuer", "public_url")]
    given += ["dashboard.oidc_client_id=me", "dashboard.viewer_groups=[us]"]
    cfg = load_config(["feedback.enabled=true", "dashboard.enabled=true", *given], mode=mode)
    assert [option(cfg, path) for path in paths] == [f"/home/me/a-{number}" for number, _ in enumerate(paths)]
    with pytest.raises(UserError, match=f"{paths[-1]}=~nobody-here/x: no home folder of nobody-here"):
        load_config([f"{paths[-1]}=~nobody-here/x"], mode=mode)


def test_a_tilde_is_read_where_a_path_is_and_kept_where_a_text_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    for written, read in (("~/a b", "/home/me/a b"), ("~", "/home/me"), ("$HOME/x", "$HOME/x"), ("/x/~/y", "/x/~/y")):
        assert load.from_dict({"data": {"path": written}}).data.path == read
    cfg = load_config(["sampler.stop=[~,a~b]", "env.options={file: ~/x}", "plugins=[]"])
    assert cfg.sampler.stop == ["~", "a~b"] and cfg.env.options["file"] == "~/x"
    assert load_config(["model.path=~/m", "service.aliases={a: ~/m}"], mode="serve").service.aliases == {
        "a": "/home/me/m"
    }
    (tmp_path / "names.yaml").write_text("b: ~/m")
    names = ["model.path=~/m", f"service.aliases_file={tmp_path}/names.yaml", "service.aliases={a: ~/m}"]
    assert load_config(names, mode="serve").service.aliases == dict.fromkeys("ab", "/home/me/m")
    assert split_args(["-m", "data.path=~/x,~/y", "hydra.sweep.dir=~/s", "--config-dir", "~/c"]) == (
        ["-m", "--config-dir=/home/me/c"],
        ["data.path='~/x','~/y'", "hydra.sweep.dir=/home/me/s"],
    )


def test_a_text_may_have_any_letters(monkeypatch, tmp_path):
    """What Hydra's grammar refuses or takes for several values is one value of an option that is a text."""
    for name in ("a=b", "a,b", "it's", "né", "a(b)", 'say "x"', "a:b{c}", "[a", "a\\", "x;y&z", "日本"):
        assert load_config([f"run.dir=/tmp/{name}"]).run.dir == f"/tmp/{name}", name
    assert load_config(["run.dir='/tmp/a,b'"]).run.dir == "/tmp/a,b"  # quoted already
    assert split_args(["-m", "run.dir=a,b=c", "run.name=choice(a,b)"])[1] == ["run.dir=a,b=c", "run.name=choice(a,b)"]
    with pytest.raises(UserError, match="a sweep over values needs -m"):
        load_config(["optim.lr=1,2"])


def test_a_name_that_no_file_system_takes_is_refused():
    for start in ("run.name=", "run.dir=/tmp/"):
        assert load_config([f"{start}{'é' * 127}"])
        with pytest.raises(UserError, match="256 bytes long, and file systems allow 255; give a shorter name"):
            load_config([f"{start}{'é' * 128}"])


def test_a_recipe_without_its_package_line_is_told_that(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("experiment: mine\noptim: {lr: 1e-4}\n")
    load.register_schema()
    with initialize_config_dir(str(load.config_dir()), version_base=load.VERSION_BASE):
        with pytest.raises(load.COMPOSE_ERRORS) as wrong:
            compose("config", overrides=["experiment=mine", f"hydra.searchpath=[{tmp_path}]"])
    assert load.explain(wrong.value).endswith("make its first line: # @package _global_")


def test_a_sweeper_whose_package_is_missing_names_the_extra():
    missing = MissingConfigException("no such", missing_cfg_file="hydra/sweeper/optuna")
    assert load.explain(missing).endswith("get the extra: pip install 'skyrl-spmd[sweep]'")
