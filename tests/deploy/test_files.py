"""Dockerfile, compose, Swarm and pipeline files: linted, valid for their schemas, with commands that exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skyrl.cli import COMMANDS
from skyrl.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = {
    "compose-spec": ("compose/compose.yaml", "compose/swarm.yaml"),
    "github-workflows": ("ci/github.yml",),
    "gitlab-ci": ("ci/gitlab.yml",),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(schema):
    pytest.importorskip("check_jsonschema", reason="make test-deploy installs it")
    files = [str(ROOT / "launch" / file) for file in SCHEMAS[schema]]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("make test-deploy installs hadolint")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_in_its_context():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for word in line.split()}
    forced = re.search(r"force-include\]\n((?:.*=.*\n)+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    packaged = {name for name in re.findall(r'^"?([\w./-]+)"? = ', forced, re.M)}
    assert packaged and all(any(name == one or name.startswith(f"{one}/") for one in copied) for name in packaged)
    assert copied == kept and all((ROOT / name).exists() for name in kept)
    extras = ",".join(re.findall(r"^ARG (?:CUDA_)?EXTRAS=(.*)$", text, re.M)).split(",")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name} = \[", declared, re.M) for name in extras)


def test_commands_of_the_files_exist():
    found = set()
    for name in (file for files in SCHEMAS.values() for file in files):
        text = (ROOT / "launch" / name).read_text(encoding="utf-8")
        found |= set(re.findall(r"skyrl-tx,? ([a-z-]+)", re.sub(r"^\s*#.*$", "", text, flags=re.M)))
    assert {"launch", "gate", "wait", "stop", "dashboard", "train"} == found <= {*COMMANDS, "dashboard"}


def test_options_of_the_compose_file_are_a_servers():
    told = yaml.safe_load((ROOT / "launch/compose/compose.yaml").read_text(encoding="utf-8"))
    command = told["services"]["serve"]["command"]
    cfg = load_config(command[command.index("serve") + 1 :], mode="serve")
    assert cfg.service.folder == "/runs/tinker" and f":{cfg.service.port}:" in told["services"]["serve"]["ports"][0]


def gitlab_job(where, job, commands="", **more):
    """The script of a job of the GitLab pipeline, by bash in an empty checkout, with the file's own variables;
    `commands` stand for those that are not here."""
    told = yaml.safe_load((ROOT / "launch/ci/gitlab.yml").read_text(encoding="utf-8"))
    variables = {"CI_PIPELINE_ID": "7", **told["variables"], **more}
    lines = ["set -eo pipefail", *(f'{name}="{value}"' for name, value in variables.items()), *told[job]["script"]]
    program = f'skyrl-tx() {{ {sys.executable} -m skyrl.cli "$@"; }}\n{commands}\n' + "\n".join(lines)
    where.mkdir()
    done = subprocess.run(["bash", "-c", program], cwd=where, capture_output=True, text=True)
    kept = [where / path for path in told[job]["artifacts"]["paths"]]
    return done.returncode, [path.name for path in kept if path.exists() and path.is_relative_to(where)]


def gate_job(where, runs, condition):
    return gitlab_job(where, "gate", RUNS=runs, CONDITION=condition)


# A queue that is asked three times: the controller is away, the job runs, it has left and the folder has a result.
QUEUE = """
launch() { echo 123; }
skyrl-tx() { if [ "$1" = launch ]; then launch; else "$PYTHON" -m skyrl.cli "$@"; fi; }
sleep() { :; }
squeue() {
    echo x >>asked
    case $(wc -l <asked) in
    1) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; return 1 ;;
    2) echo "123 gpu ci-7 RUNNING" ;;
    *) echo "$RESULT" >"$RUN/result.json"; echo "slurm_load_jobs error: Invalid job id specified" >&2; return 1 ;;
    esac
}
"""


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 130)])
def test_a_pipelines_training_is_judged_when_its_job_has_left_the_queue(tmp_path, state, code):
    """A job that is retried finds what its last start has left: that a person stopped it."""
    run = tmp_path / "runs" / "ci-7"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "result.json").write_text('{"state": "stopped", "exit_code": 130}')
    result = f'\'{{"state": "{state}", "exit_code": {code}}}\''
    commands = f"PYTHON={sys.executable}\nRESULT={result}\n{QUEUE}"
    assert gitlab_job(tmp_path / "one", "train", commands, RUNS=run.parent)[0] == code
    assert (tmp_path / "one" / "asked").read_text().count("x") == 3


def test_a_pipelines_gate_finds_the_run_that_another_job_has_left_and_keeps_its_export(tmp_path):
    run = tmp_path / "runs" / "ci-7"
    (run / "export").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "rl", "eval/accuracy:mean": 0.95}\n')
    (run / "result.json").write_text('{"state": "finished"}')
    assert gate_job(tmp_path / "one", run.parent, "eval/accuracy>=0.9") == (0, ["export"])
    assert gate_job(tmp_path / "two", run.parent, "eval/accuracy>=0.99") == (1, [])


def test_a_swarm_has_one_first_task_and_numbers_the_others_from_1():
    told = yaml.safe_load((ROOT / "launch/compose/swarm.yaml").read_text(encoding="utf-8"))["services"]
    assert told["first"]["environment"]["NODE_RANK"] == "0" and told["first"]["deploy"]["replicas"] == 1
    assert told["others"]["environment"]["NODE_RANK"] == "{{.Task.Slot}}"
    assert "--master-addr=first " in told["others"]["command"][0]
    assert all(one["deploy"]["endpoint_mode"] == "dnsrr" for one in told.values())
