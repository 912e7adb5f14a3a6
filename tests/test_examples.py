"""Every file of examples/ really runs: the command of its own text, on a model of 19,000 parameters for one step."""

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small import SMALL

from skyrl import cli
from skyrl.config.options import reads
from skyrl.run_dir import read_metrics, run_state

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file() and path.suffix != ".ipynb")
SHORT = [
    *SMALL,
    *"batch.num_steps=1 batch.prompts_per_step=2 batch.samples_per_prompt=4 warmup.num_steps=0".split(),
    *"eval.num_prompts=2 tracking.rollouts_every=1".split(),
    *"checkpoint.every_steps=0 checkpoint.export=false checkpoint.async_save=false".split(),
]


@pytest.fixture
def here(tmp_path):
    """A folder of its own that shows examples/ as the repository's root does."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def command(name: str) -> list[str]:
    """The words of the first command in a file's text, without what starts Python."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return shlex.split(re.search(r"python (?:-m skyrl\.train|examples/\w+\.py)(.*)", text)[1], comments=True)


def run(warm, here, words, script=""):
    """The run of `words`, or of a script with them."""
    before = (
        f"import runpy, sys, types; run = lambda: runpy.run_path({f'examples/{script}'!r}, run_name='__main__'); "
        "sys.modules['script'] = types.SimpleNamespace(main=run)"
    )
    more = {"module": "script", "before": before} if script else {}
    done = warm.run(*words, cwd=here, **more)
    assert done.code == 0, done.stderr
    return done


def steps(folder):
    return [one for one in read_metrics(folder / "metrics.jsonl") if one["phase"] == "rl" and one["step"] > 0]


def test_each_is_listed_and_opens_with_its_command():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if name != "README.md" and f"]({name})" not in page] == []
    for name in EXAMPLES:
        if name.endswith(".py"):
            first, empty, start = (ROOT / "examples" / name).read_text(encoding="utf-8").split("\n")[:3]
            assert first.startswith('"""') and not empty and start.startswith(("    python ", "    export ")), name


def test_environment(warm, here):
    run(warm, here, [*command("environment.py"), *SHORT, "run.dir=run"])
    (step,) = steps(here / "run")
    assert step["accuracy:mean"] == step["reward:mean"]


def test_tool_environment(warm, here):
    """A run, and by hand: the tool answers, and the last turn is scored."""
    by_hand = """
from examples.tool_environment import Calculator
game = Calculator(max_turns=2)
prompt = Calculator.dataset({}, None, "test", 0)[0]
game.reset(prompt)
asked, answered = game.step("so <calc>12*7</calc>"), game.step(str(prompt.extra["answer"]))
assert not asked.done and asked.observation == [{"role": "user", "content": "84="}] and answered.reward == 1.0
"""
    done = warm.run(*command("tool_environment.py"), *SHORT, "run.dir=run", cwd=here, before=by_hand)
    assert done.code == 0, done.stderr
    assert steps(here / "run")[0]["env/calls:mean"] == 0.0


def test_reward(warm, here):
    run(warm, here, [*command("reward.py"), *SHORT, "run.dir=run"])
    (step,) = steps(here / "run")
    assert step["reward:mean"] < 0.0  # what a random model writes is too long


class _Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
        said = json.dumps({"right": len(asked) % 10, "short": 5})
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_judge(warm, here):
    pytest.importorskip("openai", reason="the extra judges is not installed")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {"JUDGE_URL": f"http://127.0.0.1:{server.server_port}/v1", "SKYRL_JUDGE_CACHE": ""}
        done = warm.run(
            *command("judge.py"), *SHORT, "run.dir=run", cwd=here, before=f"import os; os.environ.update({settings})"
        )
        server.shutdown()
    assert done.code == 0, done.stderr
    (step,) = steps(here / "run")
    assert 0.0 < step["reward:mean"] < 1.0


def test_loss_and_advantage(warm, here):
    both = [one for one in command("loss.py") + command("advantage.py") if not one.startswith("plugins=")]
    run(warm, here, [*both, "plugins=[examples.loss,examples.advantage]", *SHORT, "run.dir=run", "batch.num_steps=2"])
    assert all("loss/capped:mean" in step or "skipped_updates:sum" in step for step in steps(here / "run"))


def test_tinker_script(warm, here):
    reason = "the official SDK is not here: it needs Python 3.11"
    pytest.importorskip("tinker.types", reason=reason, exc_type=ImportError)  # tests/tinker is a "tinker" too
    tiny = shlex.join([one for one in SMALL if one.startswith("model.")])
    script = f"import os; os.environ['SKYRL_SERVE_OPTIONS'] = {tiny!r}; import runpy, sys, types; "
    script += "sys.modules['script'] = types.SimpleNamespace(main=lambda: print(runpy.run_path("
    script += "'examples/tinker_script.py')['main'](steps=2, groups=2, samples=4)))"
    done = warm.run(cwd=here, module="script", before=script)
    assert done.code == 0, done.stderr
    assert "step 1: reward 0." in done.stdout


def test_train_in_python_and_evaluate(warm, here):
    done = run(warm, here, SHORT, script="train_in_python.py")
    assert re.search(r"\{'grpo': [\d.]+, 'rloo': [\d.]+\}$", done.stdout.strip())
    short = [one for one in SHORT if reads("evaluate", one.partition("=")[0])]
    words = [*command("evaluate.py"), *short, "eval.samples_per_prompt=2", "eval.temperature=1"]
    done = run(warm, here, words, script="evaluate.py")
    assert re.search(r"^eval/accuracy:mean +0\.\d+$", done.stdout, re.M), done.stdout
    assert list((here / "runs/eval-tiny/rollouts").glob("eval-*"))
    assert not (here / "runs/eval-tiny/export").exists()
    assert run_state(here / "runs/eval-tiny") == "evaluated"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("first_run", [r"^held-out accuracy 0\.\d+ before RL", "^--- prompt$"]),
        ("own_reward", ["^--- expected$", r"reward broken\).*capitals_test\.jsonl:\d.*ZeroDivisionError"]),
    ],
)
def test_notebooks(warm, here, name, said):
    """Their cells in order, in one process, with shorter runs: options are added where papermill would, too."""
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["import matplotlib; matplotlib.use('Agg')"]
    for cell in cells:
        if cell["cell_type"] == "code":
            code.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", ()):
            code.append(f"OPTIONS += {SHORT!r}")
    before = f"import sys, types; cells = {code!r}; names = {{'__name__': '__main__'}}; "
    before += "run = lambda: [exec(compile(cell, 'cell', 'exec'), names) for cell in cells]; "
    before += "sys.modules['script'] = types.SimpleNamespace(main=run)"
    done = warm.run(cwd=here, module="script", before=before)
    assert done.code == 0, done.stderr
    assert all(re.search(one, done.stdout, re.M) for one in said), done.stdout


def test_slurm_array(here, monkeypatch, capsys):
    """What it submits. Arrays on a real Slurm: tests/slurm/test_sweeps.py."""
    words = ["bash", "examples/slurm_array.sh", "--print", "--time", "20", "--", *SHORT, "run.name=array"]
    said = subprocess.run(words, cwd=here, capture_output=True, text=True, env={**os.environ, "PYTHON": "echo"}).stdout
    assert said.startswith("-m skyrl.cli launch --slurm --array 1-3 ")
    monkeypatch.setattr(sys, "argv", ["skyrl-tx", *said.split()[2:]])
    monkeypatch.chdir(here)
    cli.main()
    script = capsys.readouterr().out
    assert "#SBATCH --array=1-3\n" in script and "run.name=array" in script
