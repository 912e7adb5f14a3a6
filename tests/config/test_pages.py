"""Every block of the pages runs here, or says what it needs.

A fence names its kind: `bash` (commands), `console` (commands after "$ " and what they printed), `python`, `yaml` (a
recipe), `json`, `text` (pictures and output). Commands that train or serve are checked as a dry run does, for as many
ranks as they start; Python is executed; a block that begins with "# name.py" is that module for the commands. What
cannot run on two cores without a network says so, ```bash needs=gpu,network, and is checked as far as that goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from skyrl import cli
from skyrl.algorithms.declare import ADVANTAGES, LOSSES
from skyrl.config.load import config_dir, load_config
from skyrl.config.options import all_options
from skyrl.envs.base import ENVIRONMENTS
from skyrl.envs.rewards.base import REWARDS
from skyrl.hub.get_model import MODELS
from skyrl.launch import command, sbatch
from skyrl.main import split_args
from skyrl.planner.plan import make_plan
from skyrl.text.fit import check_task
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("bash", "console", "python", "yaml", "json", "text")
NEEDS = {
    "gpu": "GPUs, as many as it starts ranks",
    "hosts": "several machines",
    "slurm": "a Slurm cluster",
    "network": "the Hugging Face hub, a package registry or a repository",
    "server": "a server that runs, or it is one and does not end",
    "model": "a model or an adapter of yours",
    "run": "the folder of a run that is there",
    "minutes": "more time than a test has",
}
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MODELS_NAMED = ("models/mine", "models/smollm2-135m", "runs/mine/export", "runs/arithmetic-sft-seed1/export")


@dataclass
class Block:
    """A fence of a page; `where` is its page and line."""

    where: str
    kind: str
    needs: list[str]
    words: list[str]
    text: str


def pages() -> list[Path]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]
    return sorted([*found, *ROOT.glob("skyrl/**/README.md"), *ROOT.glob("tests/**/README.md")])


@functools.cache
def blocks() -> list[Block]:
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for fence in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M):
            kind, *words = fence[1].split() or [""]
            needs = [need for word in words if word.startswith("needs=") for need in word[6:].split(",")]
            words = [word for word in words if not word.startswith("needs=")]
            where = f"{page.relative_to(ROOT)}:{text[: fence.start()].count(chr(10)) + 1}"
            found.append(Block(where, kind, needs, words, fence[2]))
    return found


def test_every_block_says_what_it_is_and_needs():
    assert len(blocks()) > 80
    unknown = [one.where for one in blocks() if one.kind not in KINDS or one.words not in ([], ["signatures"])]
    assert unknown == [], f"a fence names one of {KINDS}"
    assert [one.where for one in blocks() if not set(one.needs) <= NEEDS.keys()] == [], f"needs= is one of {[*NEEDS]}"
    indented = {}
    for page in pages():
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        if found := re.findall(r"^(?!\s*[-*\d]).*\n\n {4}\S.*", text, re.M):
            indented[page.name] = found
    assert indented == {}, "write a fence, which can name its kind"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the modules that the pages show, examples/, launch/ and folders for the models that they name.
    What plugins register is forgotten afterwards."""
    for name in ("examples", "launch", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in MODELS_NAMED:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen3"}')
    for one in blocks():
        if one.kind == "python" and (name := re.match(r"# (\w+\.py)\n", one.text)):
            with open(tmp_path / name[1], "a") as file:
                file.write(one.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before, kept = set(sys.modules), [(one, dict(one._things)) for one in (ENVIRONMENTS, REWARDS, LOSSES, ADVANTAGES)]
    yield tmp_path
    for registry, things in kept:
        registry._things = things
    for name in set(sys.modules) - before:
        if name.startswith("examples") or (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def commands(block: Block):
    """(words, what it printed) of each command."""
    text = block.text.replace("\\\n", " ")
    if block.kind == "bash":
        for line in text.splitlines() if "#SBATCH" not in text else ():  # a part of a batch script is not typed
            for part in re.split(r" (?:&&|;) ", re.sub(r"(^| +)# .*", "", line)):
                if words := shlex.split(part, comments=True):
                    yield words, ""
        return
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        line, _, printed = part.partition("\n")
        for one in re.split(r" (?:&&|;) ", line):
            yield shlex.split(one, comments=True), printed


composed = functools.cache(lambda mode, options: load_config(options, mode=mode))


@functools.cache
def plan(mode: str, args: tuple[str, ...], ranks: int) -> None:
    """The first part of a dry run for that many ranks: rules, plugins, environment; neither data nor weights are read.
    Raises UserError."""
    flags, overrides = split_args(list(args))
    chosen = [] if "-m" in flags else overrides
    for one in OverridesParser.create().parse_overrides(overrides if "-m" in flags else []):
        if one.key_or_group.startswith("hydra"):
            if "/" in one.key_or_group:
                assert (config_dir() / one.key_or_group / f"{one.value()}.yaml").is_file(), one.input_line
        elif one.is_sweep_override():
            values = [*one.sweep_string_iterator()] if one.is_discrete_sweep() else []
            chosen += [f"{one.key_or_group}={values[0]}"] if values else []
        else:
            chosen.append(one.input_line)
    names = ("run.name=", "run.dir=", "seed=")  # what is composed once may serve several commands
    cfg = composed(mode, tuple(one for one in chosen if not one.startswith(names)))
    ranks = cfg.run.world_size or ranks
    cfg = dataclasses.replace(cfg, dry_run=True, run=dataclasses.replace(cfg.run, world_size=ranks))
    made = make_plan(cfg, ranks)
    if mode != "serve" and cfg.trainer != "control":
        check_task(cfg, made.max_row_tokens, files=False)


def number(words: list[str], *names: str) -> int:
    """The value of the first of these flags that is given, else 1."""
    given = re.search(rf"(?:^| )(?:{'|'.join(names)})[ =]?(\d+)", " ".join(words))
    return int(given[1]) if given else 1


def check(words: list[str], needs: list[str], ranks: int = 1) -> None:
    """Runs a command as far as a test can. Raises UserError or AssertionError for one that cannot be typed."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    name, *rest = words or ["export"]
    text = " ".join(words)
    if name in ("torchrun", "srun", "salloc", "mpirun", "accelerate"):
        ranks = number(rest, "--nproc[-_]per[-_]node", "--ntasks-per-node", "-np") * number(rest, "--nnodes", "-N")
        at = next(i for i, one in enumerate(rest) if one in ("-m", "skyrl-tx", "python") or one.startswith("examples/"))
        check(rest[at:] if rest[at] in ("skyrl-tx", "python") else ["python", *rest[at:]], needs, ranks)
    elif name == "python" and "--help" in rest:
        pass  # tests/config/test_entry.py
    elif (
        name == "python"
        and rest[0] == "-m"
        and (mode := re.fullmatch(r"skyrl\.(train|sft|control|evaluate|serve)", rest[1]))
    ):
        if not (mode[1] == "evaluate" and "run" in needs):  # whose options the run has
            plan(mode[1], tuple(rest[2:]), ranks)
    elif name == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest[1]
    elif name == "python" and (ROOT / rest[0]).is_file():
        if rest[0] == "examples/evaluate.py":
            plan("evaluate", tuple(rest[1:]), ranks)  # the others are started by tests/test_examples.py
    elif name == "make":
        for one in rest:
            variable, equals, _ = one.partition("=")
            assert re.search(rf"^{re.escape(variable)}( \?=|:.*##)", MAKEFILE, re.M), one
    elif name == "skyrl-tx":
        skyrl_tx(rest[0], rest[1:], needs)
    elif name == "sbatch":
        script = next(one for one in rest if not one.startswith("-"))
        assert (ROOT / script).is_file() or (ROOT / "launch" / "slurm" / script).is_file(), script
        nodes = number(rest, "--nodes", "-N") * number(rest, "--gpus-per-node", "--ntasks-per-node")
        plan("serve" if "serve" in script else "train", tuple(rest[rest.index(script) + 1 :]), nodes)
    elif name == "pip" or text.startswith("python -m pip"):
        for extras in re.findall(r"\[([\w,-]+)\]", text):
            assert all(f"\n{extra} = [" in PYPROJECT for extra in extras.split(",")), extras
        assert not re.search(r"install .*\bskyrl(?![-\w])", text), "another project on PyPI"
        assert needs, "needs=network"
    else:
        assert needs or name in ("cd", "export", "source", "ls", "cat", "head", "touch", "kill"), f"{name}: needs=...?"


def skyrl_tx(name: str, rest: list[str], needs: list[str]) -> None:
    assert name in cli.COMMANDS, name
    if name in ("train", "sft", "control", "evaluate", "serve"):
        plan(name, tuple(rest), 1)
    elif name == "launch":
        flags = command.parser().parse_args(rest[: rest.index("--")])
        mode, *args = rest[rest.index("--") + 1 :]
        if flags.slurm:
            flags.staged = None  # a folder that is not here
            sbatch.render(flags, mode, args)
        plan(mode, tuple(args), flags.nodes * (flags.gpus or flags.nproc or 1))
    elif name == "feedback-server":
        plan("serve", (f"feedback.folder={rest[0]}", "feedback.enabled=true", *rest[1:]), 1)
    elif name == "dashboard":
        flags = {"--host": "host", "--port": "port", "--path-prefix": "path_prefix"}
        given = [f"dashboard.{flags[one]}={value}" for one, value in zip(rest, rest[1:], strict=False) if one in flags]
        given += [one for one in rest if one.startswith("dashboard.")]
        plan("serve", ("dashboard.enabled=true", *given), 1)
    elif name == "stage":
        plan("train", tuple(one for one in rest[1:] if not one.startswith("-")), 1)
    elif name == "get-model":
        assert rest[0] in MODELS and len(rest) == 2, rest
    elif name in ("new", "list"):  # into the folder that these commands are typed in
        cli.COMMANDS[name](rest)
    elif name == "wait":
        with pytest.raises(SystemExit, match="124"):
            cli.COMMANDS[name]([*rest, "--timeout", "0.01"])
    elif name not in ("doctor", "runs", "sweep-table"):  # tests/launch/test_doctor.py, test_table.py, tests/test_cli.py
        with pytest.raises(UserError, match="no run folder|no such checkpoint|is no run"):
            cli.COMMANDS[name](rest)  # what was typed is right; the run it names is not here


def test_every_command_can_be_typed(here):
    wrong = []
    for block in blocks():
        if block.kind not in ("bash", "console"):
            continue
        for words, printed in commands(block):
            try:
                check(words, block.needs)
            except UserError as error:
                if f"skyrl: error: {error}" not in printed:
                    wrong.append((block.where, " ".join(words), str(error)))
            except (AssertionError, pytest.fail.Exception, StopIteration, KeyError) as error:
                wrong.append((block.where, " ".join(words), repr(error)[:300]))
    assert not wrong, "\n".join(map(str, wrong))


def test_the_python_of_the_pages_runs(here):
    from skyrl.engine import Engine
    from skyrl.sandbox import SandboxError

    for block in blocks():
        if block.kind != "python" or block.where.startswith("docs/api.md"):  # generated, and compared by test_docs.py
            continue
        if block.words == ["signatures"]:
            names = re.findall(r"(?:engine\.| / )(\w+)\(", block.text)
            assert len(names) > 10 and [name for name in names if not hasattr(Engine, name)] == []
            continue
        code = compile(block.text, block.where, "exec")
        if not block.needs:
            with contextlib.suppress(SandboxError):  # this machine allows none
                exec(code, {"__name__": "page"})


def test_recipes_and_records_of_the_pages_are_read():
    known = {option.path for option in all_options()}
    for block in blocks():
        if block.kind == "json":
            assert json.loads(block.text)
        elif block.kind == "yaml":
            recipe = yaml.safe_load(block.text)
            for one in recipe.pop("defaults"):
                ((group, choice),) = one.items()
                assert (config_dir() / group.removeprefix("override /") / f"{choice}.yaml").is_file()
            for group, values in recipe.items():
                paths = [f"{group}.{name}" for name in values] if isinstance(values, dict) else [group]
                assert set(paths) <= known, (block.where, paths)


def test_the_site_has_every_page_and_reads_its_fences():
    site = runpy.run_path(str(ROOT / "docs" / "site.py"))
    named = re.findall(r'= "([\w-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    made = site["gather"]()
    assert sorted(named) == sorted(made)
    fences = re.findall(r"^```\S.*$", "\n".join(made.values()), re.M)
    assert [one for one in fences if not re.fullmatch(r'```\w+( title="needs: [\w, ]+")?', one)] == []


def test_there_is_one_way_to_install():
    """`pip install .` in a clone; extras by the distribution's name, which is not `skyrl`: that is another project."""
    places = [*pages(), *ROOT.glob("skyrl/**/*.py"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("examples/*.*")]
    # torch's builds, what no extra brings (pytest: alone, without all that dev brings), and a text that goes on below.
    right = r"""(-[a-z] \S+ )*(-e )?\.|['"]skyrl-spmd\[([\w,-]+|{extra})\]['"]"""
    right += r'|torch\b|sentencepiece|pre-commit|ipykernel|pytest|"$'
    wrong, extras = [], set()
    for path in places:
        text = path.read_text(encoding="utf-8")
        told = re.findall(r"pip install (.{1,40})", text.replace("`", " "))
        wrong += [(path.name, one) for one in told if not re.match(right, one)]
        extras |= {one for names in re.findall(r"skyrl-spmd\[([\w,-]+)\]", text) for one in names.split(",")}
        extras |= set(re.findall(r'import_extra\(\s*"[^"]+",\s*[^,]+,\s*"([\w-]+)"', text))  # which says {extra}
    assert [one for one in wrong if one[0] not in ("LOG.md", "CHANGELOG.md", "wandb.py")] == []
    assert len(extras) > 4 and {one for one in extras if f"\n{one} = [" not in PYPROJECT} == set()
