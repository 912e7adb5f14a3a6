"""What differs between nodes is named, with the hosts, on all ranks; what is meant may differ."""

import importlib
import os
import re
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from gloo import run_ranks
from small import small_config

from skyrl.data import canonical, prompts_digest
from skyrl.distributed import compare
from skyrl.distributed.collectives import agree
from skyrl.distributed.compare import check_shared, compare_nodes, differences
from skyrl.distributed.init import init_distributed
from skyrl.planner import fingerprint
from skyrl.planner.fingerprint import file_digest, read_facts
from skyrl.types import Prompt, UserError

FACTS = {"versions.torch": "2.13", "data.train": "10 prompts, ab", "env.name": "0.1", "model.path/config.json": "cd"}
PROMPTS = {"train": [Prompt("a", "arithmetic", [{"role": "user", "content": "1+1"}], {"answer": {"2", "two"}})]}


@pytest.mark.parametrize("name", FACTS)
def test_the_odd_host_is_named_with_what_differs(name):
    hosts = ["n0", "n0", "n1", "n1", "n2", "n2"]
    facts = [dict(FACTS) for _ in hosts]
    facts[2][name] = facts[3][name] = "other"
    ((found, text),) = differences(hosts, facts)
    assert (
        found == name
        and text == f"{name} is other on ranks 2, 3 on n1, and {FACTS[name]} on ranks 0, 1, 4, 5 on n0, n2"
    )
    assert differences(hosts, facts, [name]) == differences(hosts, facts, [name.split(".")[0]]) == []
    assert differences(hosts, facts, ["env.nam", "versions.tor", "mod"]) != []


def test_two_nodes_of_which_none_is_the_odd_one():
    ((_, text),) = differences(["n0", "n1"], [{"seed": "1"}, {"seed": "2"}])
    assert text == "seed is 2 on rank 1 on n1, and 1 on rank 0 on n0"
    ((_, text),) = differences(["n0", "n1", "n2"], [{"seed": "1"}, {"seed": "1"}, {}])
    assert text == "seed is (nothing) on rank 2 on n2, and 1 on ranks 0, 1 on n0, n1"
    many = differences([f"n{rank}" for rank in range(9)], [{"seed": str(rank == 8)} for rank in range(9)])
    assert (
        many[0][1]
        == "seed is True on rank 8 on n8, and False on ranks 0, 1, 2, 3 and 4 more on n0, n1, n2, n3 and 4 more"
    )


def test_a_module_that_one_rank_has_not_imported_yet_is_no_difference():
    assert differences(["n0", "n1"], [{"code.wandb_hook": "a"}, {}]) == []
    assert differences(["n0", "n1"], [{}, {"code.hook": "a"}]) == []
    assert differences(["n0", "n1", "n2"], [{"code.hook": "a"}, {}, {"code.hook": "b"}]) != []
    assert differences(["n0", "n1"], [{"code.skyrl/x.py": "a"}, {}]) != []  # skyrl's own are listed, not imported


@dataclass(slots=True)
class _Slots:
    x: object


class _Holder:
    def __init__(self, value):
        self.inner, self.lock, self.me = {_Slots(value).x, "b", "c"}, threading.Lock(), self


@pytest.mark.parametrize(
    "make, one, other",
    [
        (lambda value: value, b"1", b"2"),
        (lambda value: {value: 3}, 1, "1"),
        (lambda value: {(1, value): 3, "b": value}, 1, 2),
        (date.fromordinal, 1, 2),
        (Decimal, 1, 2),
        (Fraction, 1, 2),
        (re.compile, "1", "2"),
        (Path, "/a", "/b"),
        (range, 1, 2),
        (_Slots, 1, 2),
        (_Holder, "1", "2"),
        (lambda value: {_Slots(value).x, frozenset([value])}, 1, 2),
        (lambda value: deque([value]), 1, 2),
        (lambda value: numpy.array([_Holder(value)], dtype=object), "1", "2"),
        (lambda value: torch.tensor(value, dtype=torch.bfloat16), 1.0, 2.0),
        (lambda value: torch.zeros(0, value), 1, 2),
        (lambda value: 10**5000 + value, 1, 2),  # more digits than str() gives
    ],
)
def test_values_of_any_kind_count_by_what_they_hold(make, one, other):
    def told(value):
        return prompts_digest([Prompt("u", "e", [], {"value": make(value)})])

    assert told(one) == told(one) != told(other)


def test_what_cannot_be_looked_into_is_no_error():
    cycle: dict = {}
    cycle["me"], deep = cycle, []
    for _ in range(5000):
        deep = [deep]
    for value in (cycle, deep, threading.Lock(), lambda: 1, sys, int, (one for one in [])):
        assert " at 0x" not in canonical(value)
        prompts_digest([Prompt("u", "e", [], {"value": value})])


def test_what_is_read_is_known_by_its_content(tmp_path, monkeypatch):
    """Wherever it lies: model folders and files of an environment may have another path on each node."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "answers.csv").write_text("1 2 3")
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a": 1}' + bytes(100))
    cfg = small_config()

    def facts(folder, prompts=PROMPTS):
        options = {**cfg.env.options, "answers": str(tmp_path / folder / "answers.csv")}
        model = replace(cfg.model, path=str(tmp_path / folder))
        return read_facts(replace(cfg, env=replace(cfg.env, options=options), model=model), {"torch": "2"}, prompts)

    assert facts("here") == facts("there")
    other = {"train": [replace(PROMPTS["train"][0], extra={"answer": {"3", "two"}})]}
    assert facts("here", other)["data.train"] != facts("here")["data.train"]
    (tmp_path / "there" / "answers.csv").write_text("1 2 4")
    (tmp_path / "there" / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"b": 1}' + bytes(100))
    here, there = facts("here"), facts("there")
    assert {name for name in here if here[name] != there[name]} == {
        "env.options.answers/answers.csv",
        "model.path/model.safetensors",
    }
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 50)
    large = file_digest(tmp_path / "there" / "model.safetensors")
    assert large.startswith("116 bytes, ")
    (tmp_path / "there" / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"c": 1}' + bytes(100))
    assert file_digest(tmp_path / "there" / "model.safetensors") != large


def test_files_and_folders_below_the_options_of_an_environment_count(tmp_path):
    inner = tmp_path / "folder" / "inner" / "b.txt"
    inner.parent.mkdir(parents=True)
    options = {"one": str(inner), "many": ["x" * 5000, str(inner)], "deep": {"x": str(inner)}, "all": str(tmp_path)}
    cfg, told = small_config(), []
    for text in "12":
        inner.write_text(text)
        told.append(read_facts(replace(cfg, env=replace(cfg.env, options={**cfg.env.options, **options})), {}, {}))
    changed = {name for name in told[0] if told[0][name] != told[1][name]}
    assert {name.split("/")[0] for name in changed} == {
        f"env.options.{name}" for name in ("one", "many", "deep.x", "all")
    }


def test_places_of_an_environment_are_looked_at_within_bounds(tmp_path, monkeypatch):
    """What an option names may be the root, the working folder, a home folder, or hold the run itself."""
    cfg = small_config()

    def facts(value):
        options = {"x": value}
        found = read_facts(replace(cfg, env=replace(cfg.env, options=options), run=replace(cfg.run, dir=run)), {}, {})
        return {name: known for name, known in found.items() if name.startswith("env.options")}

    data, run = tmp_path / "data", str(tmp_path / "data" / "b-run")
    for folder in ("a/b", "b-run/checkpoints", "c", "many"):
        (data / folder).mkdir(parents=True)
    for name in ("1.txt", "a/2.txt", "a/b/3.txt", "b-run/stop", "b-run/checkpoints/x", "c/4.txt"):
        (data / name).write_text(name)
    os.mkfifo(data / "c" / "pipe")
    names = {f"env.options.x/data/{name}" for name in ("1.txt", "a/2.txt", "a/b/3.txt", "c/4.txt")}
    assert set(facts(str(data))) == names
    for number in range(30):
        (data / "many" / f"{number:02}").touch()
    monkeypatch.setattr(fingerprint, "FOLDER_FILES", 9)
    assert set(facts(str(data))) == names | {f"env.options.x/data/many/{number:02}" for number in range(5)}
    monkeypatch.setenv("HOME", str(data))
    assert set(facts("~/a/2.txt")) == {"env.options.x/2.txt"} and set(facts(["~/c", "~/1.txt"])) == {
        "env.options.x/c/4.txt", "env.options.x/1.txt"
    }  # fmt: skip
    monkeypatch.chdir(data / "a" / "b")
    for value in ("/", ".", "..", "~", str(data), "", "\0", "~nobody/x", 3, None, True):
        assert facts(value) == {}, value
    monkeypatch.setattr(fingerprint, "sha256", lambda path: open(path / "no"))  # a disk that fails
    assert facts("3.txt") == {"env.options.x/3.txt": "not readable (Not a directory)"}
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 50)
    (data / "x.safetensors").write_bytes(b"\xff" * 100)  # a header that says it is larger than any disk
    assert file_digest(data / "x.safetensors").startswith("100 bytes, ")


def test_plugins_count_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "LIBRARIES", (f"{tmp_path}/site/",))
    for folder in ("site", "site-own"):
        for name in ("plugin", "other"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.py").touch()
            module = ModuleType(f"{name}_{folder[4:]}")
            module.__file__ = str(tmp_path / folder / f"{name}.py")
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "__mp_main__", module)  # a script's second name, in processes that it has made
    assert "__mp_main__" not in dict(fingerprint._code())
    assert {"plugin_", "plugin_-own", "other_-own"} <= set(found := dict(fingerprint._code(["plugin_"])))
    assert "other_" not in found


def test_the_code_of_plugins_and_of_what_they_import_counts(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("import my_helper\n")
    (tmp_path / "my_helper.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_rewards")
    before = read_facts(small_config(), {}, PROMPTS)
    (tmp_path / "my_helper.py").write_text("VALUE = 2\n")
    after = read_facts(small_config(), {}, PROMPTS)
    assert [name for name in before if before[name] != after[name]] == ["code.my_helper"]
    assert "code.skyrl/loop.py" in before and not any(name.startswith("code.torch") for name in before)
    for name in ("my_rewards", "my_helper"):
        del sys.modules[name]


def test_files_of_plugins_count_before_they_are_imported(tmp_path, monkeypatch):
    (tmp_path / "lone_plugin.py").write_text("def reward():\n    from beside import VALUE\n")
    (tmp_path / "beside.py").write_text("import further\nVALUE = 1\n")
    for name in ("further", "of_nobody"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "package_of_plugins" / "inner").mkdir(parents=True)
    (tmp_path / "package_of_plugins" / "inner" / "later.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    plugins = ["lone_plugin", "package_of_plugins.inner"]
    for name in plugins:
        importlib.import_module(name)
    found = dict(fingerprint._code(plugins))
    told = {name for name in found if name.startswith(("lone_plugin", "package_of_plugins"))}
    assert told == {"lone_plugin", "lone_plugin/beside.py", "lone_plugin/further.py", "package_of_plugins/later.py"}
    for name in [name for name in sys.modules if name.startswith(("lone_plugin", "package_of_plugins"))]:
        del sys.modules[name]


def test_versions_of_libraries_in_use_count(monkeypatch):
    before = read_facts(small_config(), {}, PROMPTS, files=False)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(__version__="0.1"))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9"))
    after = read_facts(small_config(), {}, PROMPTS, files=False)
    assert (
        after["versions.triton"] == "9" and before.get("versions.tokenizers") != after["versions.tokenizers"] == "0.1"
    )


def _two(place):
    import socket

    cfg = small_config()
    world = init_distributed(cfg)
    socket.gethostname = lambda: f"node{world.rank}"
    prompts = PROMPTS if world.rank == 0 else {"train": [replace(PROMPTS["train"][0], uid="b")]}
    meant = replace(cfg, run=replace(cfg.run, allow_different=["data"]))
    compare.SHARED_SECONDS = 1.0
    slow, own, overlay, shut = (Path(place) / name for name in ("slow", f"own-{world.rank}", "overlay", "shut"))
    if world.rank == 0:  # as where a container lays a layer of its own over the folder: it reads ours, we not its
        compare._names = lambda place: {
            one for one in os.listdir(place) if "overlay" not in str(place) or one[-1] == "0"
        }
    touch = Path.touch
    if world.rank == 1:

        def refuse(path, *args):
            if "shut" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            touch(path, *args)

        Path.touch = refuse
    if world.rank == 1:  # as on NFS, whose clients look again after some seconds
        names, begun = compare._names, time.monotonic()
        compare._names = lambda place: names(place) if time.monotonic() > begun + 0.5 else set()

    said = []
    for folder in (slow, overlay, shut):
        folder.mkdir(exist_ok=True)
    if world.rank == 0:
        (slow / ".same-old").touch()
        (slow / ".same-new").touch()
        os.utime(slow / ".same-old", (0, 0))
    for action in (
        lambda: compare_nodes(cfg, world, prompts),
        lambda: sorted(compare_nodes(meant, world, prompts)[0]),
        lambda: agree(world, lambda: os.stat if world.rank == 0 else _missing()),
        lambda: check_shared(world, slow, "run.dir"),
        lambda: check_shared(world, own, "service.folder"),
        lambda: check_shared(world, overlay, "run.dir"),
        lambda: check_shared(world, shut, "run.dir"),
    ):
        try:
            said.append(action())
        except UserError as error:
            said.append(str(error))
    # Files are read by one rank of each host, for all that are there.
    asked: list[bool] = []
    compare.read_facts = lambda *read, files: asked.append(files) or ({"code.x": "1"} if files else {})
    for host in (f"node{world.rank}", "node"):
        socket.gethostname = lambda host=host: host
        compare_nodes(cfg, world, {})
    assert asked == [True, world.rank == 0]
    return said, [path.name for path in Path(place).rglob(".same-*")]


def _missing():
    raise UserError("data.path=x: no such file")


@pytest.mark.ranks
def test_all_ranks_say_the_same(tmp_path):
    first, second = run_ranks(2, _two, str(tmp_path))
    assert first[0][:4] == second[0][:4] and second[1] == [".same-new"]
    (data, meant, missing, shared, own, overlay, shut), left = first
    assert (
        overlay.startswith(f"run.dir={tmp_path}/overlay: not one folder on all hosts: ")
        and "rank 1 on node1" in overlay
    )
    assert shut.startswith(f"rank 1 on node1: run.dir={tmp_path}/shut: cannot be written (Permission denied: ")
    assert data.startswith("the nodes are not alike: data.train is 1 prompts, ") and "rank 1 on node1" in data
    assert data.endswith("or say that it is meant: run.allow_different=[data.train]")
    assert meant == ["node0", "node1"]
    assert missing == "rank 1 on node1: data.path=x: no such file"
    assert shared is None
    assert own.startswith(f"service.folder={tmp_path}/own-")
    assert f"rank 0 on node0 writes to {tmp_path}/own-1 is not there on rank 1 on node1 within 1 s" in own
    assert left == [".same-new"]  # of a start under way; one that was killed long ago has left nothing
