"""What `skyrl-tx new` writes runs as it is: its own test, and its command."""

import importlib.util
import shlex
import sys

import pytest
from small import SMALL

from skyrl.config.load import load_config
from skyrl.launch.new import KINDS, new
from skyrl.registry import Registry
from skyrl.types import UserError

SHORT = [
    *(one for one in SMALL if not one.startswith("sampler.max_new_tokens")),
    *"batch.num_steps=1 batch.prompts_per_step=2 batch.samples_per_prompt=4 eval.num_prompts=2".split(),
    *"checkpoint.every_steps=0 checkpoint.export=false checkpoint.async_save=false".split(),
]


@pytest.fixture
def forgotten(monkeypatch):
    """Files of one's own can be imported here; what they register is forgotten afterwards."""
    kept, modules = [(one, dict(one._things)) for one in Registry.all], set(sys.modules)
    yield
    for registry, things in kept:
        registry._things = things
    for name in set(sys.modules) - modules:
        if "own_" in name:
            del sys.modules[name]


def written(kind, folder, capsys):
    """The words of the command that trains with what was written."""
    new([kind, f"own_{kind}", "--folder", str(folder)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Train it:"))
    return shlex.split(line.partition("skyrl.train")[2])


@pytest.mark.parametrize("kind", KINDS)
def test_its_test_passes_and_its_command_is_right(kind, tmp_path, monkeypatch, capsys, forgotten):
    words = written(kind, tmp_path, capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location(f"test_own_{kind}", tmp_path / f"test_own_{kind}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [thing for name, thing in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
    assert load_config(words).plugins == [f"own_{kind}.py"]


def test_a_missing_pytest_is_told_with_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    new(["reward", "own_other", "--folder", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == "pytest is not installed here: pip install pytest"


def test_new_pieces_train_together(tmp_path, capsys, warm):
    words = [
        word for kind in ("policy", "loss", "advantage", "environment") for word in written(kind, tmp_path, capsys)
    ]
    plugins = ",".join(word[len("plugins=[") : -1] for word in words if word.startswith("plugins="))
    left_out = ("plugins=", "batch.num_steps=", "model=tiny", "model=hub")
    rest = [word for word in words if not word.startswith(left_out)]
    short = [word for word in SHORT if not word.startswith("model.")]
    done = warm.run(f"plugins=[{plugins}]", *rest, *short, "warmup.num_steps=1", cwd=tmp_path)
    assert done.code == 0 and "done: held-out accuracy" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "name, says",
    [
        ("Big", "a name has small letters, digits and _"),
        ("two words", "a name has small letters"),
        ("class", "a name has small letters"),
        ("9lives", "a name has small letters"),
        ("json", "a module of that name is installed"),
    ],
)
def test_a_name_that_cannot_be_a_module_is_refused(name, says, tmp_path):
    with pytest.raises(UserError, match=f"new reward {name}: {says}"):
        new(["reward", name, "--folder", str(tmp_path / "there")])
    assert not (tmp_path / "there").exists()


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "test_own_loss.py").write_text("mine")
    with pytest.raises(UserError, match=r"test_own_loss.py is there already; choose another name"):
        new(["loss", "own_loss", "--folder", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["test_own_loss.py"]
